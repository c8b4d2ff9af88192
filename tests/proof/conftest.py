"""The published folder that all tests of the proof read, and damage copies of."""

from __future__ import annotations

import pytest
from lab import Lab, write_lab


@pytest.fixture(scope="session")
def lab(laboratory, tmp_path_factory):
    """Traced once in a process."""
    return Lab(laboratory.keep("proof", write_lab), tmp_path_factory.mktemp("lab"))
