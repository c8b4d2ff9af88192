"""main: the command line. Each command is a function of one of these modules; its arguments are the options."""

from __future__ import annotations

from mptk.cli import advise, models, prune, use, verify
from mptk.cli.app import app, main

# Temporary, until features' commands are found by their entry points.
from mptk.features.packaged import command

__all__ = ["advise", "app", "command", "main", "models", "prune", "use", "verify"]

PANELS = {
    "Prune a model": ("analyze", "advise", "prune", "recover", "rung", "shapes"),
    "Check the result": ("report", "verify", "eval", "rerun"),
    "Use the result": ("generate", "bench", "export", "gguf", "push"),
    "Packaged models": ("models", "fetch"),
    "Look inside mptk": ("show", "passes", "ops"),
}
"""Title → commands, in the order in which ``mptk --help`` shows them."""

# Each module has registered its commands when it was imported above. typer shows them in the order of this list.
_TITLES = {name: title for title, names in PANELS.items() for name in names}
app.registered_commands.sort(key=lambda command: [*_TITLES].index(str(command.name)))
for each in app.registered_commands:
    each.rich_help_panel = _TITLES[str(each.name)]
