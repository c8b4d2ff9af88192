"""Fixtures of pytest: ``pytest_plugins = ["mptk.testing.fixtures"]`` in a ``conftest.py``."""

from __future__ import annotations

import pytest

from mptk.testing.laboratory import Laboratory


@pytest.fixture(scope="session", name="laboratory")
def share_laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """One ``Laboratory`` for the run; the workers of pytest-xdist share it."""
    base = tmp_path_factory.getbasetemp()
    # xdist gives each worker a folder inside the run's folder.
    shared = base.parent if base.name.startswith("popen-") else base
    return Laboratory(shared / "laboratory")
