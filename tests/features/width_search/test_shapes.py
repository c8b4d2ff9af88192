"""The search of the shape: what it tries, what it measures, how it halves, what it keeps, and what `prune` makes of it.

It reaches for mptk.features.width_search.search: rungs and finalists of made-up shapes.
"""

from __future__ import annotations

import json
import random
import shlex
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from commands import done
from inside import Stopped
from lab import fields
from stops import stop_at

import mptk
from mptk.config import Learning, Training
from mptk.errors import DataError, FileError, InputError, OutputError
from mptk.features.width_search import SEARCH_MINUTES
from mptk.features.width_search.search import choose_finalists, plan_search_rungs
from mptk.features.width_search.shapes import Rung, Shape, Shapes, rank_shapes
from mptk.features.width_search.stage import SearchStage
from mptk.reading import make_typed
from mptk.testing import MODEL_KINDS, WORDS, expect_error

FEW = {"sparsity": 0.35, "tolerance": 0.03, "samples": 8, "length": 32, "align": 8, "onnx": False}
SETTINGS = mptk.Settings(method="wanda", reconstruct=True, search_tokens=0, search_finalists=3, **FEW)
TRAINED = {"search_tokens": 1344, "batch": 2, "micro": 2}
"""Three shapes for three steps of 64 tokens each, then two of them for six more."""
DENSE = {"kv_groups": 3, "q_heads": 2, "ffn": 80, "layers": 3}


@pytest.fixture(scope="module")
def llama(laboratory):
    return str(laboratory.open_model())


@pytest.fixture(scope="module")
def settings(laboratory):
    said = " ".join(random.Random(0).choices(WORDS, k=6000))
    return replace(SETTINGS, data=str(laboratory.keep("width-search/text.txt", lambda file: file.write_text(said))))


@pytest.fixture
def trained(llama, settings, laboratory):
    """An unbroken search."""

    def search(file):
        found = mptk.shapes(llama, settings=settings, progress=None, **TRAINED)
        file.write_text(json.dumps(found.to_json()))

    return make_typed(Shapes, json.loads(laboratory.keep("width-search/shapes.json", search).read_text()))


def shape(loss: float, *after: float, parameters: float = 100.0, **widths: int) -> Shape:
    return Shape({**DENSE, **widths}, 0.35, parameters, None, 9.0, loss, tuple(Rung(8, each) for each in after))


# ---- what is tried and measured ----


def test_every_combination_is_tried_the_better_half_goes_on_and_the_best_of_it_wins(trained):
    tried = [tuple(shape.widths[name] for name in ("kv_groups", "q_heads", "layers")) for shape in trained.shapes]
    assert len(set(tried)) == len(tried) == 7
    assert {shape.widths["layers"] for shape in trained.shapes} == {2, 3}
    assert all(abs(shape.sparsity - 0.35) <= 0.03 for shape in trained.shapes)
    first, second, third, *_ = trained.shapes
    assert [len(shape.rungs) for shape in trained.shapes] == [2, 2, 1, 0, 0, 0, 0]
    assert first.loss <= second.loss
    assert max(first.rungs[0].loss, second.rungs[0].loss) <= third.rungs[0].loss
    assert all(after <= before for shape in trained.shapes for before, after in pairwise(shape.stages))
    assert any(after < before for shape in (first, second) for before, after in pairwise(shape.stages))
    assert sum(shape.rungs[-1].tokens for shape in trained.shapes if shape.rungs) == 1344


@pytest.mark.always
def test_a_shape_is_measured_as_the_model_that_prune_makes_of_it(llama, settings):
    """Masked, and fitted: a block less and fewer channels, on the samples that nothing was fitted to."""
    ids, asked = torch.randint(2, 97, (13, 32)), replace(settings, sparsity=0.5)
    found = mptk.shapes(llama, settings=asked, data=ids, keep=("kv_groups", "q_heads"), progress=None)
    assert [shape.widths["layers"] for shape in found.shapes] == [3, 2]
    short = found.shapes[1]
    assert short.widths["ffn"] < 80
    for reconstruct, expected in ((False, short.masked), (True, short.reconstructed)):
        more = {"widths": short.widths, "reconstruct": reconstruct, "eval_windows": 1, "progress": None}
        # The first three are set aside, so that a later run can measure what nothing was fitted to.
        small = mptk.prune(llama, settings=asked, data=ids[3:11], eval_data=ids[11:], **more).model
        with torch.no_grad():
            loss = small(ids[11:], labels=ids[11:]).loss
        assert float(loss) == pytest.approx(expected, abs=1e-4)
    assert short.masked != short.reconstructed
    assert found.dense.parameters == sum(p.numel() for p in MODEL_KINDS["decoder"].make().parameters())


