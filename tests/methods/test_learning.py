"""prune --method maskprune and recover on tiny models: what a user gets, and that a run can be stopped and resumed."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from inside import Stopped
from learning_runs import (
    ENVIRONMENT,
    LEARNING,
    SETTINGS,
    TRAINING,
    metrics,
    require_same,
    require_same_bits,
    shard,
    stop_at,
)
from safetensors.torch import load_file
from toy_checkpoints import llama_config
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import mptk
from mptk import Report, testing, verify
from mptk.config import LossWeights
from mptk.errors import AnalysisError, InputError, PackageError
from mptk.testing import expect_error, save_word_model

STAGES = ["learned masks", "trained model", "config", "stored weights", "rewritten graph", "reloaded checkpoint"]
BRIEF = replace(SETTINGS, learning=replace(LEARNING, steps=4))


@pytest.fixture(scope="module")
def learned(llama, tmp_path_factory):
    """An unbroken run."""
    out = tmp_path_factory.mktemp("learned") / "out"
    mptk.prune(llama, out, SETTINGS)
    return out


def test_masks_are_learned_and_the_folder_is_an_ordinary_model(learned):
    report = Report.read(learned)
    assert report.sparsity == pytest.approx(0.35, abs=0.01)
    assert all(d["relative"] <= d["tolerance"] for d in report.proof)
    assert [d["stage"] for d in report.proof] == STAGES
    model = AutoModelForCausalLM.from_pretrained(learned)
    assert model.config.intermediate_size == report.families["ffn"]["width"]
    assert not learned.with_name("out.run").exists()
    rows = metrics(learned)
    assert [r["step"] for r in rows if r["phase"] == "masks"] == list(range(1, 9)), "each of half a batch"
    assert [r["step"] for r in rows if r["phase"] == "recovery"] == [1, 2, 3, 4]
    assert {"loss", "kl", "cost", "target", "z", "width/ffn", "tokens/s"} <= rows[0].keys()
    assert verify(learned)


def test_a_run_stopped_again_and_again_ends_with_the_same_bits(llama, learned, tmp_path):
    out, settings = tmp_path / "out", replace(SETTINGS, resume=True)
    for stage, done in (("masks", 3), ("recovery", 3), ("prove", 0)):
        with pytest.raises(Stopped):
            mptk.prune(llama, out, settings, progress=stop_at(stage, done))
        with (tmp_path / "out.run" / "metrics.jsonl").open("a") as log:
            log.write('{"phase": "rec')
    mptk.prune(llama, out, settings)
    require_same_bits(learned, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def has_reached(log: Path, phase: str, step: int) -> bool:
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    return any(r["phase"] == phase and r["step"] >= step for r in rows)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """A launcher's processes do not die with it."""
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)


