"""A ladder: several sizes in one run, each cut further from the next larger one, and each proven on its own.

It reaches for mptk.run.larger: the model that units are chosen from.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import test_pruning
import test_resume
import torch
from inside import Inside, Stopped, changed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from typer.testing import CliRunner

import mptk
from mptk import MptkError, Plan, Pruned, testing
from mptk.api.pruned import estimate_run
from mptk.cli.main import app
from mptk.features.ladder.api import estimate_ladder
from mptk.features.rerun.api import repeat_run
from mptk.protocols.chain import Prepared
from mptk.testing import draw_tokens

llama, prepared_once, gpt2 = test_resume.llama, test_resume.prepared_once, test_pruning.gpt2
SIZES = [0.2, 0.4, 0.6]
ASKED: dict[str, Any] = {
    "method": "wanda",
    "samples": 4,
    "length": 32,
    "align": 8,
    "onnx": False,
    "eval_length": 32,
    "eval_windows": 4,
    "progress": None,
}
TRAINED = {**ASKED, "reconstruct": True, "steps": 4, "batch": 2}
TWO = SIZES[:2]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("text") / "text.txt"
    words = test_resume.WORDS
    order = torch.randint(len(words), [4000], generator=torch.Generator().manual_seed(0))
    place.write_text(" ".join(words[i] for i in order))
    return str(place)


@pytest.fixture(scope="module")
def trained(llama: str, text: str, tmp_path_factory: pytest.TempPathFactory) -> list[Pruned]:
    return mptk.ladder(llama, tmp_path_factory.mktemp("trained") / "m", TWO, data=text, **TRAINED)


def require_nested(larger: Plan, smaller: Plan) -> None:
    """Every unit of the smaller model is one of the larger model's, in the dense model's numbers."""
    assert larger.families.keys() <= smaller.families.keys()
    for name, family in larger.families.items():
        assert smaller.widths[name] <= family.width
        assert smaller.families[name].of == family.of
        for layer, rows in family.keep.items():
            for kept, left in zip(rows, smaller.families[name].keep[layer], strict=True):
                assert set(left) <= set(kept), (name, layer)


def require_ladder(found: Sequence[Pruned], sizes: Sequence[float] = SIZES) -> None:
    assert [each.place.name for each in found] == [f"{size:g}" for size in sizes]
    for each, size in zip(found, sizes, strict=True):
        assert each.report.sparsity == pytest.approx(size, abs=0.03)  # of the dense model
        assert each.report.quality["dense"] == found[0].report.quality["dense"]
    assert all(stage.ok for stage in mptk.verify(found[-1].place))
    for larger, smaller in pairwise(found):
        require_nested(larger.plan, smaller.plan)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(draw_tokens(), use_cache=False).logits
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def digests(folders: Sequence[Path]) -> list[str]:
    files = [folder / name for folder in folders for name in ("model.safetensors", "plan.json")]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


# ---- what a ladder makes ----


def test_every_size_is_a_folder_of_its_own_and_its_units_are_the_larger_ones(trained: list[Pruned]) -> None:
    require_ladder(trained, TWO)
    for each in trained:
        loaded = AutoModelForCausalLM.from_pretrained(each.place, dtype=torch.float32)
        assert torch.equal(logits(loaded), logits(each.model))
        assert each.report.settings.steps == 2  # of four for two models
        assert each.report.recovery
    assert [each.report.settings.larger for each in trained[1:]] == [str(each.place) for each in trained[:-1]]


def test_units_that_are_gone_stay_gone_whatever_scores_them(llama: str, text: str, tmp_path: Path) -> None:
    asked = {**ASKED, "method": "random", "families": ("ffn", "q_heads"), "data": text}
    larger = mptk.prune(llama, tmp_path / "a", sparsity=0.2, seed=1, **asked)
    smaller = mptk.prune(llama, tmp_path / "b", sparsity=0.37, seed=2, larger=tmp_path / "a", **asked)
    require_nested(larger.plan, smaller.plan)


def test_masks_are_learned_among_the_units_that_are_left(llama: str, text: str, tmp_path: Path) -> None:
    learned = {**ASKED, "method": "maskprune", "steps": 10, "batch": 2, "teacher": "cached"}
    cache = tmp_path / "teacher"
    found = mptk.ladder(llama, tmp_path / "m", TWO, data=text, teacher_cache=cache, **learned)
    require_ladder(found, TWO)
    assert [next(s["stage"] for s in each.report.proof) for each in found] == ["learned masks"] * 2
    assert len(list(cache.iterdir())) == 1  # one teacher, the dense model


def test_biases_that_make_up_for_units_add_up(gpt2: str, text: str, tmp_path: Path) -> None:
    found = mptk.ladder(gpt2, tmp_path / "m", [0.1, 0.2], data=text, **{**ASKED, "method": "flap"})
    require_ladder(found, [0.1, 0.2])
    larger, smaller = (load_file(each.place / "compensation.safetensors") for each in found)
    assert larger.keys() <= smaller.keys()
    assert any(not torch.equal(larger[name], smaller[name]) for name in larger)


def test_a_ladder_of_a_model_with_fewer_tokens_and_kv_heads(text: str, tmp_path: Path) -> None:
    dense = testing.save_model(testing.make_llama(layers=2), tmp_path / "dense")
    asked = {**ASKED, "families": ("ffn",), "align": 4, "vocabulary": text, "kv_heads": 1, "steps": 2, "batch": 2}
    found = mptk.ladder(dense, tmp_path / "m", [0.2, 0.4], data=text, **asked)
    require_ladder(found, [0.2, 0.4])
    assert all(each.plan.conversions.keys() == {"vocabulary", "kv_heads"} for each in found)
    assert found[1].report.rows["kv_heads"]["kept"] == 1


def test_a_module_of_ones_own_has_a_ladder(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.ReLU(), torch.nn.Linear(20, 4))
    found = mptk.ladder(net, tmp_path / "m", [0.2, 0.5], example_inputs=torch.randn(8, 6), onnx=False, progress=None)
    require_nested(found[0].plan, found[1].plan)
    assert found[1].model(torch.randn(2, 6)).shape == (2, 4)
    assert found[1].report.sparsity == pytest.approx(0.5, abs=0.05)


# ---- what each size begins with ----


@pytest.mark.parametrize("families", [("ffn", "q_heads", "kv_groups"), ("hidden",)])
def test_units_are_chosen_from_what_the_larger_folder_computes(
    llama: str, text: str, tmp_path: Path, inside: Inside, families: tuple[str, ...]
) -> None:
    """The model in dense shapes that is scored and fitted has the larger folder's logits, and its module, too."""
    begun: list[Prepared] = []
    inside.spoil("mptk.run.prune.take_larger", lambda made: begun.append(made) or made)
    asked = {**ASKED, "families": families, "tolerance": 0.2, "data": text, "batch": 2, "steps": 2}
    mptk.prune(llama, tmp_path / "a", sparsity=0.3, **asked)
    mptk.prune(
        llama,
        tmp_path / "b",
        sparsity=0.5,
        larger=tmp_path / "a",
        **{**asked, "families": (*families, *{"ffn"} - {*families})},
    )
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32))
    dense = logits(LlamaForCausalLM.from_pretrained(llama))
    assert not torch.allclose(expected, dense, atol=1e-3)
    made = begun[-1]
    found = next(made.executor.run_programs([made.analysis.program], [[draw_tokens()]]))
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(logits(made.copy_model()), expected, atol=1e-5)
    assert torch.allclose(logits(made.copy_teacher()), dense, atol=1e-5)


