"""What a user changes in a ``Pruned`` is kept: weights that they trained are written, proven and measured; all else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from gguf import GGUFReader
from small_modules import Net
from torch import nn
from transformers import AutoModelForCausalLM

import mptk
from mptk import testing
from mptk.errors import ChangedError
from mptk.features.gguf.api import gguf
from mptk.testing import expect_error

SMALL: dict[str, Any] = {"method": "magnitude", "sparsity": 0.3, "align": 4, "samples": 4, "length": 24}
SMALL |= {"eval_windows": 3, "eval_length": 24, "progress": None}
X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(3))


def prune_net(out: Path | None = None, **options: Any) -> mptk.Pruned:
    return mptk.prune(Net().eval(), out, example_inputs=X, **{**SMALL, "align": 1, "tolerance": 0.2, **options})


def train(module: nn.Module, *inputs: Any, **named: Any) -> None:
    """Three steps that move every weight far."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        found = module(*inputs, **named)
        (found.loss if hasattr(found, "loss") else (found - 1).square().mean()).backward()
        optimizer.step()


OPENED = """
import sys, torch, mptk
folder, given, found = sys.argv[1:]
with torch.no_grad():
    torch.save(mptk.Pruned.open(folder).model(torch.load(given)), found)
"""


def test_a_trained_module_is_saved_and_a_new_process_opens_it(fresh, tmp_path):
    pruned = prune_net(onnx=False)
    before = pruned.report
    train(pruned.model, X)
    folder = pruned.save(tmp_path / "trained")
    expected = pruned.model(X).detach()
    given, found = tmp_path / "given.pt", tmp_path / "found.pt"
    torch.save(X, given)
    done = fresh.run(OPENED, folder, given, found)
    assert done.code == 0, done.err
    assert torch.allclose(torch.load(found), expected, atol=1e-6)
    report = mptk.Report.read(folder)
    assert report.weights_sha256 != before.weights_sha256
    assert set(report.trained) == {"up.weight", "up.bias", "down.weight", "down.bias"}
    assert report.quality["pruned"] > 0.5 > before.quality["pruned"]
    assert any("changed in memory after the proof of the cut" in note for note in report.notes)
    assert "changed in memory" in (folder / "README.md").read_text()
    assert all(row["ok"] for row in report.proof)
    assert all(d.ok for d in mptk.verify(folder, model=Net()))


def test_a_module_that_was_opened_is_trained_and_saved_without_its_dense_module(tmp_path):
    prune_net(tmp_path / "out")
    opened = mptk.Pruned.open(tmp_path / "out")
    train(opened.model, X)
    folder = opened.save(tmp_path / "trained")
    expected = opened.model(X).detach()
    assert torch.allclose(mptk.Pruned.open(folder).model(X), expected, atol=1e-6)
    mptk.export(opened, tmp_path / "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    assert torch.allclose(torch.tensor(session.run(None, {"x": X.numpy()})[0]), expected, atol=1e-5)
    report = mptk.Report.read(folder)
    assert report.quality == {}
    assert {"reloaded weights", "ONNX Runtime"} <= {row["stage"] for row in report.proof}
    assert (folder / "onnx" / "model.onnx").is_file()
    assert all(d.ok for d in mptk.verify(folder, model=Net()))


def test_a_trained_transformers_model_is_saved_measured_recovered_and_written_as_gguf(tmp_path):
    testing.make_llama(layers=1).save_pretrained(tmp_path / "dense")
    testing.make_tokenizer().save_pretrained(tmp_path / "dense")
    ids = torch.randint(3, 300, (6, 24))
    pruned = mptk.prune(tmp_path / "dense", tmp_path / "out", data=ids, eval_data=ids, onnx=False, **SMALL)
    first = mptk.evaluate(pruned, ids, length=24, progress=None)["model"]
    train(pruned.model, input_ids=ids, labels=ids)
    trained = mptk.evaluate(pruned, ids, length=24, progress=None)
    assert trained["model"] < 0.9 * first
    assert mptk.evaluate(mptk.Pruned.open(tmp_path / "out"), ids, length=24, progress=None)["model"] == pytest.approx(
        first
    )
    folder = pruned.save(tmp_path / "trained")
    assert mptk.evaluate(folder, ids, length=24, progress=None)["model"] == pytest.approx(trained["model"], rel=1e-4)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.lm_head.weight, pruned.model.lm_head.weight)
    assert all(d.ok for d in mptk.verify(folder))
    assert mptk.Report.read(folder).recovery == {}
    gguf(pruned, tmp_path / "trained.gguf")
    written = next(t for t in GGUFReader(tmp_path / "trained.gguf").tensors if t.name == "token_embd.weight")
    assert torch.equal(torch.tensor(written.data), pruned.model.lm_head.weight)
    opened = mptk.Pruned.open(tmp_path / "out")
    opened.model.load_state_dict(pruned.model.state_dict())
    again = mptk.recover(
        opened, tmp_path / "recovered", data=ids, steps=1, lr=1e-9, batch=2, length=24, onnx=False, progress=None
    )
    assert mptk.evaluate(again, ids, length=24, progress=None)["model"] == pytest.approx(trained["model"], rel=1e-2)


def test_adapters_must_be_merged_first_and_no_path_of_a_temporary_folder_is_in_a_result(tmp_path):
    from peft import LoraConfig, get_peft_model

    pruned = mptk.prune(testing.make_llama(layers=1), data=torch.randint(3, 300, (4, 24)), onnx=False, **SMALL)
    place = str(pruned.place)
    adapted = get_peft_model(pruned.model, LoraConfig(target_modules=["q_proj"]))
    with expect_error(ChangedError):
        pruned.save(tmp_path / "out")
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload()
    adapter = (tmp_path / "adapter" / "adapter_config.json").read_text()
    for said in (pruned.model.name_or_path, pruned.model.config.name_or_path, adapter):
        assert place not in said
        assert "/tmp/" not in said
    with torch.no_grad():
        pruned.model.lm_head.weight.mul_(2)
    folder = pruned.save(tmp_path / "out")
    texts = [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
    assert not any(str(name).encode() in text for text in texts for name in (place, pruned.proven))
