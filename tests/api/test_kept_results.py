"""A ``Pruned`` loses no work: what it cannot keep is refused by name in every use, and no damaged result is passed on."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_modules import Net
from torch import nn

import mptk
from mptk import testing
from mptk.errors import ChangedError, FileError, InputError, OutputError
from mptk.features.gguf.api import gguf
from mptk.publish.manifest import check_manifest, hash_weight_files, write_manifest
from mptk.testing import expect_error

X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(3))
IDS = torch.randint(3, 300, (6, 24), generator=torch.Generator().manual_seed(1))
SMALL: dict[str, Any] = {"method": "magnitude", "sparsity": 0.3, "align": 4, "samples": 4, "length": 24}
SMALL |= {"eval_windows": 3, "eval_length": 24, "progress": None, "tolerance": 1.0, "onnx": False}


def prune_net(out: Path | str | None = None, **keywords: Any) -> mptk.Pruned:
    model = keywords.pop("model", None) or Net().eval()
    return mptk.prune(model, out, example_inputs=X, **{**SMALL, "align": 1, **keywords})


def measure_net(pruned: mptk.Pruned | Path) -> dict[str, Any]:
    return mptk.evaluate(pruned, X, progress=None)


@pytest.fixture(scope="module")
def dense(laboratory):
    """A decoder whose embedding and head are one weight."""
    return laboratory.keep("kept/tied", lambda folder: testing.save_model(testing.make_llama(), folder))


@pytest.fixture(scope="module")
def first(dense, laboratory):
    return laboratory.keep("kept/pruned", lambda out: mptk.prune(dense, out, data=IDS, **SMALL))


@pytest.fixture
def folder(first, tmp_path):
    """A pruned decoder of this test's own."""
    shutil.copytree(first, tmp_path / "pruned")
    return tmp_path / "pruned"


@pytest.fixture
def elsewhere(tmp_path, go_to):
    """A folder that is the current one; the test leaves it."""
    (tmp_path / "here").mkdir()
    go_to(tmp_path / "here")
    return tmp_path / "here"


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 0x10
    file.write_bytes(content)


def uses(pruned: mptk.Pruned, place: Path) -> dict[str, Callable[[], object]]:
    training = {"data": IDS, "steps": 1, "batch": 2, "length": 24, "onnx": False, "progress": None}
    return {
        "evaluate": lambda: mptk.evaluate(pruned, IDS, length=24, progress=None),
        "generate": lambda: mptk.generate(pruned, "the cat", max_new_tokens=2),
        "recover": lambda: mptk.recover(pruned, **training),
        "export": lambda: mptk.export(pruned, place / "onnx"),
        "gguf": lambda: gguf(pruned, place / "small.gguf"),
        "save": lambda: pruned.save(place / "copy"),
    }


def put(path: str, name: str, value: Callable[[Any], object]) -> Callable[[mptk.Pruned], object]:
    """Sets an attribute of a part of the model to what is made of the earlier one."""

    def change(pruned: mptk.Pruned) -> None:
        part = pruned.model.get_submodule(path)
        setattr(part, name, value(getattr(part, name)))

    return change


def put_tokenizer(pruned: mptk.Pruned) -> None:
    tokenizer = testing.make_tokenizer()
    tokenizer.add_tokens(["mine"])
    pruned.tokenizer = tokenizer


