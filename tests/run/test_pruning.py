"""The main job on tiny models: what a user gets in the folder, and what happens when something is wrong.

It reaches for mptk.ort.decoder and passes.pipelines: what is published is read by itself.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from runpy import run_path

import pytest
import torch
from commands import done
from toy_checkpoints import SETTINGS, llama_config
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

import mptk
from mptk import MptkError, Plan, Report
from mptk.io import data
from mptk.ort.decoder import OrtDecoder
from mptk.protocols.chain import Proven
from mptk.testing import WORDS, save_word_model
from passes.pipelines import quantize_onnx
from passes.targets.onnx.names import ENDINGS
from passes.verify import Difference


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return save_word_model(LlamaForCausalLM(llama_config()), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    config = GPT2Config(
        n_embd=48, n_inner=80, n_layer=2, n_head=6, vocab_size=97, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    return save_word_model(GPT2LMHeadModel(config), tmp_path_factory.mktemp("gpt2"))


CASES = ("prefill", "padded left", "padded right", "decode", "sizes")


@pytest.fixture(scope="module")
def pruned(llama, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("out") / "pruned"
    return out, mptk.prune(llama, out, SETTINGS).report


def test_report_says_what_was_cut_and_that_it_is_proven(pruned):
    out, report = pruned
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report.to_json()))
    assert abs(report.sparsity - 0.35) <= 0.01
    assert [d["stage"] for d in report.proof] == [
        "config",
        "stored weights",
        "rewritten graph",
        "reloaded checkpoint",
        "ONNX Runtime prefill",
        "ONNX Runtime padded left",
        "ONNX Runtime padded right",
        "ONNX Runtime decode",
        "ONNX Runtime sizes",
    ]
    assert all(d["ok"] and d["max_abs"] < 1e-3 for d in report.proof)
    assert report.cost["pruned"]["parameters"] < report.cost["dense"]["parameters"]
    assert report.quality["dense"] > 1
    assert len(report.splits) > 1
    assert {"config.json", "model.safetensors", "plan.json", "onnx/model.onnx"} <= set(report.files)


def test_quantised_graphs_lie_beside_and_their_perplexity_is_told(llama, pruned, tmp_path):
    settings = replace(SETTINGS, quantize=("int8", "fp16"))
    report = mptk.prune(llama, tmp_path / "out", settings).report
    assert set(report.quantized) == {"int8", "fp16"}
    for scheme, found in report.quantized.items():
        assert found["file"] == f"onnx/model{ENDINGS[scheme]}.onnx"
        assert {found["file"], f"{found['file']}_data"} <= set(report.files)
        assert found["bytes"] == sum(
            f.stat().st_size for f in (tmp_path / "out/onnx").glob(f"model{ENDINGS[scheme]}.onnx*")
        )
        assert found["quality"] == pytest.approx(report.quality["pruned"], rel=0.05)
    assert report.plan_sha256 == pruned[1].plan_sha256


def test_int4_is_rounded_for_the_calibration_text(llama, tmp_path):
    mptk.prune(llama, tmp_path / "out", replace(SETTINGS, quantize=("int4",)))
    folder = tmp_path / "out" / "onnx"
    ours = (folder / "model_q4.onnx_data").read_bytes()
    quantize_onnx(folder / "model.onnx", "int4")
    assert (folder / "model_q4.onnx_data").read_bytes() != ours


def test_last_logits_alone_are_proven_too(llama, tmp_path):
    settings = replace(SETTINGS, logits="last", quantize=("int8",), objective="prefill")
    report = mptk.prune(llama, tmp_path / "out", settings).report
    assert OrtDecoder(tmp_path / "out").metadata["objective"] == "prefill"
    assert [d["stage"] for d in report.proof][-4:] == [
        "ONNX Runtime decode",
        "ONNX Runtime sizes",
        "int8 weights",
        "int8 logits",
    ]
    assert all(d["ok"] for d in report.proof)
    assert "quality" not in report.quantized["int8"]


def test_a_failed_proof_publishes_nothing(llama, tmp_path, inside):
    wrong = Proven((Difference("rewritten graph", 1.0, 0.1, 1e-5),), 48)
    inside.gives("mptk.run.prune.prove_folder", wrong)
    with pytest.raises(MptkError, match="rewritten graph"):
        mptk.prune(llama, tmp_path / "out", SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["out.run"], "what --resume needs, and no result"


def test_a_plan_file_decides_everything(pruned, llama, tmp_path):
    out, _ = pruned
    plan = Plan.load(out / "plan.json")
    settings = mptk.Settings(plan=str(out / "plan.json"), samples=4, length=48, onnx=False)
    report = mptk.prune(llama, tmp_path / "again", settings).report
    assert Plan.load(tmp_path / "again" / "plan.json").families == plan.families
    assert filecmp.cmp((tmp_path / "again" / "model.safetensors"), (out / "model.safetensors"), shallow=False)
    assert "onnx" not in {p.name for p in (tmp_path / "again").iterdir()}
    assert report.plan_sha256 == pruned[1].plan_sha256


@pytest.mark.features
def test_a_plan_writes_only_the_text_that_its_run_uses(llama, pruned, tmp_path):
    def windows(name: str, **changes: object) -> tuple[int, int]:
        settings = mptk.Settings(plan=str(tmp_path / "plan.json"), length=16, onnx=False, **changes)
        used = mptk.prune(llama, tmp_path / name, settings).report.data
        return used["calibration"]["samples"], used["evaluation"]["samples"]

    plan = json.loads((pruned[0] / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert windows("cut") == (3, 3)
    assert windows("fitted", reconstruct=True, eval_windows=5) == (32, 5)
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"families": {}, "kv_heads": {"width": 1, "of": 3}}))
    assert windows("merged") == (32, 16)


def test_a_dense_model_in_half_precision_is_written_in_float32_if_that_is_asked_for(tmp_path):
    dense = save_word_model(LlamaForCausalLM(llama_config()).to(torch.bfloat16), tmp_path / "dense")
    given = {"widths": {"ffn": 40}, "families": ("ffn",), "onnx": False, "dtype": "float32"}
    report = mptk.prune(dense, tmp_path / "out", replace(SETTINGS, method="magnitude", **given)).report
    assert report.config_changes == {"intermediate_size": [80, 40], "dtype": ["bfloat16", "float32"]}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert mptk.verify(tmp_path / "out")


def test_same_seed_same_result(llama, tmp_path):
    settings = mptk.Settings(sparsity=0.5, method="random", samples=4, length=48, align=8, onnx=False, seed=3)
    for name in ("a", "b"):
        mptk.prune(llama, tmp_path / name, settings)
    assert (tmp_path / "a" / "plan.json").read_bytes() == (tmp_path / "b" / "plan.json").read_bytes()


def test_perplexity_is_measured_on_the_windows_asked_for_also_of_the_models_own_text(llama, tmp_path):
    settings = mptk.Settings(method="random", samples=4, length=48, align=8, onnx=False, eval_windows=3, eval_length=21)
    report = mptk.prune(llama, tmp_path / "out", settings).report
    said = "text sampled from the dense model (compares runs of this model only): 3 windows of 21 tokens"
    assert report.quality["protocol"].startswith(said)


def test_the_report_has_the_hash_of_every_text(llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(random.Random(0).choices(WORDS, k=900)))
    settings = mptk.Settings(
        method="random", data=str(text), samples=4, length=32, eval_length=24, eval_windows=2, align=8, onnx=False
    )
    first, second = (mptk.prune(llama, tmp_path / name, settings).report.data for name in ("a", "b"))
    assert first == second
    assert first["files"] == {str(text): hashlib.sha256(text.read_bytes()).hexdigest()}
    inputs = {name: used["inputs"]["input_ids"] for name, used in first.items() if name != "files"}
    assert {name: found["shape"] for name, found in inputs.items()} == {"calibration": [4, 32], "evaluation": [2, 24]}
    tokenizer = AutoTokenizer.from_pretrained(llama)
    assert inputs["evaluation"]["sha256"] == data.hash_windows(
        data.load_evaluation_windows(tokenizer, str(text), 24, 2)
    )
    other = mptk.prune(llama, tmp_path / "c", replace(settings, seed=1)).report.data
    assert other["calibration"]["inputs"]["input_ids"] != inputs["calibration"]


def test_flap_writes_its_bias_compensation_and_proves_it(gpt2, tmp_path):
    """GPT-2's heads have no stock config, so only the feed-forward channels go; its biases take up the means."""
    text = tmp_path / "text.txt"
    rng = random.Random(0)
    text.write_text(" ".join(rng.choice(WORDS) for _ in range(900)))
    settings = mptk.Settings(
        families=("ffn",),
        widths={"ffn": 48},
        method="flap",
        data=str(text),
        samples=6,
        length=32,
        eval_length=32,
        align=8,
        dtype="bfloat16",
    )
    report = mptk.prune(gpt2, tmp_path / "out", settings).report
    assert report.families["ffn"]["width"] < 80
    assert report.families["heads"]["width"] == 6
    assert any("bias" in note for note in report.notes)
    assert (tmp_path / "out" / "compensation.safetensors").is_file()
    assert all(d.ok for d in mptk.verify(tmp_path / "out"))


