"""The published folder that all tests of the proof read, and damage copies of."""

from __future__ import annotations

import pytest
from lab import Lab, write_lab

from mptk.testing import Laboratory


@pytest.fixture(scope="session")
def lab(laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Traced once in a process."""
    return Lab(laboratory.keep("proof", write_lab), tmp_path_factory.mktemp("lab"))
