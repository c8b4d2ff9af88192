"""Models with the inputs and gradients of their layers (``criteria_cases``), once in a process; one to train."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def gqa():
    from criteria_cases import make_case

    return make_case("llama")


@pytest.fixture(scope="session")
def gpt2():
    from criteria_cases import make_case

    return make_case("gpt2")


@pytest.fixture(scope="session")
def moe():
    from criteria_cases import make_case

    return make_case("mixtral")


@pytest.fixture(scope="module")
def llama(laboratory):
    """Its head and its embedding are one weight, which shards and names must stay."""
    from toy_checkpoints import llama_config
    from transformers import LlamaForCausalLM

    from mptk.testing import save_word_model

    def make(folder):
        save_word_model(LlamaForCausalLM(llama_config(tie_word_embeddings=True)), folder)

    return str(laboratory.keep("methods/tied", make))
