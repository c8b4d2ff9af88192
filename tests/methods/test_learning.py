"""prune --method maskprune and recover on tiny models: what a user gets, and that a run can be stopped and resumed.

It reaches for mptk.config.settings: training has settings of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from inside import Inside, Stopped, changed
from safetensors.torch import load_file
from test_pruning import gpt2  # noqa: F401 (a fixture)
from toy_checkpoints import llama_config
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import mptk
from mptk import MptkError, Plan, Report, verify
from mptk.config.learning import Learning, LossWeights, Training
from mptk.testing import save_word_model

TRAINING = Training(batch=4, micro=2, lr=3e-3, save_every=2)
LEARNING = Learning(steps=12, mask_share=0.5, rank=4, training=TRAINING)
SETTINGS = mptk.Settings(
    method="maskprune", sparsity=0.35, samples=8, length=32, align=8, onnx=False, learning=LEARNING
)


STAGES = ["learned masks", "trained model", "config", "stored weights", "rewritten graph", "reloaded checkpoint"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """Its head and its embedding are one weight, which shards and names must stay."""
    config = llama_config()
    config.tie_word_embeddings = True
    return save_word_model(LlamaForCausalLM(config), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def learned(llama, tmp_path_factory) -> Path:
    """An unbroken run."""
    out = tmp_path_factory.mktemp("learned") / "out"
    mptk.prune(llama, out, SETTINGS)
    return out


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_masks_are_learned_and_the_folder_is_an_ordinary_model(learned: Path) -> None:
    report = Report.read(learned)
    assert report.sparsity == pytest.approx(0.35, abs=0.01)
    assert all(d["relative"] <= d["tolerance"] for d in report.proof)
    assert [d["stage"] for d in report.proof] == STAGES
    model = AutoModelForCausalLM.from_pretrained(learned)
    assert model.config.intermediate_size == report.families["ffn"]["width"]
    assert not learned.with_name("out.run").exists()
    rows = metrics(learned)
    assert [r["step"] for r in rows if r["phase"] == "masks"] == list(range(1, 13)), "each of half a batch"
    assert [r["step"] for r in rows if r["phase"] == "recovery"] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "kl", "cost", "target", "z", "width/ffn", "tokens/s"} <= rows[0].keys()
    assert verify(learned)


COMMAND = [
    *("prune", "--sparsity", "0.35", "--samples", "8", "--length", "32", "--align", "8", "--no-onnx"),
    *("--steps", "12", "--mask-share", "0.5", "--rank", "4", "--batch", "4", "--micro", "2", "--lr", "3e-3"),
    *("--save-every", "2"),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


STOPS = {
    "a checkpoint being written": ("mptk.protocols.run_folder.write_weights", 2),
    "emission": ("mptk.targets.stock.write_checkpoint", 1),
    "after publishing": ("mptk.protocols.run_folder.RunFolder.remove", 1),
}


def test_a_run_stopped_again_and_again_ends_with_the_same_bits(llama: str, learned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = replace(SETTINGS, resume=True)
    for target, call in STOPS.values():
        with changed() as inside:
            inside.stop(target, call)
            with pytest.raises(Stopped):
                mptk.prune(llama, out, settings)
        with (tmp_path / "out.run" / "metrics.jsonl").open("a") as log:
            log.write('{"phase": "rec')
    mptk.prune(llama, out, settings)
    require_same_bits(learned, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def require_same_bits(learned: Path, out: Path) -> None:
    assert Plan.load(out / "plan.json").families == Plan.load(learned / "plan.json").families
    expected, seen = load_file(learned / "model.safetensors"), load_file(out / "model.safetensors")
    assert expected.keys() == seen.keys()
    assert all(torch.equal(expected[name], seen[name]) for name in expected)
    assert [(r["phase"], r["step"], r["loss"]) for r in metrics(out)] == [
        (r["phase"], r["step"], r["loss"]) for r in metrics(learned)
    ]


def reached(log: Path, phase: str, step: int) -> bool:
    if not log.is_file():
        return False
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    return any(r["phase"] == phase and r["step"] >= step for r in rows)


def launch(*options: str) -> list[str]:
    """The command on two processes."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    return [*accelerate, "--main_process_port", "0", *options, "-m", "mptk", *COMMAND]


def kill_all(process: subprocess.Popen) -> None:
    """A launcher's processes do not die with it."""
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)