@pytest.mark.parametrize(
    ("searching", "training"),
    [
        ({"search_tokens": 640, "search_finalists": 2, "batch": 2, "micro": 2}, {}),
        ({"samples": 72, "batch": 9, "micro": 9, "length": 8}, {"steps": 1, "rank": 2}),
    ],
    ids=["more text than for calibration", "training holds out more"],
)
def test_prune_searches_on_the_text_that_the_model_wrote_for_shapes(llama, searching, training):
    given = {"data": "self", "search": True, "search_shapes": 2, "eval_windows": 1, "progress": None, **searching}
    found = mptk.prune(llama, settings=SETTINGS, **given, **training)
    ranked = mptk.shapes(llama, settings=SETTINGS, **{k: v for k, v in given.items() if k != "search"})
    assert found.report.rows["search"]["shapes"] == ranked.to_json()["shapes"]


@pytest.mark.usefixtures("made_up_times")
def test_a_latency_is_a_budget_too(llama, settings, tmp_path, set_cache):
    set_cache(tmp_path / "cache")
    asked = {"budget": "latency", "sparsity": 0.3, "tolerance": 0.1, "search_shapes": 2}
    found = mptk.shapes(llama, settings=settings, progress=None, **asked)
    dense = found.dense.latency_ms
    assert len(found.shapes) == 2
    for shape in found.shapes:
        assert shape.cost == shape.latency_ms == pytest.approx((1 - shape.sparsity) * dense)
        assert 0.6 <= shape.cost / dense <= 0.8
    assert " --budget latency " in found.command


# ---- halving ----


def test_tokens_are_halved_over_rungs():
    settings = mptk.Settings(method="wanda", search=True, search_tokens=100_000, search_finalists=6, length=32)
    found = plan_search_rungs(settings, 64)
    assert [count for count, _ in found] == [6, 3, 2]
    assert [steps for _, steps in found] == [19, 39, 78]
    assert sum(count * steps for count, steps in found) * 8 * 32 <= 100_000
    assert [count for count, _ in plan_search_rungs(settings, 4)] == [4, 2]
    assert plan_search_rungs(settings, 1) == plan_search_rungs(replace(settings, search_tokens=0), 64) == []
    with expect_error(DataError, name="search_tokens", nearest=[5120]):
        plan_search_rungs(replace(settings, search_tokens=5119), 64)
    with expect_error(DataError, nearest=[15360]):  # two steps of masks and one of recovery
        plan_search_rungs(replace(settings, method="maskprune", search_tokens=15359), 64)


def test_finalists_are_good_and_unlike_each_other():
    first, second, fifth = (shape(loss, ffn=ffn) for loss, ffn in ((1.0, 40), (1.1, 48), (1.4, 32)))
    shapes = [first, second, shape(1.2, q_heads=1), shape(1.3, 0.2, kv_groups=2), fifth]
    assert choose_finalists(shapes, DENSE, 3) == [0, 2, 3]
    assert choose_finalists(shapes, DENSE, 4) == [0, 2, 3, 1]


