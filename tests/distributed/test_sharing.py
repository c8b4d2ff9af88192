"""Several processes share calibration: each runs its part of the windows, and all find what one finds.

tests/methods/test_learning.py lets them train together.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sharing_worker import found

from mptk import testing
from mptk.distributed import processes
from mptk.distributed.processes import Sharing, share_batches
from mptk.methods.maskprune.learner import adapt

HERE = Path(__file__).parent


def test_two_processes_find_what_one_finds(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "ACCELERATE_USE_CPU": "1"}
    command = [*launcher, str(HERE / "sharing_worker.py"), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    expected = found()
    assert one.keys() == two.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(one[name], two[name]), name
        torch.testing.assert_close(one[name], tensor, rtol=1e-5, atol=1e-4 if name.startswith("distilled") else 1e-6)
    for rank in range(2):
        with safe_open(tmp_path / f"{rank}.safetensors", "pt") as file:
            assert file.metadata() == {"rank": "0", "refused": "sparsity", "fsdp": "fsdp_version"}


def test_every_batch_has_one_process_and_a_process_alone_shares_nothing():
    for count in (1, 2, 3, 5):
        for batches in range(count, 12):
            parts = [Sharing(count, index).own(range(batches)) for index in range(count)]
            assert [b for part in parts for b in part] == list(range(batches))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert share_batches(3) == Sharing()
    ones = torch.ones(2)
    assert Sharing().sum_all(ones) is ones
    assert Sharing().gather(ones) == [ones]


@pytest.mark.parametrize(("architecture", "block"), [("llama", "LlamaDecoderLayer"), ("gpt2", "GPT2Block")])
def test_blocks_are_found_without_knowing_the_model_inside_an_adapter_too(architecture, block):
    model = testing.make_decoder(architecture)
    for wrapped in (model, adapt(model, 2, 0)):
        found = [type(b).__name__ for b in processes.find_module_blocks(wrapped)]
        assert found == [block] * model.config.num_hidden_layers
    assert processes.find_module_blocks(torch.nn.Linear(2, 2)) == []
