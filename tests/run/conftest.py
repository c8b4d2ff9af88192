"""Two decoders that files share, and a machine of known rates."""

from __future__ import annotations

import pytest
from rates import keep_rates
from timed_runs import RATES
from toy_checkpoints import gpt2, llama  # noqa: F401 (fixtures)


@pytest.fixture
def rates(tmp_path, set_cache):
    """Every run of the test finds ``RATES``."""
    set_cache(tmp_path / "cache")
    keep_rates(RATES)
