"""A ladder whose sizes share one set of weights: one folder, of which each smaller size is a slice with weights of its own."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from commands import done
from inside import Stopped
from ladders import ASKED, OPTIONS, SIZES, TRAINED, TWO, digest_folders, read_logits, require_nested
from safetensors.torch import load_file, save_file
from stops import stop_at
from transformers import AutoModelForCausalLM

import mptk
from mptk import Pruned, testing
from mptk.config import Training
from mptk.distributed.processes import make_accelerator
from mptk.errors import ChangedError, FileError, InputError, OutputError, ProofError
from mptk.features.ladder.rungs import list_rung_sizes
from mptk.features.ladder.slices import open_file_weights, restore_file, slice_weight, write_part
from mptk.features.ladder.together import Together
from mptk.features.rerun.api import repeat_run
from mptk.ir import make_token_samples
from mptk.methods.maskprune.losses import compute_class_losses
from mptk.methods.maskprune.train import Loop
from mptk.protocols import RunFolder
from mptk.publish.manifest import check_manifest, hash_file, write_manifest
from mptk.tasks import CAUSAL_LM
from mptk.testing import expect_error

SHARED = {**TRAINED, "steps": 30, "save_every": 3, "lr": 1e-2, "shared": True}
OWN = ("o_proj", "down_proj")
"""What reconstruction fits to a size."""


@pytest.fixture
def shared(llama, text, laboratory):
    """The largest model's folder with its rungs, and the folders of the smaller ones that the call gave."""

    def make(root):
        for each in mptk.ladder(llama, root / "m", SIZES, data=text, **SHARED)[1:]:
            shutil.copytree(each.place, root / f"{each.report.settings.sparsity:g}")

    place = laboratory.keep("ladders/shared", make)
    return [Pruned.open(place / name) for name in ("m", "0.4", "0.6")]


def metrics(place: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


# ---- what it makes ----


def test_the_folder_is_the_largest_model_and_each_smaller_one_is_made_of_it(shared, tmp_path):
    largest, *smaller = shared
    place = largest.place
    assert sorted(path.name for path in (place / "rungs").iterdir()) == ["0.4", "0.6"]
    for each, size in zip(shared, SIZES, strict=True):
        assert each.report.sparsity == pytest.approx(size, abs=0.03)
        assert each.report.settings.steps == 10  # of 30 for three
        loaded = AutoModelForCausalLM.from_pretrained(each.place, dtype=torch.float32)
        assert torch.equal(read_logits(loaded), read_logits(each.model))
        # Compared with the outputs that this size had in training.
        assert [row["ok"] for row in each.report.proof if row["stage"] == "trained model"] == [True]
    for one, other in zip(shared, smaller, strict=False):
        require_nested(one.plan, other.plan)
    assert all(stage.ok for each in (largest, smaller[-1]) for stage in mptk.verify(each.place))
    for each, size in zip(smaller, SIZES[1:], strict=True):
        made = mptk.rung(place, size, tmp_path / f"{size}")
        assert made.folder == tmp_path / f"{size}"
        assert digest_folders([made.place]) == digest_folders([each.place])
        kept = place / "rungs" / f"{size}"
        assert (made.place / "mptk.json").read_bytes() == (kept / "mptk.json").read_bytes()
        assert (kept / "model.safetensors.part").stat().st_size < (made.place / "model.safetensors").stat().st_size / 2
        assert not (kept / "tokenizer.json").exists(), "it is as the largest model's"


def test_all_weights_but_the_fitted_ones_are_slices_of_the_largest_models(shared):
    first, *others = (load_file(each.place / "model.safetensors") for each in shared)
    for size, weights in zip(SIZES[1:], others, strict=True):
        stored = load_file(shared[0].place / "rungs" / f"{size}" / "model.safetensors.part")
        own = {name for name in stored if "@" not in name}
        assert own
        assert all(any(part in name for part in OWN) for name in own)
        for name in weights.keys() - own:
            at = [stored[f"{name}@{d}"].long() for d in range(weights[name].ndim)]
            every = [rows if len(rows) else torch.arange(n) for rows, n in zip(at, first[name].shape, strict=True)]
            assert torch.equal(first[name][torch.meshgrid(*every, indexing="ij")], weights[name]), name


def test_training_makes_every_size_better(shared, llama, text, tmp_path):
    untrained = mptk.ladder(llama, tmp_path / "m", SIZES, data=text, **{**SHARED, "steps": 0})
    for before, after in zip(untrained, shared, strict=True):
        assert before.plan.digest == after.plan.digest
        assert after.report.quality["pruned"] < 0.85 * before.report.quality["pruned"]
    for row in metrics(shared[0].place):
        assert row["loss"] == pytest.approx(sum(row[f"loss of size {size}"] for size in (1, 2, 3)), rel=1e-4)
    watched = shared[0].report.recovery
    assert watched["metric"] == "training loss, added up over the sizes"
    assert watched["losses"]["10"] < watched["losses"]["0"]
    assert watched == shared[2].report.recovery


@pytest.mark.parametrize(
    "more", [{"hidden_loss": 1.0, "dtype": "bfloat16", "max_shard_size": 30_000}, {"steps": 0, "reconstruct": False}]
)
def test_it_goes_with_other_settings(llama, text, tmp_path, more):
    found = mptk.ladder(llama, tmp_path / "m", TWO, data=text, **{**SHARED, "steps": 4, **more})
    assert all(stage.ok for stage in mptk.verify(found[-1].place))
    if "reconstruct" in more:
        assert all("@" in name for name in load_file(tmp_path / "m/rungs/0.4/model.safetensors.part"))


def test_experts(text, tmp_path):
    """In half precision, by a teacher that ran once."""
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "num_local_experts": 3}
    model = testing.make_decoder("mixtral", **sizes, vocab_size=300, max_position_embeddings=256)
    dense = testing.save_model(model, tmp_path / "experts")
    asked = {**SHARED, "steps": 2, "families": ("ffn",), "align": 4}
    asked |= {"precision": "bf16", "teacher": "cached", "micro": 1}
    found = mptk.ladder(dense, tmp_path / "e", [0.176, 0.352], data=text, **asked)
    assert all(stage.ok for stage in mptk.verify(found[-1].place))


