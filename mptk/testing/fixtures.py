"""Fixtures of pytest: ``pytest_plugins = ["mptk.testing.fixtures"]`` in a ``conftest.py``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mptk.testing.laboratory import Laboratory


@pytest.fixture(scope="session", name="laboratory")
def share_laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """One ``Laboratory`` for the run, or for all runs that name its folder by ``MPTK_LABORATORY``."""
    return Laboratory(place_laboratory(tmp_path_factory.getbasetemp()))


def place_laboratory(base: Path) -> Path:
    """The laboratory's folder, which the workers of pytest-xdist share. ``base``: pytest's folder of this process.

    Runs that name one by ``MPTK_LABORATORY`` must be of the same code, since nothing in it is made again.
    """
    if named := os.environ.get("MPTK_LABORATORY"):
        return Path(named).absolute()
    # xdist gives each worker a folder inside the run's folder.
    return (base.parent if base.name.startswith("popen-") else base) / "laboratory"
