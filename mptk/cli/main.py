"""main: the command line. Each command is a function of one of these modules; its arguments are the options."""

from __future__ import annotations

from mptk.cli import advise, models, prune, use, verify
from mptk.cli.app import app, main

__all__ = ["advise", "app", "main", "models", "prune", "use", "verify"]
