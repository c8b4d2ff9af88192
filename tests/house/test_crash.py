"""A short part of ``make crash``: a command is killed, and the next run ends as if nothing had been."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_killed_command_loses_nothing_and_leaves_nothing():
    """One that learns masks and recovers the model."""
    command = [sys.executable, "-m", "tests.crash", "--kills", "1", "--seed", "1", "--scene", "learn"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert " 0 wrong" in done.stdout