def test_families_without_a_stock_config_can_be_cut_for_the_graph_target(gpt2, tmp_path):
    with pytest.raises(MptkError, match="heads can only be cut together with hidden for target stock"):
        mptk.prune(gpt2, tmp_path / "out", mptk.Settings(method="wanda", families=("heads",), samples=4, length=48))
    settings = mptk.Settings(
        families=("heads",), widths={"heads": 4}, target="graph", method="magnitude", samples=4, length=48
    )
    report = mptk.prune(gpt2, tmp_path / "out", settings).report
    assert report.families["heads"] == {"of": 6, "width": 4, "layers": 2}
    stages = {"stored weights", "rewritten graph", "model.pt2", *(f"ONNX Runtime {case}" for case in CASES)}
    assert {d["stage"] for d in report.proof} == stages
    assert {d.stage for d in mptk.verify(tmp_path / "out")} == stages


@pytest.mark.long
def test_example_script_does_the_main_job(llama, tmp_path, inside, capsys):
    script = Path(__file__).parents[2] / "examples" / "prune.py"
    assert len(script.read_text().splitlines()) < 30
    inside.bound("sys.argv", [str(script), llama, str(tmp_path / "out"), "0.4"])
    run_path(str(script), run_name="__main__")
    said = capsys.readouterr().out
    assert "ffn: 80 units in each of 3 layers" in said
    assert "ONNX Runtime decode: largest logit difference" in said


