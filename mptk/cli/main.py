"""main: the command line. Each command is a function of a module here, its options the function's arguments."""

from __future__ import annotations

from mptk.cli import inspect, models, prune, use
from mptk.cli.app import app, main

__all__ = ["app", "inspect", "main", "models", "prune", "use"]
