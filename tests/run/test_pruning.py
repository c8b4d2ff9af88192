"""The main job on tiny models: what a user gets in the folder, and what happens when something is wrong.

It reaches for mptk.ort.decoder and passes.pipelines: what is published is read by itself.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import shutil
from dataclasses import replace

import pytest
from commands import done
from transformers import AutoTokenizer

import mptk
from mptk import Plan, Report
from mptk.config import Settings
from mptk.errors import ProofError, TargetError
from mptk.io import data
from mptk.ir import PassRecord
from mptk.ort.decoder import OrtDecoder
from mptk.report.sections import build_prune_view
from mptk.report.view import render_markdown
from mptk.run.dense_types import DENSE_TYPES
from mptk.run.minutes import fill_in
from mptk.testing import expect_error
from passes.pipelines import quantize_onnx
from passes.targets.onnx.names import ENDINGS

CASES = ("prefill", "padded left", "padded right", "decode", "sizes")


def test_report_says_what_was_cut_and_that_it_is_proven(laboratory):
    report = Report.read(laboratory.open_pruned())
    assert abs(report.sparsity - 0.35) <= 0.01
    assert [d["stage"] for d in report.proof] == [
        "config",
        "stored weights",
        "rewritten graph",
        "reloaded checkpoint",
        *(f"ONNX Runtime {case}" for case in CASES),
    ]
    assert all(d["ok"] and d["max_abs"] < 1e-3 for d in report.proof)
    assert report.cost["pruned"]["parameters"] < report.cost["dense"]["parameters"]
    assert report.quality["dense"] > 1
    assert len(report.splits) > 1
    assert {"config.json", "model.safetensors", "plan.json", "onnx/model.onnx"} <= set(report.files)
    stages = {row["name"]: row for row in report.stages}
    before, after = stages["rewrite"]["parameters"]
    assert after < before
    assert stages["rewrite"]["changed"]


def test_quantised_graphs_lie_beside_and_their_perplexity_is_told(laboratory, tmp_path):
    """int4 is rounded for the calibration text, and so not as a graph by itself is."""
    folder = laboratory.open_quantized()
    report, one = Report.read(folder), Report.read(laboratory.open_pruned())
    assert set(report.quantized) == {"int8", "int4", "fp16"}
    for scheme, found in report.quantized.items():
        assert found["file"] == f"onnx/model{ENDINGS[scheme]}.onnx"
        assert {found["file"], f"{found['file']}_data"} <= set(report.files)
        assert found["bytes"] == sum(f.stat().st_size for f in (folder / "onnx").glob(f"model{ENDINGS[scheme]}.onnx*"))
        if scheme != "int4":
            assert found["quality"] == pytest.approx(report.quality["pruned"], rel=0.05)
    assert report.plan_sha256 == one.plan_sha256
    for name in ("model.onnx", "model.onnx_data"):
        shutil.copyfile(folder / "onnx" / name, tmp_path / name)
    quantize_onnx(tmp_path / "model.onnx", "int4")
    assert not filecmp.cmp(tmp_path / "model_q4.onnx_data", folder / "onnx" / "model_q4.onnx_data", shallow=False)


def test_the_dense_model_is_measured_once_in_each_type(laboratory, tmp_path):
    """A cut competes with these. A second cut of the same model finds them in the cache."""
    report = Report.read(laboratory.open_quantized())
    for scheme, found in report.quantized.items():
        assert found["dense"]["bytes"] > found["bytes"]
        if scheme != "int4":
            assert found["dense"]["quality"] == pytest.approx(report.quality["dense"], rel=0.05)
    asked = {"method": "magnitude", "onnx": True, "quantize": ("int8",), "eval_windows": 2}
    first = Report.read(laboratory.prune("decoder", tmp_path / "first", sparsity=0.2, **asked))
    second = Report.read(laboratory.prune("decoder", tmp_path / "second", sparsity=0.4, **asked))
    assert first.quantized["int8"]["dense"] == second.quantized["int8"]["dense"]
    assert [DENSE_TYPES in {row["name"] for row in each.stages} for each in (first, second)] == [True, False]
    lines = render_markdown(build_prune_view(second))
    assert lines.index("dense, int8 in ONNX Runtime") < lines.index("pruned, int8 in ONNX Runtime")


def test_a_dense_model_that_cannot_be_written_is_said_in_the_report(laboratory, tmp_path, inside):
    def refuse(*_: object) -> None:
        raise TargetError("no such operator")

    inside.around("mptk.run.dense_types.export_form", refuse)
    asked = {"method": "magnitude", "onnx": True, "quantize": ("int8",), "eval_windows": 3}
    report = Report.read(laboratory.prune("decoder", tmp_path / "out", **asked))
    assert "the dense model was not measured in int8: no such operator" in report.notes
    assert "quality" in report.quantized["int8"]
    assert "dense" not in report.quantized["int8"]


def test_last_logits_alone_are_proven_too(laboratory, tmp_path):
    last = {"logits": "last", "quantize": ("int8",), "objective": "prefill", "method": "magnitude"}
    report = Report.read(laboratory.prune("decoder", tmp_path / "out", onnx=True, **last))
    assert OrtDecoder(tmp_path / "out").metadata["objective"] == "prefill"
    stages = [d["stage"] for d in report.proof]
    assert stages[-4:] == ["ONNX Runtime decode", "ONNX Runtime sizes", "int8 weights", "int8 logits"]
    assert all(d["ok"] for d in report.proof)
    assert "quality" not in report.quantized["int8"]


def test_a_failed_proof_publishes_nothing(laboratory, tmp_path):
    def damage(record: PassRecord) -> None:
        if record.name == "write stock":
            (config,) = tmp_path.rglob(".out.mptk/**/config.json")
            config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))

    settings = laboratory.make_settings(method="magnitude")
    with expect_error(ProofError):
        mptk.prune(str(laboratory.open_model()), tmp_path / "out", settings, on_stage=damage)
    assert [path.name for path in tmp_path.iterdir()] == ["out.run"], "what --resume needs, and no result"


def test_a_plan_file_decides_everything(laboratory, tmp_path):
    """The run writes only the text that it uses."""
    out, again = laboratory.open_pruned(), tmp_path / "again"
    settings = Settings(plan=str(out / "plan.json"), length=16, onnx=False)
    report = mptk.prune(str(laboratory.open_model()), again, settings).report
    assert Plan.load(again / "plan.json").families == Plan.load(out / "plan.json").families
    assert filecmp.cmp(again / "model.safetensors", out / "model.safetensors", shallow=False)
    assert "onnx" not in {p.name for p in again.iterdir()}
    assert report.plan_sha256 == Report.read(out).plan_sha256
    inputs = {name: used["inputs"]["input_ids"]["shape"] for name, used in report.data.items() if name != "files"}
    assert inputs == {"calibration": [3, 16], "evaluation": [3, 16]}


@pytest.mark.features
def test_a_plan_that_is_fitted_or_merged_needs_more_text():
    asked, cut, merged = Settings(plan="plan.json"), Plan({}), Plan({}, conversions={"kv_heads": {"width": 1, "of": 3}})
    assert fill_in(asked, plan=cut).samples == 3
    assert fill_in(replace(asked, reconstruct=True), plan=cut).samples == 32
    assert fill_in(asked, plan=merged).samples == 32


def test_same_seed_same_result_and_the_report_has_the_hash_of_every_text(laboratory, tmp_path):
    model, text = str(laboratory.open_model()), laboratory.open_data()
    settings = laboratory.make_settings(method="random", length=32, eval_length=24, eval_windows=2)
    a, b = (mptk.prune(model, tmp_path / name, replace(settings, seed=3)).report for name in "ab")
    assert (tmp_path / "a" / "plan.json").read_bytes() == (tmp_path / "b" / "plan.json").read_bytes()
    assert a.data == b.data
    assert a.data["files"] == {str(text): hashlib.sha256(text.read_bytes()).hexdigest()}
    inputs = {name: used["inputs"]["input_ids"] for name, used in a.data.items() if name != "files"}
    assert {name: found["shape"] for name, found in inputs.items()} == {"calibration": [4, 32], "evaluation": [2, 24]}
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert inputs["evaluation"]["sha256"] == data.hash_windows(
        data.load_evaluation_windows(tokenizer, str(text), 24, 2)
    )
    own = replace(settings, seed=1, data="self", eval_windows=3, eval_length=21)
    written = mptk.prune(model, tmp_path / "c", own).report.data
    assert written["evaluation"]["inputs"]["input_ids"]["shape"] == [3, 21], "also of the model's own text"


@pytest.mark.always
def test_families_without_a_stock_config_can_be_cut_for_the_graph_target(gpt2, tmp_path):
    heads = Settings(families=("heads",), widths={"heads": 4}, method="magnitude", samples=4, length=48, onnx=False)
    with expect_error(TargetError, name="heads", nearest=["hidden"]):
        mptk.prune(gpt2, tmp_path / "out", heads)
    report = mptk.prune(gpt2, tmp_path / "out", replace(heads, target="graph")).report
    assert report.families["heads"] == {"of": 6, "width": 4, "layers": 2}
    stages = {"stored weights", "rewritten graph", "model.pt2"}
    assert {d["stage"] for d in report.proof} == stages
    assert {d.stage for d in mptk.verify(tmp_path / "out")} == stages


def test_a_run_that_is_stopped_while_it_measures_leaves_a_proven_folder(laboratory, tmp_path):
    def stop(stage: str, *_: object) -> None:
        if stage == "perplexity":
            raise KeyboardInterrupt

    settings = laboratory.make_settings(method="magnitude")
    with pytest.raises(KeyboardInterrupt):
        mptk.prune(str(laboratory.open_model()), tmp_path / "out", settings, progress=stop)
    assert Report.read(tmp_path / "out").quality == {}
    assert mptk.verify(tmp_path / "out")
    shown = done("report", tmp_path / "out", tmp_path / "out").stdout
    assert "Not measured, since the run was stopped earlier" in shown


def test_reports_of_earlier_versions_are_read(laboratory, tmp_path):
    pruned = laboratory.open_pruned()
    report = json.loads((pruned / "report.json").read_text())
    del report["task"], report["settings"]["dtype"]
    report["settings"]["no_longer"] = 1
    (tmp_path / "report.json").write_text(json.dumps(report))
    old = Report.read(tmp_path)
    assert (old.task, old.settings.dtype) == ("causal-lm", "auto")
    assert old.quality == Report.read(pruned).quality