def test_a_size_begins_with_the_trained_weights_of_the_larger_one(
    llama: str, text: str, trained: list[Pruned], tmp_path: Path
) -> None:
    larger = trained[0]
    asked = {**ASKED, "families": ("ffn",), "data": text, "larger": larger.place}
    smaller = mptk.prune(llama, tmp_path / "b", sparsity=0.3, **asked)
    (other,) = larger.plan.families.keys() - {"ffn"}
    assert smaller.plan.families[other] == larger.plan.families[other]  # not named, so as it was
    first, second, dense = (weights(place) for place in (larger.place, tmp_path / "b", Path(llama)))
    name = "model.layers.1.mlp.up_proj.weight"
    (before,), (after,) = (each.plan.families["ffn"].keep["model.layers.1.mlp"] for each in (larger, smaller))
    rows = [before.index(unit) for unit in after]
    assert torch.equal(second[name], first[name][rows])
    assert not torch.allclose(second[name], dense[name][list(after)], atol=1e-5)
    embedding = "model.embed_tokens.weight"
    assert torch.equal(second[embedding], first[embedding])


def test_each_size_trains_on_windows_of_its_own_and_is_measured_on_the_same(trained: list[Pruned]) -> None:
    first, second = (each.report for each in trained)
    assert [first.settings.seed, second.settings.seed] == [0, 1]
    assert first.data["training"]["inputs"] != second.data["training"]["inputs"]
    assert first.data["evaluation"] == second.data["evaluation"]


