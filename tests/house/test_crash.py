"""A short part of ``make crash``: a few commands are killed, and the next run ends as if nothing had been."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long  # one killed command is in width_search/test_shapes.py; `make crash` kills many
def test_killed_commands_lose_nothing_and_leave_nothing() -> None:
    """Two while masks are learned and the model is recovered, two while one is fetched."""
    scenes = [word for name in ("learn", "fetch") for word in ("--scene", name)]
    command = [sys.executable, "-m", "tests.crash", "--kills", "3", "--seed", "1", *scenes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert " 0 wrong" in done.stdout
