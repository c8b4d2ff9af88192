"""``--inputs``: models that read neither text, images nor sound as mptk makes them, from a file of their inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from commands import done
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, EuroBertConfig, EuroBertModel, XLNetConfig, XLNetLMHeadModel

import mptk
from mptk.errors import DataError, FileError, InputError
from mptk.testing import expect_error

IDS = torch.arange(24 * 6).reshape(24, 6) % 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense XLNet, which looks at later tokens, and its inputs: a few to trace with, more to calibrate on."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("xlnet")
    config = XLNetConfig(vocab_size=41, d_model=24, n_head=3, d_head=8, d_inner=40, n_layer=2)
    XLNetLMHeadModel(config).save_pretrained(place / "dense")
    save_file({"input_ids": IDS[:2]}, place / "inputs.safetensors")
    save_file({"input_ids": IDS, "labels": IDS + 1}, place / "more.safetensors")
    return place


def said(*words: object) -> str:
    return done(*words).output


@pytest.mark.features
def test_the_command_line_prunes_what_no_task_takes(folder):
    dense, small, inputs, more = (folder / n for n in ("dense", "small", "inputs.safetensors", "more.safetensors"))
    assert "ffn" in said("analyze", dense, "--inputs", inputs, "--json", folder / "analysis.json")
    cut = ["--method", "wanda", "--families", "ffn.3", "--width", "ffn.3=28", "--align", 4]
    once = [*cut, "--samples", 8, "--eval-windows", 5]
    said("prune", dense, "--inputs", inputs, "--data", more, "--eval-data", more, "--out", small, *once)
    report = mptk.Report.read(small)
    assert (report.task, report.quality["metric"]) == ("module", "distance")
    assert report.quality["protocol"].startswith(f"{more}: mean over 5 samples")
    assert "ONNX Runtime" in {row["stage"] for row in report.proof}
    assert "ONNX Runtime" in said("verify", small)
    assert "distance" in said("eval", small, "--data", more)
    said("rerun", small, "--out", folder / "again")
    assert mptk.Report.read(folder / "again").weights_sha256 == report.weights_sha256
    loaded = AutoModelForCausalLM.from_pretrained(small)
    found = mptk.prune(str(dense), plan=str(small / "plan.json"), inputs=str(inputs), progress=None)
    torch.testing.assert_close(loaded(IDS).logits, found.model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_masks_are_learned_on_it(folder):
    learned = {"steps": 2, "batch": 2, "samples": 4, "align": 4, "families": ("ffn.3",), "mask_share": 0.5}
    given = {"inputs": str(folder / "inputs.safetensors"), "data": str(folder / "more.safetensors")}
    found = mptk.prune(str(folder / "dense"), sparsity=0.2, progress=None, **learned, **given)
    assert found.report.settings.steps == 2
    assert found.report.families["ffn.3"]["width"] < 40


@pytest.mark.features
def test_what_is_no_such_file_is_refused(folder, tmp_path):
    dense, inputs = str(folder / "dense"), str(folder / "inputs.safetensors")
    for name, value in {"data": "book.txt", "eval_data": "self", "vocabulary": "book.txt"}.items():
        with expect_error(InputError, name=name):
            mptk.prune(dense, inputs=inputs, method="wanda", progress=None, **{name: value})
    wrong = tmp_path / "no.safetensors"
    wrong.write_text("none")
    with expect_error(FileError, name=wrong):
        mptk.prune(dense, inputs=str(wrong), method="wanda", progress=None)
    with expect_error(InputError, name="example_inputs"):
        mptk.prune(dense, inputs=inputs, example_inputs=IDS, method="wanda", progress=None)
    for tensors in ({"input_ids": IDS, "labels": IDS[:3] + 1}, {"words": IDS}):
        save_file(tensors, wrong)
        with expect_error(DataError):
            mptk.prune(dense, inputs=inputs, data=str(wrong), method="wanda", progress=None)


class Gated(nn.Module):
    """Takes an input that its signature does not name, and names it before another in the alphabet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(8, 24), nn.Linear(6, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor, **others: Any) -> Tensor:
        return self.last(self.first(x).relu() * self.gate(others["a"]))


def test_inputs_that_the_signature_does_not_name_are_proven_again(tmp_path):
    net, inputs = Gated().eval(), {"x": torch.randn(4, 8), "a": torch.randn(4, 6)}
    how = {"sparsity": 0.3, "tolerance": 0.1, "method": "wanda", "align": 4, "progress": None}
    mptk.prune(net, tmp_path / "small", example_inputs=inputs, **how)
    assert mptk.verify(tmp_path / "small", model=net)


def test_rotary_angles_that_all_rows_share_run_in_onnx(tmp_path):
    size = {"vocab_size": 41, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40}
    model = EuroBertModel(EuroBertConfig(**size, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    how = {"sparsity": 0.2, "tolerance": 0.1, "method": "wanda", "align": 4, "progress": None, "onnx": True}
    found = mptk.prune(model.eval(), tmp_path / "small", example_inputs=IDS[:2], data=IDS, **how)
    assert "ONNX Runtime" in {row["stage"] for row in found.report.proof}
