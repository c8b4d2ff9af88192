"""The result has the type of the checkpoint that it was made of, or the one that was asked for; the proof is as tight.

It reaches for passes.transforms.weight_types: the type that is stored, without a run.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mptk
from mptk import Report, testing
from mptk.config import Learning, Training
from mptk.errors import FileError, InputError, ModelError
from mptk.files import write_json
from mptk.io import models
from mptk.publish.manifest import write_manifest
from mptk.testing import Laboratory, expect_error
from passes.transforms.weight_types import Store, round_to_type

SETTINGS = mptk.Settings(
    sparsity=0.314, method="magnitude", samples=4, length=32, align=4, eval_windows=2, eval_length=32, onnx=False
)


def open_checkpoint(laboratory: Laboratory, dtype: torch.dtype) -> str:
    def make(folder: Path) -> None:
        testing.save_model(testing.make_llama(layers=1).to(dtype), folder, testing.make_tokenizer(begin=True))

    return str(laboratory.keep(f"stored/{dtype}", make))


@pytest.fixture(scope="module")
def half(laboratory):
    return open_checkpoint(laboratory, torch.bfloat16)


def kinds(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


def bytes_of(folder: Path) -> int:
    return sum(t.numel() * t.element_size() for t in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("target", ["stock", "graph"])
def test_bfloat16_stays_and_the_report_counts_its_bytes(half, tmp_path, target):
    report = mptk.prune(half, tmp_path / "out", replace(SETTINGS, target=target)).report
    assert kinds(tmp_path / "out") == {torch.bfloat16}
    assert "dtype" not in report.config_changes
    assert report.cost["dense"]["bytes"] == bytes_of(Path(half))
    if target == "stock":
        assert report.cost["pruned"]["bytes"] == bytes_of(tmp_path / "out")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert all(row["tolerance"] <= 1e-4 for row in report.proof)
    mptk.verify(tmp_path / "out")


def test_trained_weights_are_rounded_before_the_proof(half, tmp_path):
    learning = Learning(steps=4, mask_share=0.5, rank=2, training=Training(batch=2, micro=2, lr=1e-2))
    settings = replace(SETTINGS, method="maskprune", learning=learning, sparsity=0.286)
    report = mptk.prune(half, tmp_path / "out", settings).report
    assert kinds(tmp_path / "out") == {torch.bfloat16}
    stages = {row["stage"]: row for row in report.proof}
    assert stages["reloaded checkpoint"]["relative"] <= 5e-5
    assert stages["stored weights"]["max_abs"] == 0
    mptk.verify(tmp_path / "out")


def test_folded_norms_are_rounded_after_training_and_what_is_written_equals_that(half, tmp_path):
    """If they were rounded before, what was trained would differ from the masked model by that, and the proof fail."""
    learning = Learning(steps=2, rank=2, training=Training(batch=2, micro=2))
    cut = replace(SETTINGS, families=("hidden",), widths={"hidden": 36}, learning=learning)
    report = mptk.prune(half, tmp_path / "out", cut).report
    assert any(row["name"] == "store" and row["notes"] for row in report.stages)
    assert kinds(tmp_path / "out") == {torch.bfloat16}
    assert {row["stage"]: row for row in report.proof}["trained model"]["relative"] <= 5e-6


@pytest.mark.parametrize(("stored", "dtype"), [("float32", "float16"), ("bfloat16", "float32")])
def test_another_type_is_stored_if_it_is_asked_for(laboratory, tmp_path, stored, dtype):
    dense = open_checkpoint(laboratory, getattr(torch, stored))
    report = mptk.prune(dense, tmp_path / "out", replace(SETTINGS, dtype=dtype)).report
    assert Report.read(tmp_path / "out").settings.dtype == dtype
    assert kinds(tmp_path / "out") == {getattr(torch, dtype)}
    assert report.config_changes["dtype"] == [stored, dtype]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert report.cost["dense"]["bytes"] == bytes_of(Path(dense))
    assert report.cost["pruned"]["bytes"] == bytes_of(tmp_path / "out")
    mptk.verify(tmp_path / "out")


def test_a_folder_of_another_type_than_it_says_fails(laboratory, tmp_path):
    assert "dtype" not in Report.read(laboratory.open_recovered()).config_changes
    folder = laboratory.copy(laboratory.open_recovered(), tmp_path / "copy")
    report = json.loads((folder / "report.json").read_text())
    report["settings"]["dtype"] = "bfloat16"
    write_json(folder / "report.json", report)
    write_manifest(folder)
    with expect_error(FileError):
        mptk.verify(folder)


def test_a_number_that_is_too_large_is_refused():
    with expect_error(InputError, name="dtype"):
        round_to_type(torch.tensor([1.0, 7e4]), torch.float16)
    same = torch.tensor([1.0, 2.0])
    assert round_to_type(same, torch.bfloat16) is same


def test_what_no_checkpoint_holds_is_not_rounded():
    program = mptk.trace(testing.make_llama())
    after = Store(torch.bfloat16).run(program).program
    constants = program.state.keys() - program.state_dict().keys()
    assert any("inv_freq" in name for name in constants)
    assert all(after.state.get_entry(name) is program.state.get_entry(name) for name in constants)
    before, rounded = program.state["lm_head.weight"], after.state["lm_head.weight"]
    assert torch.equal(rounded, before.bfloat16().float())
    assert not torch.equal(rounded, before)


@pytest.mark.features
def test_quantised_weights_without_a_scale_are_refused(laboratory, tmp_path):
    folder = tmp_path / "dense"
    shutil.copytree(open_checkpoint(laboratory, torch.float32), folder)
    state = load_file(folder / "model.safetensors")
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    with expect_error(ModelError):
        models.load(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with expect_error(FileError):
        models.load(str(folder))
