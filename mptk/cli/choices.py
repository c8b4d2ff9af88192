"""choices: options with a few possible values: completion, a check before any work, a hint for a typing error.

The names are listed here so that ``--help`` imports no method. A test compares them with what is there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

import typer

from mptk.config.settings import COMPUTE_DTYPES, DTYPES, LAYERS, ONNX_DTYPES
from mptk.cost.budgets import BUDGETS
from mptk.errors import did_you_mean

METHODS = ("maskprune", "random", "magnitude", "wanda", "flap", "reap", "fisher", "taylor", "influence", "greedy")
TARGETS = ("stock", "graph")
SCHEMES = ("int8", "int4", "fp16")
OBJECTIVES = ("decode", "prefill")
RUNTIMES = ("torch", "onnx")
TEACHERS = ("live", "cached")
PRECISIONS = ("no", "bf16", "fp16")
TRACKERS = ("none", "tensorboard", "wandb")
DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")

_NUMBERED = re.compile(r"(cuda|xpu):\d+")


def one_of(known: Sequence[str], *groups: str) -> dict[str, Any]:
    """Arguments of ``typer.Option`` for one of ``known``, or of the entry points in ``groups``, by name."""

    def parse(text: str) -> str:
        return checked(text, _all(known, groups))

    return _option(parse, known, lambda incomplete: _all(known, groups))


def some_of(known: Sequence[str]) -> dict[str, Any]:
    """Arguments of ``typer.Option`` for names with commas between them."""

    def parse(text: str) -> str:
        for name in filter(None, map(str.strip, text.split(","))):
            checked(name, known)
        return text

    def complete(incomplete: str) -> list[str]:
        before = incomplete.rpartition(",")[0]
        given = before.split(",") if before else []
        return [",".join([*given, name]) for name in known if name not in given]

    return _option(parse, known, complete, separator=",")


def a_device() -> dict[str, Any]:
    """Arguments of ``typer.Option`` for a device, with a number where there may be several."""

    def parse(text: str) -> str:
        return text if _NUMBERED.fullmatch(text) else checked(text, DEVICES)

    return _option(parse, (*DEVICES[:3], "cuda:N", *DEVICES[3:]), lambda incomplete: DEVICES)


def checked(text: str, known: Sequence[str]) -> str:
    """``text``, if it is one of ``known``; else an error that names what is close to it."""
    if text in known:
        return text
    said = (f"{text!r} is not known.", did_you_mean(text, known, ""), f"Choose one of {', '.join(known)}.")
    raise typer.BadParameter(" ".join(filter(None, said)))


def _all(known: Sequence[str], groups: Sequence[str]) -> list[str]:
    plugins = (entry.name for group in groups for entry in entry_points(group=group))
    return list(dict.fromkeys([*known, *plugins]))


def _option(
    parse: Callable[[str], str],
    shown: Sequence[str],
    complete: Callable[[str], Sequence[str]],
    separator: str = "|",
) -> dict[str, Any]:
    def autocompletion(incomplete: str) -> list[str]:
        return [name for name in complete(incomplete) if name.startswith(incomplete)]

    return {"parser": parse, "autocompletion": autocompletion, "metavar": f"[{separator.join(shown)}]"}


BUDGET = one_of(tuple(BUDGETS))
OBJECTIVE = one_of(OBJECTIVES)
METHOD = one_of(METHODS, "mptk.methods", "mptk.criteria")
LAYER_WIDTHS = one_of(LAYERS)
TARGET = one_of(TARGETS, "mptk.targets")
TEACHER = one_of(TEACHERS)
PRECISION = one_of(PRECISIONS)
TRACKER = one_of(TRACKERS)
DTYPE = one_of(DTYPES)
COMPUTE_DTYPE = one_of(COMPUTE_DTYPES)
ONNX_DTYPE = one_of(ONNX_DTYPES)
QUANTIZE = some_of(SCHEMES)
RUNTIME = one_of(RUNTIMES)
DEVICE = a_device()