def require_same(learned: Path, out: Path) -> None:
    one, two = (Report.read(folder).recovery for folder in (learned, out))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert {**two, "losses": {}} == {**one, "losses": {}}
    assert Plan.load(out / "plan.json").families == Plan.load(learned / "plan.json").families
    for one, two in zip(metrics(learned), metrics(out), strict=True):
        assert (one["phase"], one["step"]) == (two["phase"], two["step"])
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.long  # two processes with shards learn the same in a test below
def test_two_processes_learn_what_one_learns(llama: str, learned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*launch("--multi_gpu"), llama, "--out", str(out)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "trained on 2 processes" in Report.read(out).notes
    require_same(learned, out)


def sharded(llama: str, out: Path) -> list[str]:
    return [*launch("--use_fsdp", "--fsdp_version", "2"), "--resume", llama, "--out", str(out)]


def begin(llama: str, out: Path) -> Path:
    """Learn masks on one process, which stops. Gives the folder of the unfinished run."""
    with changed() as inside:
        inside.stop("mptk.protocols.run_folder.write_weights", 4)
        with pytest.raises(Stopped):
            mptk.prune(llama, out, SETTINGS)
    run = out.with_name("out.run")
    assert reached(run / "metrics.jsonl", "masks", 3)
    return run


def end_sharded(llama: str, learned: Path, out: Path) -> None:
    done = subprocess.run(sharded(llama, out), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "trained on 2 processes, its weights in shards (FSDP2)" in Report.read(out).notes
    require_same(learned, out)


def test_sharded_processes_go_on_where_one_stopped_and_end_where_it_would_have(
    llama: str, learned: Path, tmp_path: Path
) -> None:
    begin(llama, tmp_path / "out")  # masks on one process; then on two that hold the weights in shards
    end_sharded(llama, learned, tmp_path / "out")


@pytest.mark.long
def test_sharded_processes_that_are_killed_leave_whole_checkpoints_to_go_on_from(
    llama: str, learned: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = begin(llama, out)
    with subprocess.Popen(
        sharded(llama, out), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not reached(run / "metrics.jsonl", "recovery", 3):
            time.sleep(0.005)
        kill_all(process)
    assert not out.exists(), "it was over before it could be killed"
    state = load_file(run / "recovery-00000002.safetensors")
    width, part = Report.read(learned).families["ffn"]["width"], "base_model.model.model.layers.0.mlp.down_proj"
    for kind in ("parameter", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
        assert state[f"{kind}.{part}.lora_A.default.weight"].shape == (4, width)
        assert state[f"{kind}.{part}.lora_B.default.weight"].shape == (48, 4)
    end_sharded(llama, learned, out)


@pytest.mark.long
def test_activations_computed_again_change_no_loss_and_no_model(
    llama: str, learned: Path, tmp_path: Path, inside: Inside
) -> None:
    again = []

    def counted(forward: Callable[..., object], *args: object, **options: object) -> object:
        again.append(torch._C._current_graph_task_id() >= 0)
        return forward(*args, **options)

    inside.around("transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward", counted)
    settings = replace(LEARNING, gradient_checkpointing=True)
    mptk.prune(llama, tmp_path / "out", replace(SETTINGS, learning=settings))
    require_same(learned, tmp_path / "out")
    # A backward pass runs 3 blocks again: 4 of saliency, 6 steps of masks and 6 of recovery of 2 each.
    assert sum(again) == 3 * (4 + (6 + 6) * 2)


def test_half_precision_learns_much_the_same_and_what_it_learns_is_proven(
    llama: str, learned: Path, tmp_path: Path
) -> None:
    report = mptk.prune(llama, tmp_path / "out", replace(SETTINGS, learning=replace(LEARNING, precision="bf16"))).report
    first, exact = metrics(tmp_path / "out")[0]["loss"], metrics(learned)[0]["loss"]
    assert first != exact
    assert first == pytest.approx(exact, rel=5e-3)
    assert report.sparsity == pytest.approx(0.35, abs=0.01)
    assert [d["stage"] for d in report.proof] == STAGES


def test_a_configuration_that_fails_leaves_nothing_in_the_way(llama: str, tmp_path: Path, inside: Inside) -> None:
    inside.gives("accelerate.accelerator.filter_trackers", [])
    wanting = replace(SETTINGS, learning=replace(LEARNING, steps=2, tracker="wandb"))
    with pytest.raises(MptkError, match="the tracker wandb is not installed"):
        mptk.prune(llama, tmp_path / "out", wanting)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_a_trackers_files_come_with_the_folder(llama: str, tmp_path: Path) -> None:
    settings = replace(LEARNING, steps=2, tracker="tensorboard")
    mptk.prune(llama, tmp_path / "out", replace(SETTINGS, method="magnitude", learning=settings))
    (file,) = (tmp_path / "out" / "tracker").glob("events.*")
    assert b"recovery/loss" in file.read_bytes()


def test_all_weights_can_be_trained_a_shared_one_too(llama: str, tmp_path: Path) -> None:
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


def test_a_folder_can_be_recovered_alone(llama: str, tmp_path: Path) -> None:
    one_shot = replace(SETTINGS, method="wanda", learning=Learning())
    before = mptk.prune(llama, tmp_path / "pruned", one_shot).report
    training = replace(TRAINING, lr=1e-3, losses=LossWeights(lm=0.0))
    settings = replace(SETTINGS, learning=replace(LEARNING, steps=24, training=training))
    after = mptk.recover(tmp_path / "pruned", tmp_path / "recovered", settings).report
    kl = [row["kl"] for row in metrics(tmp_path / "recovered")]
    assert sum(kl[-4:]) < 0.9 * sum(kl[:4])
    assert after.families == before.families
    assert verify(tmp_path / "recovered")


def test_a_diverging_run_stops_and_keeps_its_last_checkpoint(llama: str, tmp_path: Path, inside: Inside) -> None:
    inside.gives("mptk.config.setting.Declared.check", None)  # bounds
    wild = replace(LEARNING, rank=0, training=replace(TRAINING, lr=1e30, clip=1e30), steps=8)
    one_shot = replace(SETTINGS, method="magnitude", learning=wild)
    with pytest.raises(MptkError, match=r"step \d+ of recovery: .*lower lr.*resume=True"):
        mptk.prune(llama, tmp_path / "out", one_shot)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.run" / "settings.json").is_file()


def test_budgets_count_what_they_say_and_kept_families_stay_whole(llama: str, tmp_path: Path) -> None:
    settings = replace(SETTINGS, budget="flops", sparsity=0.21, keep=("kv_groups", "q_heads"))
    report = mptk.prune(llama, tmp_path / "out", settings).report
    dense, pruned = (report.cost[k]["flops"] for k in ("dense", "pruned"))
    assert 1 - pruned / dense == pytest.approx(0.21, abs=0.01)
    changed = [name for name, f in report.families.items() if f["width"] < f["of"]]
    assert changed == ["ffn"]


def test_a_given_width_is_kept_and_the_others_are_learned_to_meet_the_budget(llama: str, tmp_path: Path) -> None:
    report = mptk.prune(llama, tmp_path / "out", replace(SETTINGS, widths={"ffn": 48}, sparsity=0.37)).report
    assert report.families["ffn"]["width"] == 48
    assert report.sparsity == pytest.approx(0.37, abs=0.01)
    assert report.families["kv_groups"]["width"] == 2


def test_flaps_biases_go_through_recovery(gpt2: str, tmp_path: Path) -> None:  # noqa: F811
    settings = replace(
        SETTINGS, method="flap", families=("ffn",), widths={"ffn": 48}, learning=replace(LEARNING, steps=2)
    )
    report = mptk.prune(gpt2, tmp_path / "out", settings).report
    assert any(name.endswith("bias") for name in report.trained)
    assert verify(tmp_path / "out")


def test_experts_stay_whole_unless_they_are_asked_for(tmp_path: Path) -> None:
    values = {**llama_config().to_dict(), "num_local_experts": 4, "num_experts_per_tok": 2}
    config = MixtralConfig(**{k: v for k, v in values.items() if k not in ("model_type", "architectures")})
    mixtral = save_word_model(MixtralForCausalLM(config), tmp_path / "mixtral")
    report = mptk.prune(mixtral, tmp_path / "out", replace(SETTINGS, learning=replace(LEARNING, steps=4))).report
    assert report.families["experts"]["width"] == 4
    assert report.families["ffn"]["width"] < 80
    with pytest.raises(MptkError, match="experts cannot be learned"):
        mptk.prune(mixtral, tmp_path / "no", replace(SETTINGS, families=("experts",)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"target": "graph", "learning": replace(LEARNING, rank=0, gradient_checkpointing=True)},
            "gradient_checkpointing=True needs the blocks of a class",
        ),
        (
            {"target": "graph", "learning": replace(LEARNING, rank=0), "families": ("hidden",), "tolerance": 0.9},
            'cannot be trained where hidden is cut, as norms follow it; use target="stock"',
        ),
        (
            {"learning": replace(LEARNING, rank=0), "families": ("hidden",), "tolerance": 0.9},
            "cannot be trained where hidden is cut",
        ),
    ],
)
def test_what_cannot_be_learned_is_said_early_and_is_no_unfinished_run(llama, tmp_path, change, message) -> None:
    for _ in range(2):
        with pytest.raises(MptkError, match=message):
            mptk.prune(llama, tmp_path / "out", replace(SETTINGS, **change))
