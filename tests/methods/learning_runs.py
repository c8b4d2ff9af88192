"""Short training of a tiny model: its settings, in Python and as a command, and what two runs have in common."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from inside import Stopped
from safetensors.torch import load_file

import mptk
from mptk import Plan, Report
from mptk.config import Learning, Training
from mptk.progress import Progress

TRAINING = Training(batch=4, micro=2, lr=3e-3, save_every=2)
LEARNING = Learning(steps=8, mask_share=0.5, rank=4, training=TRAINING)
SETTINGS = mptk.Settings(
    method="maskprune", sparsity=0.35, samples=8, length=32, eval_windows=2, align=8, onnx=False, learning=LEARNING
)

COMMAND = [
    *("prune", "--sparsity", "0.35", "--samples", "8", "--length", "32", "--align", "8", "--no-onnx"),
    *("--eval-windows", "2", "--steps", "8", "--mask-share", "0.5", "--rank", "4", "--batch", "4"),
    *("--micro", "2", "--lr", "3e-3", "--save-every", "2"),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def require_same_bits(learned: Path, out: Path) -> None:
    assert Plan.load(out / "plan.json").families == Plan.load(learned / "plan.json").families
    expected, seen = load_file(learned / "model.safetensors"), load_file(out / "model.safetensors")
    assert expected.keys() == seen.keys()
    assert all(torch.equal(expected[name], seen[name]) for name in expected)
    one, two = ([(r["phase"], r["step"], r["loss"]) for r in metrics(folder)] for folder in (learned, out))
    assert two == one


def require_same(learned: Path, out: Path) -> None:
    one, two = (Report.read(folder).recovery for folder in (learned, out))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert {**two, "losses": {}} == {**one, "losses": {}}
    assert Plan.load(out / "plan.json").families == Plan.load(learned / "plan.json").families
    for one, two in zip(metrics(learned), metrics(out), strict=True):
        assert (one["phase"], one["step"]) == (two["phase"], two["step"])
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def shard(model: str, out: Path, command: Sequence[str] = COMMAND) -> list[str]:
    """The command on two processes that hold the weights in shards."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    options = ["--main_process_port", "0", "--use_fsdp", "--fsdp_version", "2"]
    return [*accelerate, *options, "-m", "mptk", *command, "--resume", model, "--out", str(out)]


def stop_at(stage: str, done: int) -> Progress:
    """A progress that stops a run after a step."""

    def stop(now: str, so_far: int, total: int, figures: str = "") -> None:
        if (now, so_far) == (stage, done):
            raise Stopped

    return stop
