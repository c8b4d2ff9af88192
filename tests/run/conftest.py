"""Two decoders that files share, and a machine of known rates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rates import keep_rates
from timed_runs import RATES
from toy_checkpoints import gpt2, llama  # noqa: F401 (fixtures)


@pytest.fixture
def rates(tmp_path: Path, set_cache: Callable[[object], None]) -> None:
    """Every run of the test finds ``RATES``."""
    set_cache(tmp_path / "cache")
    keep_rates(RATES)
