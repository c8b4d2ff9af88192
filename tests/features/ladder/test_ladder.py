"""A ladder: several sizes in one run, each cut further from the next larger one, and each proven on its own.

It reaches for mptk.run.larger: the model that units are chosen from.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from commands import done
from inside import Stopped
from ladders import ASKED, OPTIONS, SIZES, TRAINED, TWO, digest_folders, read_logits, require_nested
from safetensors.torch import load_file
from stops import stop_at
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from typer.testing import CliRunner

import mptk
from mptk import Pruned, testing
from mptk.api.pruned import estimate_run
from mptk.cli.main import app
from mptk.errors import BudgetError, FileError, InputError, OutputError
from mptk.features.ladder.api import estimate_ladder
from mptk.features.rerun.api import repeat_run
from mptk.testing import draw_tokens, expect_error


@pytest.fixture(scope="module")
def gpt2(laboratory):
    def write(folder):
        testing.save_word_model(GPT2LMHeadModel(testing.make_config("gpt2")), folder)

    return str(laboratory.keep("ladders/gpt2", write))


@pytest.fixture
def trained(llama, text, laboratory):
    place = laboratory.keep("ladders/trained", lambda out: mptk.ladder(llama, out, TWO, data=text, **TRAINED))
    return [Pruned.open(place / f"{size}") for size in TWO]


def require_ladder(found: Sequence[Pruned], sizes: Sequence[float] = SIZES) -> None:
    assert [each.place.name for each in found] == [f"{size:g}" for size in sizes]
    for each, size in zip(found, sizes, strict=True):
        assert each.report.sparsity == pytest.approx(size, abs=0.03)  # of the dense model
        assert each.report.quality["dense"] == found[0].report.quality["dense"]
    for larger, smaller in pairwise(found):
        require_nested(larger.plan, smaller.plan)


# ---- what a ladder makes ----


@pytest.mark.always
def test_every_size_is_a_folder_of_its_own_and_its_units_are_the_larger_ones(trained):
    require_ladder(trained, TWO)
    assert all(stage.ok for stage in mptk.verify(trained[-1].place))
    for each in trained:
        loaded = AutoModelForCausalLM.from_pretrained(each.place, dtype=torch.float32)
        assert torch.equal(read_logits(loaded), read_logits(each.model))
        assert each.report.settings.steps == 2  # of four for two models
        assert each.report.recovery
    assert [each.report.settings.larger for each in trained[1:]] == [str(each.place) for each in trained[:-1]]
    first, second = (each.report for each in trained)
    assert [first.settings.seed, second.settings.seed] == [0, 1]  # windows of its own to train on
    assert first.data["training"]["inputs"] != second.data["training"]["inputs"]
    assert first.data["evaluation"] == second.data["evaluation"]


def test_units_that_are_gone_stay_gone_whatever_scores_them(llama, text, tmp_path):
    asked = {**ASKED, "method": "random", "families": ("ffn", "q_heads"), "data": text}
    larger = mptk.prune(llama, tmp_path / "a", sparsity=0.2, seed=1, **asked)
    smaller = mptk.prune(llama, tmp_path / "b", sparsity=0.37, seed=2, larger=tmp_path / "a", **asked)
    require_nested(larger.plan, smaller.plan)


def test_masks_are_learned_among_the_units_that_are_left(llama, text, tmp_path):
    learned = {**ASKED, "method": "maskprune", "steps": 4, "batch": 2, "teacher": "cached"}
    cache = tmp_path / "teacher"
    found = mptk.ladder(llama, tmp_path / "m", TWO, data=text, teacher_cache=cache, **learned)
    require_ladder(found, TWO)
    assert [next(s["stage"] for s in each.report.proof) for each in found] == ["learned masks"] * 2
    assert len(list(cache.iterdir())) == 1  # one teacher, the dense model


def test_biases_that_make_up_for_units_add_up(gpt2, text, tmp_path):
    stages = []
    asked = {**ASKED, "method": "flap", "progress": lambda stage, *_: stages.append(stage)}
    found = mptk.ladder(gpt2, tmp_path / "m", [0.1, 0.2], data=text, **asked)
    require_ladder(found, [0.1, 0.2])
    assert (stages.count("trace"), stages.count("legalise")) == (1, 2)
    larger, smaller = (load_file(each.place / "compensation.safetensors") for each in found)
    assert larger.keys() <= smaller.keys()
    assert any(not torch.equal(larger[name], smaller[name]) for name in larger)


def test_a_ladder_of_a_model_with_fewer_tokens_and_kv_heads(text, tmp_path):
    dense = testing.save_model(testing.make_llama(layers=2), tmp_path / "dense")
    asked = {**ASKED, "families": ("ffn",), "align": 4, "vocabulary": text, "kv_heads": 1}
    found = mptk.ladder(dense, tmp_path / "m", [0.2, 0.4], data=text, **asked)
    require_ladder(found, [0.2, 0.4])
    assert all(stage.ok for stage in mptk.verify(found[-1].place))
    assert all(each.plan.conversions.keys() == {"vocabulary", "kv_heads"} for each in found)
    assert found[1].report.rows["kv_heads"]["kept"] == 1


@pytest.mark.parametrize("more", [{}, {"reconstruct": True, "shared": True}], ids=["apart", "shared"])
def test_a_module_of_ones_own_has_a_ladder(tmp_path, more):
    net, x = torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.ReLU(), torch.nn.Linear(20, 4)), torch.randn(8, 6)
    found = mptk.ladder(net, tmp_path / "m", [0.2, 0.5], example_inputs=x, onnx=False, progress=None, **more)
    require_nested(found[0].plan, found[1].plan)
    assert found[1].model(x).shape == (8, 4)
    assert found[1].report.sparsity == pytest.approx(0.5, abs=0.05)
    assert all(stage.ok for each in found for stage in mptk.verify(each.place, model=net))


@pytest.mark.parametrize("families", [("ffn", "q_heads", "kv_groups"), ("hidden",)])
def test_units_are_chosen_from_what_the_larger_folder_computes(llama, text, trained, tmp_path, inside, families):
    """The model in dense shapes that is scored and fitted has the larger folder's logits, and its module, too."""
    begun = []
    inside.spoil("mptk.run.prune.take_larger", lambda made: begun.append(made) or made)
    asked, larger = {**ASKED, "tolerance": 0.2, "data": text}, trained[0].place
    if families == ("hidden",):
        larger = tmp_path / "a"
        mptk.prune(llama, larger, sparsity=0.3, families=families, **asked)
    asked |= {"families": (*families, *{"ffn"} - {*families}), "progress": stop_at("score (wanda)")}
    with pytest.raises(Stopped):
        mptk.prune(llama, tmp_path / "b", sparsity=0.5, larger=larger, **asked)
    expected = read_logits(AutoModelForCausalLM.from_pretrained(larger, dtype=torch.float32))
    dense = read_logits(AutoModelForCausalLM.from_pretrained(llama))
    assert not torch.allclose(expected, dense, atol=1e-3)
    made = begun[-1]
    found = next(made.executor.run_programs([made.analysis.program], [[draw_tokens()]]))
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(read_logits(made.copy_model()), expected, atol=1e-5)
    assert torch.allclose(read_logits(made.copy_teacher()), dense, atol=1e-5)