WHOLE = nn.Parameter(torch.ones(48, dtype=torch.int8), requires_grad=False)
CHANGES: dict[str, tuple[Callable[[mptk.Pruned], object], str]] = {
    "tokens are added": (lambda p: p.tokenizer.add_tokens(["mine"]), "tokenizer"),
    "a chat template": (lambda p: setattr(p.tokenizer, "chat_template", "{{ messages }}"), "tokenizer"),
    "another tokenizer": (put_tokenizer, "tokenizer"),
    "a field of the config": (lambda p: setattr(p.model.config, "rms_norm_eps", 0.5), "config"),
    "a field of generation": (lambda p: setattr(p.model.generation_config, "max_new_tokens", 3), "generation_config"),
    "another activation": (put("model.layers.0.mlp", "act_fn", lambda _: nn.Tanh()), "model.layers.0.mlp.act_fn"),
    "an attribute of a part": (put("model.layers.0.self_attn", "scaling", lambda _: 5.0), "model.layers.0.self_attn"),
    "a buffer": (lambda p: p.model.model.rotary_emb.inv_freq.mul_(3), "model.rotary_emb.inv_freq"),
    "an untied weight": (put("lm_head", "weight", lambda w: nn.Parameter(w.detach() * 3)), "model.embed_tokens.weight"),
    "another shape": (put("model.norm", "weight", lambda _: nn.Parameter(torch.ones(3))), "model.norm.weight"),
    "whole numbers": (put("model.norm", "weight", lambda _: WHOLE), "model.norm.weight"),
    "no numbers": (lambda p: p.model.to("meta"), "model.embed_tokens.weight"),
    "another model": (lambda p: setattr(p, "model", testing.make_llama()), "model.layers.0.mlp.gate_proj.weight"),
    "a note in the report": (lambda p: p.report.notes.append("mine"), "report"),
    "no report": (lambda p: setattr(p, "report", None), "report"),
    "no plan": (lambda p: delattr(p, "plan"), "plan"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_no_folder_holds_is_refused_by_the_same_name_in_every_use(change, first, tmp_path):
    pruned = mptk.Pruned.open(first)
    make, name = CHANGES[change]
    _ = pruned.model
    make(pruned)
    for call in uses(pruned, tmp_path).values():
        with expect_error(ChangedError, name=name) as told:
            call()
        assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_what_changes_no_result_is_no_change(first, tmp_path):
    pruned = mptk.Pruned.open(first)
    assert pruned.tokenizer is pruned.tokenizer
    pruned.tokenizer(["a", "the cat"], truncation=True, max_length=3, padding=True)
    pruned.model.train()
    pruned.model.requires_grad_(False)
    pruned.model.config.use_cache = False
    mptk.generate(pruned, "the cat", max_new_tokens=2)
    assert pruned.model.training
    assert hash_weight_files(pruned.save(tmp_path / "copy")) == hash_weight_files(first)
    with expect_error(InputError, name="model"):
        pruned.model = "x"  # type: ignore[assignment]
    with expect_error(InputError, name="tokenizer"):
        pruned.tokenizer = None


def test_a_converted_model_counts_with_its_numbers_everywhere(tmp_path):
    pruned = prune_net()
    exact = measure_net(pruned)["model"]
    pruned.model.half()
    halved = measure_net(pruned)["model"]
    assert halved != exact
    mptk.export(pruned, tmp_path / "onnx")
    opened = mptk.Pruned.open(pruned.save(tmp_path / "copy"))
    saved = mptk.evaluate(opened, X, dense=Net().eval(), example_inputs=X, progress=None)["model"]
    assert saved == pytest.approx(halved, rel=1e-6)
    other = prune_net()
    other.model.double()
    mptk.export(other, tmp_path / "double")
    assert measure_net(other)["model"] == pytest.approx(exact, rel=1e-6)


def test_a_dense_model_that_changed_is_no_reference(dense, tmp_path):
    module = Net().eval()
    pruned = prune_net(model=module)
    with torch.no_grad():
        module.up.weight.mul_(3)
    with expect_error(ChangedError, name="the model's weights"):
        measure_net(pruned)
    assert pruned.save(tmp_path / "as it was").is_dir()
    with torch.no_grad():
        pruned.model.get_parameter("up.weight").mul_(2)
    with expect_error(ChangedError, name="the model's weights"):
        pruned.save(tmp_path / "trained")

    tokenizer, model = testing.make_tokenizer(), testing.make_llama()
    decoder = mptk.prune(model, data=IDS, tokenizer=tokenizer, **SMALL)
    calls = uses(decoder, tmp_path)
    tokenizer.add_tokens(["mine"])
    for use in ("evaluate", "recover", "generate"):
        with expect_error(ChangedError, name="the tokenizer"):
            calls[use]()
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    with expect_error(ChangedError, name="the model's weights, the tokenizer"):
        calls["recover"]()

    shutil.copytree(dense, tmp_path / "dense")
    named = mptk.prune(tmp_path / "dense", data=IDS, **SMALL)
    flip_bit(tmp_path / "dense" / "model.safetensors")
    with expect_error(ChangedError, name="the model's model.safetensors"):
        uses(named, tmp_path)["evaluate"]()


def test_a_result_whose_files_went_or_were_damaged_is_not_passed_on(folder, tmp_path):
    cleaned = prune_net()
    (cleaned.proven / "model.safetensors").unlink()
    for call in (lambda: cleaned.model, lambda: measure_net(cleaned), lambda: cleaned.save(tmp_path / "copy")):
        with expect_error(ChangedError, name="model.safetensors"):
            call()
    gone = prune_net()
    shutil.rmtree(gone.proven)
    with expect_error(FileError, name=gone.proven):
        gone.save(tmp_path / "copy")
    opened = mptk.Pruned.open(folder)
    flip_bit(folder / "model.safetensors")
    for call in uses(opened, tmp_path).values():
        with expect_error(ChangedError, name="model.safetensors"):
            call()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["pruned"]


def test_a_folder_without_the_weights_of_its_report_is_refused(folder):
    (folder / "model.safetensors").unlink()
    write_manifest(folder)  # as an earlier mptk did when it saved a result whose weights were gone
    for call in (lambda: mptk.Pruned.open(folder), lambda: check_manifest(folder)):
        with expect_error(ChangedError, name="report.json"):
            call()


def test_only_what_was_proven_is_copied_and_another_result_is_not_taken_for_it(folder, tmp_path):
    opened = mptk.Pruned.open(folder)
    (folder / "notes.txt").write_text("mine")
    copied = opened.save(tmp_path / "copy")
    check_manifest(copied)
    assert not (copied / "notes.txt").exists()
    with expect_error(OutputError, name=folder / "inside"):
        opened.save(folder / "inside")
    prune_net(folder, overwrite=True)
    with expect_error(ChangedError, name=folder):
        uses(opened, tmp_path)["evaluate"]()


def test_relative_names_hold_when_the_current_folder_changes(dense, elsewhere, go_to):
    shutil.copytree(dense, "m")
    Path("t.txt").write_text("the cat sat on the mat and went home again. " * 200)
    pruned = mptk.prune("m", "small", data="t.txt", **SMALL)
    opened = mptk.Pruned.open("small", model="m")
    go_to("/")
    assert pruned.folder == elsewhere / "small"
    assert pruned.report.settings.data == "t.txt"
    with torch.no_grad():
        for each in (pruned, opened):
            each.model.lm_head.weight.mul_(2)
    calls = uses(pruned, elsewhere)
    measured = calls["evaluate"]()
    assert mptk.evaluate(calls["save"](), IDS, length=24, progress=None)["model"] == pytest.approx(measured["model"])
    assert mptk.Report.read(elsewhere / "copy").settings.data == "t.txt"
    calls["recover"]()
    assert opened.save(elsewhere / "opened").is_dir()

    go_to(elsewhere)
    prune_net("later", progress=lambda *_: os.chdir("/"))
    assert (elsewhere / "later" / "report.json").is_file()


def test_a_copy_and_a_pickle_say_what_to_do_instead():
    pruned = prune_net()
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with expect_error(InputError):
            make(pruned)
    analysis = mptk.analyze(Net(), (X,))
    assert copy.deepcopy(analysis).families == analysis.families


def test_calls_of_three_threads_take_turns(dense, first):
    nets = [Net().eval() for _ in range(3)]
    pruned = mptk.Pruned.open(first)
    found: list[object] = []

    def work(net: nn.Module) -> None:
        found.append(hash_weight_files(prune_net(model=net).proven))
        found.append(sum(p.numel() for p in mptk.load(str(dense)).model.parameters()))
        found.append(id(pruned.model))

    threads = [threading.Thread(target=work, args=(net,)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {
        hash_weight_files(prune_net().proven),
        sum(p.numel() for p in testing.make_llama().parameters()),
        id(pruned.model),
    }
    assert len(found) == 9
    assert set(found) == expected


def test_what_the_caller_set_in_torch_does_not_count(first):
    before = measure_net(prune_net())["model"]
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        with torch.device("cpu"):
            net = Net().eval()
        assert measure_net(prune_net(model=net))["model"] == before
    with torch.inference_mode():
        assert measure_net(prune_net())["model"] == before  # its weights are tensors of inference mode
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.no_grad():
            recovered = mptk.recover(
                first, data=IDS.int(), steps=1, lr=1e-9, batch=2, length=24, onnx=False, progress=None
            )
        assert torch.get_default_dtype() is torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(row["ok"] for row in recovered.report.proof)


def test_a_graph_with_its_tokenizer_beside_it_writes_text(tmp_path):
    mptk.export(testing.make_llama(), tmp_path / "onnx", tokenizer=testing.make_tokenizer())
    assert len(mptk.generate(tmp_path / "onnx", "the cat", max_new_tokens=2)) == 1