def test_a_killed_search_loses_one_rung_of_one_shape(llama, settings, trained, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        mptk.shapes(llama, out, settings, progress=stop_at(("train shapes", 4)), **TRAINED)
    assert len(list((tmp_path / "out.run").glob("shape-*.json"))) == 7
    with expect_error(OutputError, name=tmp_path / "out.run"):
        mptk.shapes(llama, out, settings, progress=None, **TRAINED)
    file = tmp_path / "out.run" / "shape-00003.json"
    written = file.read_text()
    file.write_text(written.replace('"masked"', '"veiled"'))
    with expect_error(FileError, name=file):
        mptk.shapes(llama, out, settings, progress=None, resume=True, **TRAINED)
    file.write_text(written)
    found = mptk.shapes(llama, out, settings, progress=None, resume=True, **TRAINED)
    assert found.shapes == trained.shapes
    assert json.loads((out / "shapes.json").read_text()) == json.loads(json.dumps(found.to_json()))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_search_has_more_minutes_by_default_and_gets_a_third_of_the_tokens_of_training():
    training = Training(batch=2, micro=2)
    asked = mptk.Settings(search=True, search_finalists=2, length=32, learning=Learning(rank=2, training=training))
    assert asked.default_minutes == SEARCH_MINUTES
    (minutes,) = [each for each in mptk.Settings.declared if each.name == "minutes"]
    assert f"({SEARCH_MINUTES} with --search)" in minutes.setting.help
    assert SearchStage().choose_numbers(asked, 90 * 2 * 32) == {"search_tokens": 1920}
    # Masks for two steps, recovery one.
    assert SearchStage().choose_numbers(asked, 5 * 2 * 32) == {"search_tokens": 384}


# ---- what is said ----


def test_the_front_compares_a_shape_with_those_that_went_as_far():
    worse, better = shape(1.1, parameters=100), shape(1.0, 0.8, 0.7, parameters=100)
    cheap, costly = shape(0.9, 0.85, parameters=90), shape(0.9, 0.9, parameters=95)
    found = Shapes("m", "", "perplexity", shape(0.1), rank_shapes([worse, better, cheap, costly]))
    assert found.shapes == (better, cheap, costly, worse)
    assert found.best is better
    assert found.front == (better, cheap)  # `cheap` was better before training, but did not go as far as `better`


def test_the_command_prints_a_table_and_what_prunes_to_the_best(llama, settings, tmp_path, go_to):
    go_to(tmp_path)
    typed = f"--sparsity 0.33 --data {settings.data} --samples 8 --length 32 --align 8 --keep q_heads"
    run = done("shapes", llama, *typed.split(), "--tokens", "0", "--html", "page.html", "-q")
    *table, command = run.stdout.strip().splitlines()
    assert "reconstructed" in " ".join(table)
    assert "fitted to or trained on" in " ".join(" ".join(table).split())  # a long path breaks the line elsewhere
    assert command.startswith(f"mptk prune {llama} --sparsity 0.33 ")
    assert " --method wanda " in command
    run = done(*shlex.split(command)[1:], "--no-onnx", "--eval-length", "32", "-q")
    families = mptk.Report.read("decoder-pruned").families.items()
    cut = {f"{name}={row['width']}" for name, row in families if row["width"] < row["of"]}
    assert set() < cut <= {word for word in shlex.split(command) if "=" in word}
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 1
    assert "--width" in page


def report_width(report: mptk.Report, name: str) -> int:
    """The width of a family; a report has no row of blocks that are all there."""
    return int(report.families[name]["width"]) if name in report.families else DENSE[name]


def test_prune_cuts_to_the_best_shape_and_a_report_shows_the_ranking(llama, settings, tmp_path):
    folder, page = tmp_path / "small", tmp_path / "page.html"
    short = {"search_shapes": 3, "distil_epochs": 1, "eval_windows": 1}
    found = mptk.prune(llama, folder, settings=settings, search=True, progress=None, **short)
    shapes = found.report.rows["search"]["shapes"]
    assert any(shape["widths"]["layers"] < DENSE["layers"] for shape in shapes)
    assert shapes[0]["widths"] == {name: report_width(found.report, name) for name in DENSE}
    losses = [each["reconstructed"] for each in shapes]
    assert len(losses) == 3
    assert losses == sorted(losses)
    assert "The search of the shape" in done("report", folder).output
    done("report", folder, "--html", page)
    assert page.read_text().count("Cost and quality of each shape") == 1
    shapes[1]["widths"] = {"ffn": 3}
    fields("report.json", rows__search__shapes=shapes)(folder)
    with expect_error(FileError):
        mptk.Report.read(folder)


def test_the_nearest_legal_cut_is_noted(llama, settings):
    more = {"families": ("ffn",), "reconstruct": False, "tolerance": 0.01, "eval_windows": 1, "progress": None}
    off = mptk.prune(llama, settings=settings, sparsity=0.3, **more).report
    assert off.sparsity == pytest.approx(0.286, abs=1e-3)
    assert "no legal cut removes 30.0%; the nearest, 28.6%, was taken" in off.notes
    exact = mptk.prune(llama, settings=settings, sparsity=off.sparsity, **more).report
    assert not any(note.startswith("no legal cut") for note in exact.notes)


def test_maskprune_searches_by_short_runs_of_itself(llama, settings):
    asked = {"method": "maskprune", "steps": 3, "batch": 2, "micro": 2, "eval_windows": 1, "search_shapes": 2}
    asked |= {"search_finalists": 2, "search_tokens": 2 * 3 * 64}
    found = mptk.prune(llama, settings=settings, search=True, progress=None, **asked)
    assert [rung["tokens"] for shape in found.report.rows["search"]["shapes"] for rung in shape["rungs"]] == [192, 192]
    best = found.report.rows["search"]["shapes"][0]["widths"]
    assert "layers" in best
    assert {name: report_width(found.report, name) for name in best} == best


def test_a_search_with_nothing_to_choose_is_refused(llama, settings, tmp_path):
    for more, name in (
        ({"larger": "runs/a"}, "search"),
        ({"widths": {"kv_groups": 2, "q_heads": 2, "ffn": 48, "layers": 3}}, "widths"),
        ({"layers": "0-1", "target": "graph"}, "layers"),
    ):
        with expect_error(InputError, name=name):
            mptk.prune(llama, settings=settings, search=True, progress=None, **more)
    with expect_error(InputError, name="search"):
        mptk.ladder(llama, tmp_path / "sizes", (0.2, 0.3), settings=settings, search=True, progress=None)