def test_a_size_begins_with_the_trained_weights_of_the_larger_one(llama, text, trained, tmp_path):
    larger = trained[0]
    asked = {**ASKED, "families": ("ffn",), "data": text, "larger": larger.place}
    smaller = mptk.prune(llama, tmp_path / "b", sparsity=0.3, **asked)
    (other,) = larger.plan.families.keys() - {"ffn"}
    assert smaller.plan.families[other] == larger.plan.families[other]  # not named, so as it was
    places = (larger.place, tmp_path / "b", Path(llama))
    first, second, dense = (load_file(place / "model.safetensors") for place in places)
    name = "model.layers.1.mlp.up_proj.weight"
    (before,), (after,) = (each.plan.families["ffn"].keep["model.layers.1.mlp"] for each in (larger, smaller))
    rows = [before.index(unit) for unit in after]
    assert torch.equal(second[name], first[name][rows])
    assert not torch.allclose(second[name], dense[name][list(after)], atol=1e-5)
    embedding = "model.embed_tokens.weight"
    assert torch.equal(second[embedding], first[embedding])


# ---- stopped and resumed ----


def test_a_stopped_ladder_goes_on_with_the_size_that_was_interrupted(llama, text, trained, tmp_path):
    """Stopped in the training of the first size, and again before the second is written."""
    asked, out = {**TRAINED, "save_every": 1, "data": text}, tmp_path / "m"
    stops = [[("recovery", 2)], ["sparsity 0.4", "write stock"]]
    for count, stop in enumerate(stops):
        with pytest.raises(Stopped):
            mptk.ladder(llama, out, TWO, resume=bool(count), **{**asked, "progress": stop_at(*stop)})
        finished = {place: place.stat().st_ino for place in out.glob("*") if (place / "report.json").is_file()}
        assert len(finished) == count
        (unfinished,) = out.glob("*.run")
        if not finished:
            with expect_error(OutputError, name=unfinished):
                mptk.ladder(llama, out, TWO, **asked)
    found = mptk.ladder(llama, out, TWO, resume=True, **asked)
    assert {place: place.stat().st_ino for place in finished} == finished
    unbroken = [each.place for each in trained]
    assert digest_folders([each.place for each in found]) == digest_folders(unbroken)
    assert [each.report.quality for each in found] == [each.report.quality for each in trained]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_finished_sizes_stay_and_other_settings_are_refused(llama, text, trained, tmp_path):
    place, out = trained[0].place.parent, tmp_path / "m"
    asked = {**TRAINED, "data": text, "resume": True, "progress": stop_at("trace")}
    shutil.copytree(place / "0.4", out / "0.2")
    with expect_error(OutputError, name=out / "0.2"):
        mptk.ladder(llama, out, TWO, **asked)
    again = mptk.ladder(llama, place, TWO, **asked)
    assert [each.report.to_json() for each in again] == [each.report.to_json() for each in trained]
    with expect_error(OutputError, name=place / "0.2"):
        mptk.ladder(llama, place, TWO, **{**asked, "steps": 9})


