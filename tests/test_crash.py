"""A short part of ``make crash``: a few commands are killed, and the next run ends as if nothing had been."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_killed_commands_lose_nothing_and_leave_nothing() -> None:
    """Of each kind of kill two: at a rename, at a word of a stage, at a random moment."""
    command = [sys.executable, "-m", "tests.crash", "--kills", "6", "--scene", "report", "--scene", "fetch"]
    done = subprocess.run(
        [*command, "--seed", "1"],
        cwd=ROOT,
        env=os.environ | {"MPTK_CACHE": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert " 0 wrong" in done.stdout