def test_the_dense_model_is_read_once(llama: str, text: str, tmp_path: Path, inside: Inside) -> None:
    names = ("mptk.run.prepare.trace_loaded", "mptk.run.prepare.check_data")
    calls = {name: inside.calls(name) for name in names}
    mptk.prune(llama, tmp_path / "one", sparsity=0.2, data=text, teacher="cached", **{**TRAINED, "steps": 2})
    once = {name: len(seen) for name, seen in calls.items()}
    assert all(once.values())
    mptk.ladder(llama, tmp_path / "m", TWO, data=text, teacher="cached", **TRAINED)
    assert {name: len(seen) for name, seen in calls.items()} == {name: 2 * count for name, count in once.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "one"]


# ---- stopped and resumed ----

WRITE, STEP = "mptk.targets.stock.write_checkpoint", "mptk.protocols.run_folder.RunFolder.save_checkpoint"


@pytest.mark.parametrize(("stop", "call"), [(STEP, 2), (WRITE, 2)])
def test_a_stopped_ladder_goes_on_with_the_size_that_was_interrupted(
    llama: str, text: str, trained: list[Pruned], tmp_path: Path, stop: str, call: int
) -> None:
    asked, out = {**TRAINED, "save_every": 1, "data": text}, tmp_path / "m"
    with changed() as inside:
        inside.stop(stop, call)
        with pytest.raises(Stopped):
            mptk.ladder(llama, out, TWO, **asked)
    finished = {place: place.stat().st_ino for place in out.glob("*") if (place / "report.json").is_file()}
    if (unfinished := list(out.glob("*.run"))) and not finished:
        with pytest.raises(MptkError, match="add resume=True to continue it"):
            mptk.ladder(llama, out, TWO, **asked)
    found = mptk.ladder(llama, out, TWO, resume=True, **asked)
    assert {place: place.stat().st_ino for place in finished} == finished
    unbroken = [each.place for each in trained]
    assert digests([each.place for each in found]) == digests(unbroken)
    assert [each.report.quality for each in found] == [each.report.quality for each in trained]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert len(unfinished) <= 1


def test_finished_sizes_stay_and_other_settings_are_refused(
    llama: str, text: str, trained: list[Pruned], tmp_path: Path, inside: Inside
) -> None:
    out = tmp_path / "m"
    shutil.copytree(trained[0].place.parent, out)
    shutil.rmtree(out / "0.2")
    inside.forbid("mptk.features.ladder.ladder.run_prune")
    shutil.copytree(out / "0.4", out / "0.2")
    with pytest.raises(MptkError, match=r"0.2 was made with other settings \(larger, seed, sparsity\)"):
        mptk.ladder(llama, out, TWO, data=text, resume=True, **TRAINED)
    place = trained[0].place.parent
    again = mptk.ladder(llama, place, TWO, data=text, resume=True, **TRAINED)
    assert [each.report.to_json() for each in again] == [each.report.to_json() for each in trained]
    with pytest.raises(MptkError, match=r"made with other settings \(learning\); give the same, or remove it"):
        mptk.ladder(llama, place, TWO, data=text, resume=True, **{**TRAINED, "steps": 9})


def test_a_size_is_repeated_from_its_report(trained: list[Pruned], tmp_path: Path) -> None:
    rows = repeat_run(trained[1].place, tmp_path / "again")
    assert rows is not None
    assert [row["what"] for row in rows if not row["same"]] == []


