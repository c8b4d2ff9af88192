"""Processes that work together: what is settled before they start. test_learning.py runs them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from inside import Inside

from mptk import MptkError, testing
from mptk.distributed import processes
from mptk.methods.maskprune.learner import adapt


@pytest.mark.parametrize(("architecture", "block"), [("llama", "LlamaDecoderLayer"), ("gpt2", "GPT2Block")])
def test_blocks_are_found_without_knowing_the_model_inside_an_adapter_too(architecture: str, block: str) -> None:
    model = testing.make_decoder(architecture)
    for wrapped in (model, adapt(model, 2, 0)):
        assert [type(b).__name__ for b in processes.find_module_blocks(wrapped)] == [
            block
        ] * model.config.num_hidden_layers
    assert processes.find_module_blocks(torch.nn.Linear(2, 2)) == []


def test_the_first_version_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch, inside: Inside) -> None:
    inside.gives("mptk.distributed.processes.connect_processes", SimpleNamespace(num_processes=2))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(MptkError, match="add --fsdp_version 2"):
        processes.make_accelerator("no")
