"""The benchmark of ladders: which rows it computes anew, and what its table compares."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.ladder import TEXTS, Study, fill, table
from benchmarks.quality import rows_in
from mptk import testing

ROOT = Path(__file__).resolve().parents[2]


def test_rows_are_computed_once(tmp_path):
    testing.save_model(testing.make_llama(max_position_embeddings=600, intermediate_size=320), tmp_path / "dense")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over a lazy dog. " * 400)
    text = str(tmp_path / "text.txt")
    study = Study(
        str(tmp_path / "dense"), [0.211, 0.368], text, dict.fromkeys(TEXTS, text), 4, 32, 1, 4, 2, 1, tmp_path
    )
    rows = fill(study, tmp_path / "rows.json")
    steps = {"separate": [4, 4], "cascaded": [4, 4, 2, 2], "shared": [4, 4]}
    assert {way: [r["steps"] for r in rows if r["way"] == way] for way in steps} == steps
    assert [r["tokens"] for r in rows[1:]] == [256] * 4 + [128] * 2 + [256] * 2
    assert len({row["c4"] for row in (rows[0], *rows[2::2])}) == 5, "the smallest of each way is another model"
    assert not list(tmp_path.glob("tmp*"))
    written = (tmp_path / "rows.json").stat()
    assert fill(study, tmp_path / "rows.json") == rows
    assert (tmp_path / "rows.json").stat() == written


WAYS = (("separate", 6, (0.3, 40.0), (0.2, 10.0)), ("cascaded", 3, (0.2, 5.0), (0.3, 80.0)))


@pytest.fixture
def rows():
    """Two sizes in separate runs, and in a ladder of half of the steps: half and twice as bad, of C4 half and 8 times."""
    asked = [(way, steps, s, v) for way, steps, *ends in WAYS for s, v in ends]
    made = [
        {"way": way, "steps": steps, "seed": 0, "sparsity": s, "tokens": 512 * steps, "processor_minutes": 1.5}
        | dict.fromkeys(TEXTS, value)
        for way, steps, s, value in asked
    ]
    made[-1]["c4"] *= 4
    return [{"way": "dense", "seed": 0, "sparsity": 0.0, **dict.fromkeys(TEXTS, 8.0)}, *made]


def test_a_line_a_way(rows):
    separate, cascaded = table(rows)[2:]
    assert separate == "| separate | 0 | 3,072 | 1.5 | 10.0 | 10.0 | 40.0 | 40.0 | +0.0% | +0.0% |"
    assert cascaded == "| cascaded | 0 | 1,536 | 1.5 | 5.0 | 5.0 | 80.0 | 320.0 | +0.0% | +100.0% |"


def test_each_seed_is_compared_with_its_own_separate_runs_and_the_mean_is_of_all(rows):
    better = {"separate": 1.0, "cascaded": 0.5, "dense": 1.0}
    other = [r | {"seed": 1} | {name: r[name] * better[r["way"]] for name in TEXTS} for r in rows]
    lines = table(rows + other)
    assert [line.split(" | ")[0:2] for line in lines[2:6]] == [
        [f"| {way}", f"{seed}"] for way in ("separate", "cascaded") for seed in (0, 1)
    ]
    assert lines[5].endswith("| -50.0% | +0.0% |")
    assert lines[-1].startswith("| cascaded | 1,536 | -29.3% | +41.4% |")


def test_the_page_has_the_table_of_the_rows():
    page, rows = (ROOT / "benchmarks/ladder.md").read_text(), rows_in(ROOT / "benchmarks/results/ladder.json")
    assert "\n".join(table(rows)) in page
