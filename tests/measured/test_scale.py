"""The benchmark of large models: its checkpoints are real ones, and its measurements see what a command does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import scale, scale_checkpoint
from benchmarks.scale import measured, read_and_write, table
from benchmarks.scale_checkpoint import config_of, make_checkpoint
from mptk import Plan

SIZES = {"layers": 3, "hidden": 48, "ffn": 96, "heads": 6, "kv_heads": 2, "vocab": 301}
SMALL = {"shard_bytes": 30_000, "characters": 2000}
EMBEDDING, BLOCK = 301 * 48, 48 * 48 * 2 + 48 * 16 * 2 + 3 * 48 * 96 + 2 * 48


def test_a_synthetic_checkpoint_is_a_stock_one_in_bf16(tmp_path):
    make_checkpoint(tmp_path, config_of(**SIZES), **SMALL)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        with safe_open(shard, "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    ids = AutoTokenizer.from_pretrained(tmp_path)("The quick fox", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()
    assert Plan.load(tmp_path / "plan.json").widths == {"ffn": 32}


def test_a_seed_gives_the_same_files_and_another_seed_others(tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_checkpoint(tmp_path / folder, config_of(**SIZES), seed, **SMALL)
    for file in ("model-00001-of-00007.safetensors", "plan.json", "text.txt"):
        same, other = ((tmp_path / folder / file).read_bytes() for folder in ("b", "c"))
        assert (tmp_path / "a" / file).read_bytes() == same != other


def test_the_sizes_that_bounds_are_made_of():
    sizes = scale_checkpoint.shape_of(scale_checkpoint.skeleton(config_of(**SIZES)))
    parameters = 2 * EMBEDDING + 3 * BLOCK + 48
    held = {"block_bytes": 4 * BLOCK, "tensor_bytes": 4 * EMBEDDING}
    assert sizes == {"parameters": parameters, "bytes": 2 * parameters, **held}


def test_memory_of_a_command_and_of_its_children_is_seen(tmp_path):
    hold = "import time; held = b'x' * 150_000_000; time.sleep(1)"
    both = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}; child.wait()"
    alone = measured(["-c", hold], tmp_path / "log", threads=1)
    assert 150e6 < alone["anonymous_bytes"] < 200e6
    assert alone["peak_bytes"] > 150e6
    assert measured(["-c", both], tmp_path / "log", threads=1)["anonymous_bytes"] > 300e6
    assert "failed" not in alone


def test_a_failed_command_says_so(tmp_path):
    row = measured(["-c", "raise SystemExit('no such thing')"], tmp_path / "log", threads=1)
    assert row["failed"] == "exit 1: no such thing"
    assert "analyze tiny failed: exit 1: no such thing" in table([row | {"row": "analyze", "shape": "tiny"}])


def test_a_copy_writes_as_many_bytes_as_it_is_told(tmp_path):
    for name, size in (("a", 3_000_000), ("b", 2_000_000)):
        (tmp_path / name).write_bytes(name.encode() * size)
    scratch, kept = tmp_path / "copy", tmp_path / "kept"
    kept.touch()
    os.link(kept, scratch)  # it is written into, and then unlinked
    read_and_write([tmp_path / "a", tmp_path / "b"], 4_000_000, scratch)
    assert not scratch.exists()
    assert kept.read_bytes() == b"a" * 3_000_000 + b"b" * 1_000_000


class IdleBench(scale.Bench):
    """Its commands do nothing, with a model of one size."""

    def checkpoint(self, shape: str, weights: bool = True) -> tuple[Path, dict[str, int]]:
        return self.work, {"block_bytes": 500_000_000, "tensor_bytes": 1}

    def run(self, command: str, **how: Any) -> scale.Row:
        return super().run("-c pass", **how)


def test_the_bound_is_a_gigabyte_and_three_blocks(tmp_path):
    row = IdleBench(tmp_path, 1, "", None, 1, "").command("analyze", "tiny")
    assert row["bound_bytes"] == 2_500_000_000
    assert row["peak_ratio"] == pytest.approx(row["peak_bytes"] / 2.5e9, abs=1e-3)
