"""Settings that all tests share: the same examples and numbers in every run, and no advice about tiny configs."""

from __future__ import annotations

import os

import hypothesis
import numpy as np
import pytest
import torch
import transformers

hypothesis.settings.register_profile("same", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("same")
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def _same_numbers(request):
    """A test draws the same random numbers whichever tests ran before it in its process."""
    torch.manual_seed(0)
    if hasattr(request.module, "RNG"):
        request.module.RNG = np.random.default_rng(0)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Text that models of the tests write goes into a cache of the tests' own."""
    if "MPTK_CACHE" in os.environ:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPTK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory, _own_cache):
    """Name → a tiny model, an export, a pruned folder, …, for tests that damage copies of them."""
    from tests.bad_inputs.shared import shared_folders

    return shared_folders(tmp_path_factory.mktemp("tiny"))
