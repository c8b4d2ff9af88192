"""The benchmark of advice: what it holds out, which rows it computes anew, and what its tables compare."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import pytest

from benchmarks.advice import SHARE, Compared, Study, fill, split
from benchmarks.quality import rows_in
from benchmarks.quality_text import PIECE
from mptk import testing
from mptk.features.advise.advice import Advice, Figures, Point, Recovery

ROOT = Path(__file__).resolve().parents[3]


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_a_tenth_of_a_text_is_held_out(tmp_path):
    (tmp_path / "long.txt").write_text("".join(f"{i}".ljust(PIECE) for i in range(2 * SHARE)))
    held_out, rest = split({"long": tmp_path / "long.txt"}, tmp_path / "work")
    assert sorted(text.strip() for text in texts(held_out["long"])) == ["18", "19"]
    assert [text.strip() for text in texts(rest["long"])] == [f"{i}" for i in range(18)]


def test_rows_are_computed_once(tmp_path):
    testing.save_model(testing.make_llama(max_position_embeddings=600), tmp_path / "dense")
    for seed, name in enumerate(("code", "prose")):
        (tmp_path / f"{name}.txt").write_text(" ".join(random.Random(seed).choices(testing.WORDS, k=9000)))
    held_out, rest = split({n: tmp_path / f"{n}.txt" for n in ("code", "prose")}, tmp_path / "work")
    study = Study(str(tmp_path / "dense"), held_out, rest, 8, 32, 2, 2, 2, tmp_path / "work")
    rows = fill(study, [0.357], 1.0, tmp_path / "rows.json")
    assert [(row["kind"], row.get("steps")) for row in rows] == [("dense", None), ("advice", 2), ("run", 0), ("run", 2)]
    assert {name: len(losses) for name, losses in rows[-1]["losses"].items()} == {"code": 2, "prose": 2}
    assert not list((tmp_path / "work").glob("cut-*"))
    shutil.rmtree(tmp_path / "dense")
    assert fill(study, [0.357], 1.0, tmp_path / "rows.json") == rows
    assert sum(line.startswith("| 35.7%") for line in Compared.of(rows).cuts(2)) == 2


def nats(rise: float) -> Figures:
    return Figures(1 + rise, rise, None, math.expm1(rise), 0.0)


@pytest.fixture
def compared():
    """Cuts that lose 0.2, 0.4 and 0.6 nats by the advice, and half of it after training."""
    points = tuple(
        Point({"ffn": round(100 * (1 - s))}, s, 1.0, 1.0, None, {"a.txt": nats(2 * s)}) for s in (0.1, 0.2, 0.3)
    )
    dense = Point({"ffn": 100}, 0.0, 1.0, 1.0, None, {"a.txt": nats(0.0)})
    recovery = Recovery(16, 8192, (Point({"ffn": 70}, 0.3, 1.0, 1.0, None, {"a.txt": nats(0.3)}),))
    advice = Advice("m", "", "perplexity", 1.0, dense, points, {}, {}, recovery=recovery)
    rises = {(s, 0, "a"): (rise, 0.01) for s, rise in ((0.1, 0.2), (0.2, 0.7), (0.3, 0.5))}
    rises |= {(s, 16, "a"): (rise, 0.01) for s, rise in ((0.1, 0.05), (0.2, 0.19), (0.3, 0.3))}
    return Compared(advice, rises, {"a": "a.txt"}, 16)


def test_a_full_run_overlaps_the_advice_or_not(compared):
    plain, trained = (list(compared.cuts(steps))[2:] for steps in (0, 16))
    said = [line.split("|")[-2].strip() for line in (*plain, *trained)]
    over, under = "no, the advice says more", "no, the advice says less"
    assert said == ["yes", under, over, over, "yes", "yes"]
    assert "| +22% to +22% | +19% to +23% |" in trained[1]
    assert "+35% to +35%, trained" in trained[2]


def test_the_largest_cut_that_full_runs_allow(compared):
    found = [line.split("|")[1:-1] for line in compared.recommendations()][2:]
    said = {tolerance.strip(): [cell.strip() for cell in cells] for tolerance, *cells in found}
    assert said["50%"] == ["20.0%", "10.0%", "30.0%", "30.0%"], "the larger cut below the tolerance is luck"
    assert said["20%"] == ["none", "none", "10.0%", "10.0%"]


@pytest.mark.parametrize("model", ["smollm2-135m", "gemma3-270m"])
def test_the_page_has_the_tables_of_the_rows(model):
    page, rows = (ROOT / "benchmarks/advice.md").read_text(), rows_in(ROOT / "benchmarks/results/advice.json")
    own = [row for row in rows if row["model"] == model]
    assert all("\n".join(lines) in page for lines in Compared.of(own).tables())
