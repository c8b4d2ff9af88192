"""The result has the type of the checkpoint that it was made of, or the one that was asked for; the proof is as tight.

It reaches for passes.transforms.weight_types: the type that is stored, without a run.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mptk
from mptk import MptkError, Report, testing
from mptk.config.learning import Learning, Training
from mptk.io import models
from passes.transforms.weight_types import Store, round_to_type

SETTINGS = mptk.Settings(
    sparsity=0.314, method="wanda", samples=4, length=32, align=4, eval_windows=4, eval_length=32, onnx=False
)


def checkpoint(folder: Path, dtype: torch.dtype) -> str:
    testing.save_model(testing.make_llama().to(dtype), folder, testing.make_tokenizer(begin=True))
    return str(folder)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("bfloat16"), torch.bfloat16)


def kinds(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


def bytes_of(folder: Path) -> int:
    return sum(t.numel() * t.element_size() for t in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("target", ["stock", "graph"])
def test_bfloat16_stays_and_the_report_counts_its_bytes(half: str, tmp_path: Path, target: str) -> None:
    report = mptk.prune(half, tmp_path / "out", replace(SETTINGS, target=target)).report
    assert kinds(tmp_path / "out") == {torch.bfloat16}
    assert "dtype" not in report.config_changes
    assert report.cost["dense"]["bytes"] == bytes_of(Path(half))
    if target == "stock":
        assert report.cost["pruned"]["bytes"] == bytes_of(tmp_path / "out")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert all(row["tolerance"] <= 1e-4 for row in report.proof)
    mptk.verify(tmp_path / "out")


def test_trained_weights_are_rounded_before_the_proof(half: str, tmp_path: Path) -> None:
    learning = Learning(steps=4, mask_share=0.5, rank=2, training=Training(batch=2, micro=2, lr=1e-2))
    settings = replace(SETTINGS, method="maskprune", learning=learning, onnx=True, quantize=("int8",), sparsity=0.286)
    report = mptk.prune(half, tmp_path / "out", settings).report
    assert kinds(tmp_path / "out") == {torch.bfloat16}
    stages = {row["stage"]: row for row in report.proof}
    assert stages["reloaded checkpoint"]["relative"] <= 5e-5
    assert stages["ONNX Runtime decode"]["relative"] <= 1e-4
    assert stages["stored weights"]["max_abs"] == 0
    mptk.verify(tmp_path / "out")


def test_folded_norms_are_rounded_and_what_is_written_equals_that(half: str, tmp_path: Path) -> None:
    report = mptk.prune(
        half, tmp_path / "out", replace(SETTINGS, families=("hidden",), widths={"hidden": 36}, onnx=True)
    ).report
    assert any(row["name"] == "store" and row["notes"] for row in report.stages)
    assert kinds(tmp_path / "out") == {torch.bfloat16}
    mptk.verify(tmp_path / "out")


def test_training_starts_before_folded_norms_are_rounded(half: str, tmp_path: Path) -> None:
    """Else what was trained differs from the masked model by the rounding of its norms, and the proof fails."""
    learning = Learning(steps=2, rank=2, training=Training(batch=2, micro=2))
    cut = replace(SETTINGS, families=("hidden",), widths={"hidden": 24}, learning=learning)
    stages = {row["stage"]: row for row in mptk.prune(half, tmp_path / "out", cut).report.proof}
    assert stages["trained model"]["relative"] <= 5e-6


@pytest.mark.parametrize(("dtype", "onnx"), [("float16", True), ("bfloat16", False), ("float32", False)])
def test_another_type_is_stored_if_it_is_asked_for(tmp_path: Path, dtype: str, onnx: bool) -> None:
    dense = checkpoint(tmp_path / "dense", torch.float32)
    report = mptk.prune(dense, tmp_path / "out", replace(SETTINGS, dtype=dtype, onnx=onnx)).report
    assert Report.read(tmp_path / "out").settings.dtype == dtype
    assert kinds(tmp_path / "out") == {getattr(torch, dtype)}
    changed = {} if dtype == "float32" else {"dtype": ["float32", dtype]}
    assert {k: v for k, v in report.config_changes.items() if k == "dtype"} == changed
    assert report.cost["dense"]["bytes"] == bytes_of(Path(dense))
    assert report.cost["pruned"]["bytes"] == bytes_of(tmp_path / "out")
    mptk.verify(tmp_path / "out")


def test_a_folder_of_another_type_than_it_says_fails(half: str, tmp_path: Path) -> None:
    mptk.prune(half, tmp_path / "out", SETTINGS)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    report["settings"]["dtype"] = "float32"
    from test_trust import edit

    edit(tmp_path / "out", settings=report["settings"])
    with pytest.raises(MptkError, match=r"is wrong|dtype"):
        mptk.verify(tmp_path / "out")


def test_a_number_that_is_too_large_is_refused() -> None:
    with pytest.raises(MptkError, match=r"larger than torch.float16 can hold; use --dtype bfloat16 or float32"):
        round_to_type(torch.tensor([1.0, 7e4]), torch.float16)
    same = torch.tensor([1.0, 2.0])
    assert round_to_type(same, torch.bfloat16) is same


def test_what_no_checkpoint_holds_is_not_rounded() -> None:
    program = mptk.trace(testing.make_llama())
    after = Store(torch.bfloat16).run(program).program
    constants = program.state.keys() - program.state_dict().keys()
    assert any("inv_freq" in name for name in constants)
    assert all(after.state.get_entry(name) is program.state.get_entry(name) for name in constants)
    before, rounded = program.state["lm_head.weight"], after.state["lm_head.weight"]
    assert torch.equal(rounded, before.bfloat16().float())
    assert not torch.equal(rounded, before)


@pytest.mark.features
def test_quantised_weights_without_a_scale_are_refused(tmp_path: Path) -> None:
    folder = Path(checkpoint(tmp_path / "dense", torch.float32))
    state = load_file(folder / "model.safetensors")
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MptkError, match=r"has weights of type F8_E4M3, and its config.json has no quantization_config"):
        models.load(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(MptkError, match=r"is torch.float8_e4m3fn without a scale"):
        models.load(str(folder))
