"""Models with the inputs and gradients of their layers (``criteria_cases``), once in a process; one to train."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def gqa():
    import criteria_cases

    return criteria_cases.grouped_queries()


@pytest.fixture(scope="session")
def gpt2():
    import criteria_cases

    return criteria_cases.fused_heads()


@pytest.fixture(scope="session")
def moe():
    import criteria_cases

    return criteria_cases.packed_experts()


@pytest.fixture(scope="module")
def llama(laboratory):
    """Its head and its embedding are one weight, which shards and names must stay."""
    from toy_checkpoints import llama_config
    from transformers import LlamaForCausalLM

    from mptk.testing import save_word_model

    def make(folder):
        config = llama_config()
        config.tie_word_embeddings = True
        save_word_model(LlamaForCausalLM(config), folder)

    return str(laboratory.keep("methods/tied", make))
