"""main: the command line. Each command is a function of one of these modules; its arguments are the options."""

from __future__ import annotations

from importlib import import_module

from mptk.cli import features, models, prune, use, verify
from mptk.cli.app import app, main, register_all
from mptk.plugins import list_features

__all__ = ["app", "features", "main", "models", "prune", "use", "verify"]

PANELS = {
    "Prune a model": ("analyze", "prune", "recover"),
    "Check the result": ("report", "verify", "eval"),
    "Use the result": ("generate", "bench", "export"),
    "Look inside mptk": ("show", "passes", "ops", "features"),
}
"""Title → the core's commands, in the order in which ``mptk --help`` shows them. Features say where theirs stand."""

# Each module registered its commands when it was imported above; those of features do so here.
for feature in list_features().values():
    for module in dict.fromkeys([*(command.module for command in feature.commands), *feature.options]):
        import_module(module)
register_all(PANELS)