def test_a_size_is_repeated_from_its_report_and_trained_further(trained, text, tmp_path):
    assert all(row["same"] for row in repeat_run(trained[1].place, tmp_path / "again"))
    more = {name: TRAINED[name] for name in ("length", "onnx", "eval_length", "eval_windows", "progress", "batch")}
    found = mptk.recover(trained[1].place, tmp_path / "more", data=text, steps=2, **more)
    assert found.plan.digest == trained[1].plan.digest
    assert all(stage.ok for stage in mptk.verify(tmp_path / "more"))


@pytest.mark.parametrize(
    ("sizes", "more", "refusal", "name", "nearest"),
    [
        ([0.4, 0.2], {}, InputError, "sparsities", (0.2, 0.4)),
        ([0.2, 0.2], {}, InputError, "sparsities", (0.2,)),
        ([0, 0.2], {}, InputError, "sparsities", ()),
        ([0.2, 1.0], {}, InputError, "sparsities", ()),
        ([0.2], {}, InputError, "sparsities", ()),
        (SIZES, {"plan": "plan.json"}, InputError, "plan", ()),
        (SIZES, {"larger": "runs/a"}, InputError, "larger", ()),
        (SIZES, {"layers": "free", "target": "graph"}, InputError, "layers", ()),
        (SIZES, {"steps": 2}, InputError, "steps", (3,)),
        ([0.2, 0.97], {}, BudgetError, "sparsity", None),
        ([0.2, 0.4], {"families": ("ffn", "q_heads")}, BudgetError, "sparsity", None),
        ([0.3333, 0.6666], {"families": ("layers",)}, BudgetError, "families", ()),
    ],
)
def test_what_is_no_ladder_is_refused_before_any_work(llama, text, tmp_path, sizes, more, refusal, name, nearest):
    asked = {**ASKED, **more, "progress": stop_at("score (wanda)")}
    with expect_error(refusal, name=name, nearest=nearest):
        mptk.ladder(llama, tmp_path / "m", sizes, data=text, **asked)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_cut_further_is_refused(llama, gpt2, text, trained, tmp_path):
    depth = {**ASKED, "families": ("layers",), "method": "magnitude"}
    mptk.prune(llama, tmp_path / "depth", sparsity=0.3333, data=text, **depth)
    asked = {**ASKED, "data": text, "sparsity": 0.5, "progress": stop_at("score (wanda)")}
    place = trained[0].place
    for model, larger, more, refusal, name in (
        (gpt2, place, {}, InputError, "larger"),
        (llama, tmp_path / "depth", {}, InputError, "larger"),
        (llama, place, {"widths": {"ffn": 80}}, BudgetError, "ffn"),
        (llama, place, {"kv_heads": 1}, InputError, "larger"),
        (llama, tmp_path / "none", {}, FileError, str(tmp_path / "none")),
    ):
        with expect_error(refusal, name=name):
            mptk.prune(model, tmp_path / "out", larger=larger, **{**asked, **more})
    with expect_error(OutputError, name=place):
        mptk.prune(llama, place, larger=place, **asked)


def test_the_command_makes_a_ladder_and_report_shows_it_side_by_side(llama, text, tmp_path):
    base = ["prune", llama, *OPTIONS, "--data", text, "--out", str(tmp_path / "m"), "--ladder"]
    said = done(*base, "20%,0.4").output
    require_ladder([Pruned.open(tmp_path / "m" / f"{size}") for size in TWO], TWO)
    page = tmp_path / "page.html"
    for each in (said, done("report", tmp_path / "m").output):
        assert [line.split()[1] for line in each.splitlines() if line.startswith("│ 0.")] == ["0.2", "0.4"]
    done("report", tmp_path / "m", "--html", page)
    assert "0.4" in page.read_text()


def test_ctrl_c_says_which_sizes_are_finished(llama, text, tmp_path, inside):
    inside.stop("mptk.targets.stock.write_checkpoint", 2, KeyboardInterrupt)
    command = ["prune", llama, *OPTIONS, "--data", text, "--out", str(tmp_path / "m"), "--ladder", "0.2,0.4"]
    said = str(CliRunner().invoke(app, command).exception)
    first, second = (str(tmp_path / "m" / size) for size in ("0.2", "0.4"))
    assert f"finished: {first}; nothing was published. {second}.run keeps the finished stages" in said


def test_an_estimate_adds_the_sizes_up(llama, text):
    settings = mptk.Settings(method="wanda", samples=4, length=32, data=text, onnx=False)
    single = estimate_run(llama, settings)
    found = estimate_ladder(llama, settings, SIZES)
    assert found.seconds["prove"] == pytest.approx(3 * single.seconds["prove"], rel=0.5)
    assert found.seconds["trace and analyse"] == single.seconds["trace and analyse"]
    assert single.output["checkpoint"] < found.output["checkpoint"] < 3 * single.output["checkpoint"] * 1.2
    assert found.does.startswith("3 models, each with")