def test_a_size_is_trained_further(trained: list[Pruned], text: str, tmp_path: Path) -> None:
    more = {name: TRAINED[name] for name in ("length", "onnx", "eval_length", "eval_windows", "progress", "batch")}
    found = mptk.recover(trained[1].place, tmp_path / "more", data=text, steps=2, **more)
    assert found.plan.digest == trained[1].plan.digest
    assert all(stage.ok for stage in mptk.verify(tmp_path / "more"))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("sizes", "more", "said"),
    [
        ([0.4, 0.2], {}, r"ascend, each once; give 0.2,0.4"),
        ([0.2, 0.2], {}, r"ascend, each once"),
        ([0, 0.2], {}, r"lie above 0 and are at most 0.99"),
        ([0.2, 1.0], {}, r"lie above 0 and are at most 0.99"),
        ([0.2], {}, r"two sizes or more"),
        (SIZES, {"sparsity": 0.3}, r"leave out sparsity"),
        (SIZES, {"plan": "plan.json"}, r"leave out plan"),
        (SIZES, {"larger": "runs/a"}, r"leave out larger"),
        (SIZES, {"layers": "free", "target": "graph"}, r"leave out layers=\"free\""),
        (SIZES, {"steps": 2}, r"less than one for each of 3 models; give 3 or more"),
        ([0.2, 0.97], {}, r"no legal widths give sparsity 0.970"),
        (
            [0.2, 0.4],
            {"families": ("ffn", "q_heads")},
            r"no legal widths give sparsity 0.400; nearest: 0.429 with q_heads=1",
        ),
        ([0.3333, 0.6666], {"families": ("layers",)}, r"layers removes whole blocks; name other families"),
    ],
)
def test_what_is_no_ladder_is_refused_before_any_work(
    llama: str, text: str, tmp_path: Path, inside: Inside, sizes: list[float], more: dict[str, Any], said: str
) -> None:
    inside.forbid("mptk.run.prune.choose_units")
    with pytest.raises(MptkError, match=said) as raised:
        mptk.ladder(llama, tmp_path / "m", sizes, data=text, **{**ASKED, **more})
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_cut_further_is_refused(
    llama: str,
    gpt2: str,
    text: str,
    trained: list[Pruned],
    tmp_path: Path,
    inside: Inside,
) -> None:
    mptk.prune(llama, tmp_path / "depth", sparsity=0.3333, data=text, **{**ASKED, "families": ("layers",)})
    inside.forbid("mptk.run.prune.choose_units")
    asked = {**ASKED, "data": text, "sparsity": 0.5}
    for model, larger, more, said in (
        (gpt2, trained[0].place, {}, "was not pruned from this model"),
        (llama, tmp_path / "depth", {}, "cannot be cut further: layers removes whole blocks"),
        (llama, trained[0].place, {"widths": {"ffn": 80}}, "has only 72 units of ffn left; give a narrower widths"),
        (llama, trained[0].place, {"kv_heads": 1}, "with another vocabulary or other kv_heads"),
        (llama, tmp_path / "none", {}, "none"),
    ):
        with pytest.raises(MptkError, match=said):
            mptk.prune(model, tmp_path / "out", larger=larger, **{**asked, **more})
    with pytest.raises(MptkError, match="is what is read"):
        mptk.prune(llama, trained[0].place, larger=trained[0].place, **asked)


# ---- on the command line ----


def typed(*words: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, [str(word) for word in words])
    return found.exit_code, found.output if found.exception is None else f"{found.output}{found.exception}"


def test_the_command_makes_a_ladder_and_report_shows_it_side_by_side(llama: str, text: str, tmp_path: Path) -> None:
    options = "--method wanda --samples 4 --length 32 --align 8 --no-onnx --eval-length 32 --eval-windows 4"
    base = ["prune", llama, *options.split(), "--data", text, "--out", tmp_path / "m"]
    code, said = typed(*base, "--ladder", "20%,0.4,0.6")
    assert code == 0, said
    require_ladder([Pruned.open(tmp_path / "m" / f"{size}") for size in SIZES])
    shown = typed("report", tmp_path / "m")[1]
    for each in (said, shown):
        assert "3 pruned models side by side" in each
        assert [line.split()[1] for line in each.splitlines() if line.startswith("│ 0.")] == ["0.2", "0.4", "0.6"]
    page = tmp_path / "page.html"
    assert typed("report", tmp_path / "m", "--html", page)[0] == 0
    assert "0.4" in page.read_text()
    for option, value in (("--sparsity", "0.3"), ("--plan", "p.json"), ("--larger", "a")):
        code, said = typed(*base, "--ladder", "0.2,0.4", option, value)
        assert (code != 0, "leave out" in said) == (True, True), said
    assert "write a share" in typed(*base, "--ladder", "0.2,x")[1]


def test_ctrl_c_says_which_sizes_are_finished(llama: str, text: str, tmp_path: Path, inside: Inside) -> None:
    inside.stop(WRITE, 2, KeyboardInterrupt)
    options = "--method wanda --samples 4 --length 32 --align 8 --no-onnx --eval-length 32 --eval-windows 4"
    command = ["prune", llama, *options.split(), "--data", text, "--out", tmp_path / "m", "--ladder", "0.2,0.4"]
    said = typed(*command)[1]
    first, second = (str(tmp_path / "m" / size) for size in ("0.2", "0.4"))
    assert f"finished: {first}; nothing was published. {second}.run keeps the finished stages" in said


def test_an_estimate_adds_the_sizes_up(llama: str, text: str) -> None:
    settings = mptk.Settings(method="wanda", samples=4, length=32, data=text, onnx=False)
    single = estimate_run(llama, settings)
    found = estimate_ladder(llama, settings, SIZES)
    assert found.seconds["prove"] == pytest.approx(3 * single.seconds["prove"], rel=0.5)
    assert found.seconds["trace and analyse"] == single.seconds["trace and analyse"]
    assert single.output["checkpoint"] < found.output["checkpoint"] < 3 * single.output["checkpoint"] * 1.2
    assert found.does.startswith("3 models, each with")