def test_sharded_processes_that_are_killed_go_on_and_end_as_one(llama, learned, tmp_path):
    out, run = tmp_path / "out", tmp_path / "out.run"
    with pytest.raises(Stopped):
        mptk.prune(llama, out, SETTINGS, progress=stop_at("masks", 4))
    silent = {"env": ENVIRONMENT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(shard(llama, out), **silent) as process:
        while process.poll() is None and not has_reached(run / "metrics.jsonl", "recovery", 3):
            time.sleep(0.005)
        kill_all(process)
    assert not out.exists(), "it was over before it could be killed"
    state = load_file(run / "recovery-00000002.safetensors")
    width, part = Report.read(learned).families["ffn"]["width"], "base_model.model.model.layers.0.mlp.down_proj"
    for kind in ("parameter", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
        assert state[f"{kind}.{part}.lora_A.default.weight"].shape == (4, width)
        assert state[f"{kind}.{part}.lora_B.default.weight"].shape == (48, 4)
    done = subprocess.run(shard(llama, out), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "trained on 2 processes, its weights in shards (FSDP2)" in Report.read(out).notes
    require_same(learned, out)


def test_half_precision_learns_much_the_same_and_it_is_proven(llama, learned, tmp_path):
    settings = replace(BRIEF, learning=replace(BRIEF.learning, precision="bf16"))
    report = mptk.prune(llama, tmp_path / "out", settings).report
    first, exact = metrics(tmp_path / "out")[0]["loss"], metrics(learned)[0]["loss"]
    assert first != exact
    assert first == pytest.approx(exact, rel=5e-3)
    assert report.sparsity == pytest.approx(0.35, abs=0.01)
    assert [d["stage"] for d in report.proof] == STAGES


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_configuration_that_fails_leaves_nothing_in_the_way(llama, tmp_path):
    wanting = replace(SETTINGS, learning=replace(LEARNING, steps=2, tracker="wandb"))
    with expect_error(PackageError, name="wandb"):
        mptk.prune(llama, tmp_path / "out", wanting)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_a_trackers_files_come_with_the_folder(llama, tmp_path):
    settings = replace(LEARNING, steps=2, tracker="tensorboard")
    mptk.prune(llama, tmp_path / "out", replace(SETTINGS, method="magnitude", learning=settings))
    (file,) = (tmp_path / "out" / "tracker").glob("events.*")
    assert b"recovery/loss" in file.read_bytes()


def test_all_weights_can_be_trained_a_shared_one_too(llama, tmp_path):
    learning = replace(LEARNING, steps=2, rank=0)
    report = mptk.prune(llama, tmp_path / "out", replace(SETTINGS, method="magnitude", learning=learning)).report
    assert {"lm_head.weight", "model.embed_tokens.weight"} & set(report.trained)
    assert verify(tmp_path / "out")
    return_to_start = replace(learning, training=replace(TRAINING, lr=3.0, save_every=1))
    worse = mptk.recover(tmp_path / "out", tmp_path / "worse", replace(SETTINGS, learning=return_to_start)).report
    assert worse.recovery["kept"] == 0
    assert list(worse.recovery["losses"]) == ["0", "1", "2"]
    assert worse.recovery["losses"]["0"] == min(worse.recovery["losses"].values())
    assert [note for note in worse.notes if note.startswith("recovery made the model worse on held-out samples")]
    assert worse.weights_sha256 == report.weights_sha256


def test_a_folder_can_be_recovered_alone(laboratory, tmp_path):
    pruned = laboratory.open_pruned()
    training = replace(TRAINING, lr=1e-3, losses=LossWeights(lm=0.0))
    settings = replace(SETTINGS, learning=replace(LEARNING, steps=24, training=training))
    after = mptk.recover(pruned, tmp_path / "recovered", settings).report
    kl = [row["kl"] for row in metrics(tmp_path / "recovered")]
    assert sum(kl[-4:]) < 0.9 * sum(kl[:4])
    assert after.families == Report.read(pruned).families
    assert verify(tmp_path / "recovered")


def test_budgets_count_what_they_say_and_kept_families_stay_whole_and_given_widths_stay(llama):
    settings = replace(BRIEF, budget="flops", sparsity=0.21, keep=("kv_groups", "q_heads"))
    report = mptk.prune(llama, None, settings).report
    dense, pruned = (report.cost[k]["flops"] for k in ("dense", "pruned"))
    assert 1 - pruned / dense == pytest.approx(0.21, abs=0.01)
    assert [name for name, f in report.families.items() if f["width"] < f["of"]] == ["ffn"]
    report = mptk.prune(llama, None, replace(BRIEF, widths={"ffn": 48}, sparsity=0.37)).report
    assert [report.families[name]["width"] for name in ("ffn", "kv_groups")] == [48, 2]
    assert report.sparsity == pytest.approx(0.37, abs=0.01)


def test_flaps_biases_go_through_recovery(tmp_path):
    gpt2 = save_word_model(testing.make_decoder("gpt2", pad_token_id=None), tmp_path / "gpt2")
    how = {"method": "flap", "families": ("ffn",), "widths": {"ffn": 48}, "learning": replace(LEARNING, steps=2)}
    report = mptk.prune(gpt2, tmp_path / "out", replace(SETTINGS, **how)).report
    assert any(name.endswith("bias") for name in report.trained)
    assert verify(tmp_path / "out")


def test_experts_stay_whole_unless_they_are_asked_for(tmp_path):
    values = {**llama_config(num_hidden_layers=1).to_dict(), "num_local_experts": 4, "num_experts_per_tok": 2}
    config = MixtralConfig(**{k: v for k, v in values.items() if k not in ("model_type", "architectures")})
    mixtral = save_word_model(MixtralForCausalLM(config), tmp_path / "mixtral")
    report = mptk.prune(mixtral, None, BRIEF).report
    assert report.families["experts"]["width"] == 4
    assert report.families["ffn"]["width"] < 80
    with expect_error(AnalysisError, name="experts"):
        mptk.prune(mixtral, tmp_path / "no", replace(SETTINGS, families=("experts",)))


HIDDEN = {"learning": replace(LEARNING, rank=0), "families": ("hidden",), "tolerance": 0.9}
AGAIN = {"target": "graph", "learning": replace(LEARNING, rank=0, gradient_checkpointing=True)}


@pytest.mark.parametrize(
    ("change", "name"),
    [(AGAIN, "gradient_checkpointing"), ({"target": "graph", **HIDDEN}, "rank"), (HIDDEN, "rank")],
)
def test_what_cannot_be_learned_is_said_early(llama, tmp_path, change, name):
    with expect_error(InputError, name=name):
        mptk.prune(llama, tmp_path / "out", replace(SETTINGS, **change))
    assert list(tmp_path.iterdir()) == []