def test_a_stopped_run_goes_on_to_the_same_weights(llama, text, shared, tmp_path):
    """Stopped during training, and again after the largest model was proven."""
    out = tmp_path / "m"
    stops = [[("recovery", 5)], ["prove", "write stock"]]
    for count, stop in enumerate(stops):
        with pytest.raises(Stopped):
            mptk.ladder(llama, out, SIZES, data=text, resume=bool(count), **{**SHARED, "progress": stop_at(*stop)})
        assert not out.exists()
    with expect_error(OutputError, name=tmp_path / "m.run"):
        mptk.ladder(llama, out, SIZES, data=text, **SHARED)
    found = mptk.ladder(llama, out, SIZES, data=text, resume=True, **SHARED)
    places = [each.place for each in found]
    assert digest_folders(places) == digest_folders([each.place for each in shared])
    assert [row["loss"] for row in metrics(out)] == [row["loss"] for row in metrics(shared[0].place)]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_its_recipe_repeats_it(shared, tmp_path):
    place = shared[0].place
    done("prune", "--config", place / "run.yaml", "--out", tmp_path / "again")
    assert digest_folders([tmp_path / "again"]) == digest_folders([place])
    one, other = (hash_file(folder / "rungs/0.6/model.safetensors.part") for folder in (place, tmp_path / "again"))
    assert one == other
    with expect_error(FileError, name=place):
        repeat_run(place, tmp_path / "rerun")


def test_the_commands(llama, text, tmp_path):
    place, small = tmp_path / "m", tmp_path / "small"
    asked = [*OPTIONS, "--ladder", "20%,0.4", "--shared", "--steps", 2, "--batch", 2]
    said = done("prune", llama, "--data", text, "--out", place, *asked).output
    for each in (said, done("report", place).output, done("rung", place).output):
        rows = [line.split()[1] for line in each.splitlines() if line.startswith(("│ 0.", "│ m "))]
        assert rows == ["m", "0.4"]
    done("rung", place, "40%", "--out", small)
    done("verify", small)
    done("report", place, "--html", tmp_path / "page.html")