def test_verbose_prints_what_each_pass_changed(llama, tmp_path):
    options = ["--method", "magnitude", "--sparsity", "0.314", "--samples", "2", "--length", "32", "--align", "4"]
    run = done("prune", llama, "--out", str(tmp_path / "out"), "--no-onnx", "-v", *options)
    assert re.search(r"rewrite: \d+ → \d+ ops, [\d,]+ → [\d,]+ parameters, \d+ weights sliced", run.stderr)
    stages = {row["name"]: row for row in Report.read(tmp_path / "out").stages}
    before, after = stages["rewrite"]["parameters"]
    assert after < before
    assert stages["rewrite"]["changed"]


def test_a_run_that_is_stopped_while_it_measures_leaves_a_proven_folder(llama, tmp_path, inside):
    inside.stop("mptk.run.prune.measure", error=KeyboardInterrupt)
    settings = replace(SETTINGS, method="magnitude", onnx=False)
    with pytest.raises(KeyboardInterrupt):
        mptk.prune(llama, tmp_path / "out", settings)
    assert Report.read(tmp_path / "out").quality == {}
    assert mptk.verify(tmp_path / "out")
    shown = done("report", tmp_path / "out", tmp_path / "out").stdout
    assert "Not measured, since the run was stopped earlier" in shown


def test_reports_of_earlier_versions_are_read(pruned, tmp_path):
    report = json.loads((pruned[0] / "report.json").read_text())
    del report["task"], report["settings"]["dtype"]
    report["settings"]["no_longer"] = 1
    (tmp_path / "report.json").write_text(json.dumps(report))
    old = Report.read(tmp_path)
    assert (old.task, old.settings.dtype) == ("causal-lm", "auto")
    assert old.quality == pruned[1].quality
