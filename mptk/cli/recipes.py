"""recipes: ``--config``, the options of a command from a YAML file (``mptk/config/recipe.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mptk.config.settings import Settings
from mptk.errors import MptkError, did_you_mean


def configured(context: typer.Context, file: Path | None) -> Path | None:
    """Make the options of a recipe file the defaults of this call.

    Raises:
        MptkError: the file cannot be read, or names an option that the command lacks or that a recipe may not set.
    """
    if file is None:
        return None
    from mptk.config.recipe import read_recipe, refused

    known: dict[str, Any] = {}
    for parameter in context.command.params:
        flags = [flag.removeprefix("--").replace("-", "_") for flag in parameter.opts if flag.startswith("--")]
        known |= dict.fromkeys(flags or [parameter.name], parameter)
    known = {name: found for name, found in known.items() if name not in ("config", "help")}
    values: dict[str, Any] = {}
    never = refused(Settings)
    for name, value in read_recipe(file).items():
        if name not in known:
            hint = did_you_mean(name, known, f"there are {', '.join(known)}")
            raise MptkError(f"{file} has {name!r}, which is not an option of `mptk {context.command.name}`; {hint}")
        if name in never:
            raise MptkError(f"{file} has {name!r}, which a recipe may not set; remove it, and type --{_flag(name)}")
        if value is not None:
            values[known[name].name] = _as_typed(value, known[name])
    context.default_map = values
    return file


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _as_typed(value: object, parameter: Any) -> object:
    """A value of a recipe as one would type it: lists with commas, pairs as A=B."""
    if isinstance(value, Mapping):
        value = [f"{name}={each}" for name, each in value.items()]
    many = getattr(parameter, "multiple", False)
    if isinstance(value, list):
        return list(map(str, value)) if many else ",".join(map(str, value))
    if isinstance(value, bool):  # YAML reads a bare `no` as false
        return value if getattr(parameter, "is_flag", False) else "yes" if value else "no"
    return [str(value)] if many else str(value)


Config = Annotated[
    Path | None,
    typer.Option(
        "--config", is_eager=True, callback=configured, help="Options from this YAML file; typed options win."
    ),
]