# ---- what is refused ----


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"rank": 4}, "rank"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing"),
        ({"steps": 1}, "steps"),
        ({"families": ("hidden", "ffn"), "tolerance": 0.2}, "shared"),
    ],
)
def test_what_cannot_share_is_refused_before_any_work(llama, text, tmp_path, more, name):
    with expect_error(InputError, name=name):
        mptk.ladder(llama, tmp_path / "m", TWO, data=text, **{**SHARED, **more, "progress": stop_at("score (wanda)")})
    assert list(tmp_path.iterdir()) == []


def test_one_size_is_trained_alone(text, tmp_path, shared):
    more = {name: ASKED[name] for name in ("length", "onnx", "eval_length", "eval_windows", "progress")}
    found = mptk.recover(shared[1].place, tmp_path / "more", data=text, steps=2, batch=2, **more)
    assert not found.report.settings.shared


def test_a_size_that_is_not_there_and_folders_that_changed(shared, tmp_path):
    place = tmp_path / "m"
    shutil.copytree(shared[0].place, place)
    for use in (mptk.verify, mptk.evaluate):  # it is not written yet
        with expect_error(FileError, name=place / "rungs" / "0.4"):
            use(place / "rungs" / "0.4")
    with expect_error(InputError, name="size", nearest=["0.4", "0.6"]):
        mptk.rung(place, 0.3, tmp_path / "small")
    with expect_error(OutputError, name=place):
        mptk.rung(place, 0.4, place)
    with expect_error(FileError, name=shared[1].place):
        mptk.rung(shared[1].place, 0.4, tmp_path / "small")
    part = place / "rungs/0.4/model.safetensors.part"
    stored = load_file(part)
    name = next(name for name in stored if "@" not in name)
    save_file({**stored, name: stored[name] + 1}, part, {"format": "pt"})
    with expect_error(ChangedError, name="rungs/0.4/model.safetensors.part"):
        mptk.rung(place, 0.4, tmp_path / "small")
    write_manifest(place)
    with expect_error(ProofError, name="model.safetensors"):
        mptk.rung(place, 0.4, tmp_path / "small")
    (place / "rungs/0.4/config.json").unlink()
    write_manifest(place)
    with expect_error(ProofError, name="config.json"):
        mptk.rung(place, 0.4, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_sizes_are_listed_by_number_the_largest_model_first(tmp_path):
    for name in ("0.5", "0.35", "0.123", "0.4", "1e-05", "mine"):
        (tmp_path / "rungs" / name).mkdir(parents=True)
        (tmp_path / "rungs" / name / "mptk.json").touch()
    assert list_rung_sizes(tmp_path) == ["1e-05", "0.123", "0.35", "0.4", "0.5", "mine"]


def test_names_in_a_manifest_lead_nowhere(shared, tmp_path):
    place, secret = tmp_path / "m", tmp_path / "secret"
    shutil.copytree(shared[0].place, place)
    secret.write_text("secret")
    manifest = place / "rungs/0.4/mptk.json"
    content = json.loads(manifest.read_text())
    content["files"]["../../../secret"] = hash_file(secret)
    manifest.write_text(json.dumps(content))
    write_manifest(place)
    with expect_error(FileError, name="../../../secret"):
        mptk.rung(place, 0.4, tmp_path / "small")
    check_manifest(place)


def linear(rows: int, scale: float = 1.0) -> torch.nn.Module:
    """The first ``rows`` hidden units of one module; ``scale`` changes the second layer."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    first, second = torch.nn.Linear(4, rows), torch.nn.Linear(rows, 3)
    with torch.no_grad():
        first.weight.copy_(module[0].weight[:rows])
        first.bias.copy_(module[0].bias[:rows])
        second.weight.copy_(scale * module[1].weight[:, :rows])
        second.bias.copy_(module[1].bias)
    return Takes(first, second)


class Takes(torch.nn.Module):
    """Two layers; it takes ids, of which its first layer gets numbers."""

    def __init__(self, first: torch.nn.Linear, second: torch.nn.Linear) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        x = torch.nn.functional.one_hot(input_ids % 4, 4).float()
        return (self.second(self.first(x)),)


def places_of(rows: int) -> dict[str, list[torch.Tensor]]:
    kept = torch.arange(rows)
    return {"first.weight": [kept, torch.arange(4)], "first.bias": [kept], "second.weight": [torch.arange(3), kept]}


def test_a_step_adds_up_the_gradients_of_all_sizes_of_which_the_smaller_imitate_the_largest(tmp_path):
    together = Together([(linear(6), places_of(6)), (linear(5), places_of(5)), (linear(4, 2.0), places_of(4))])
    assert [sorted(own) for own in together.own[1:]] == [[], ["second.weight"]]
    assert [tuple(p.shape) for n, p in together.named_parameters() if p.requires_grad and "2." in n] == [(3, 4)]
    assert sum(p.numel() for p in together.sizes[1].parameters()) == 0
    windows = make_token_samples(torch.arange(24).view(4, 6) % 3)
    teacher = torch.randn(4, 6, 3)
    training = Training(batch=4, micro=4, lr=1e-2, clip=1e9)
    folder = RunFolder(tmp_path / "m", {}, resume=True)
    given = (together, lambda samples: (teacher, None), CAUSAL_LM, windows, 1, training, "recovery", folder)
    one = Loop(make_accelerator("no"), *given, sizes=together.views)
    one.optimizer.step = one.optimizer.zero_grad = lambda: None
    metrics, _ = one._step(0)
    wanted = Together([(linear(6), places_of(6)), (linear(5), places_of(5)), (linear(4, 2.0), places_of(4))])
    own, target = windows[one.pick_rows(0)], teacher
    for size, view in enumerate(wanted.views):
        (logits,) = view(**own.inputs)
        loss = compute_class_losses(logits, own.targets, target, training.losses)["loss"]
        loss.backward()
        assert metrics[f"loss of size {size + 1}"] == pytest.approx(float(loss), rel=1e-5)
        target = logits.detach() if not size else target
    for name, parameter in wanted.named_parameters():
        found = dict(together.named_parameters())[name]
        if parameter.requires_grad:
            assert torch.allclose(found.grad, parameter.grad, atol=1e-6), name
            assert parameter.grad.abs().max() > 0
        else:
            assert found.grad is None


def test_a_file_is_restored_bit_for_bit_and_a_damaged_part_is_refused(tmp_path):
    wide = {"a": torch.randn(5, 7), "b": torch.randn(3), "c": torch.tensor(2.0), "d": torch.tensor([math.nan, -0.0])}
    rows, columns = torch.tensor([0, 2, 4]), torch.tensor([1, 2, 6])
    narrow = wide | {"a": wide["a"][rows][:, columns].contiguous(), "b": torch.randn(3)}
    save_file(wide, tmp_path / "wide.safetensors", {"format": "pt"})
    save_file(narrow, tmp_path / "narrow.safetensors", {"format": "pt"})
    larger = open_file_weights([tmp_path / "wide.safetensors"])
    write_part(tmp_path / "narrow.safetensors", larger, {"a": [rows, columns]}, tmp_path / "part")
    assert load_file(tmp_path / "part").keys() == {"a@0", "a@1", "b", "c", "d@0"}
    restore_file(tmp_path / "part", larger, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "narrow.safetensors").read_bytes()
    assert slice_weight(wide["a"], []) is wide["a"]
    stored = load_file(tmp_path / "part")
    wrong = [rows.int() + 3, rows.int() - 1, rows, rows.int()[None]]
    for key, tensor in [*(("a@0", each) for each in wrong), *((key, rows.int()) for key in ("a@2", "a@x", "z@0"))]:
        save_file({**stored, key: tensor}, tmp_path / "damaged")
        with expect_error(FileError):
            restore_file(tmp_path / "damaged", larger, tmp_path / "out")
    (tmp_path / "damaged").write_bytes(b"no")
    with expect_error(FileError):
        restore_file(tmp_path / "damaged", larger, tmp_path / "out")
    assert not (tmp_path / "out").exists()
