"""Draws the description of a program from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from .catalogue import CATALOGUE, Step
from .program import FORMS, SOURCES, WIDTHS, Program

DRAWN_HEADS = ("linear", "sum", "sum", "mean", "mean", "last", "flat", "tied")
"""Sums and means without weights come often: they see whether removed channels are really zero."""
Choose = Callable[[Sequence[Any]], Any]
LENGTHS = (1, 2, 2, 3, 3, 3, 4, 5)
BACK = (0, 0, 0, 1, 1, 2, 3, 4)
"""How far back an input lies: mostly at the newest value, so that few steps stand beside the others."""


def describe(choose: Choose) -> Program:
    """A program of one to five steps. A third have any nesting of up to three outputs."""
    source, width = choose(SOURCES), choose(WIDTHS)
    steps = tuple(_step(choose) for _ in range(choose(LENGTHS)))
    if choose((False, False, True)):
        heads, form = tuple(choose((*DRAWN_HEADS, "raw")) for _ in range(choose((1, 2, 3)))), choose(FORMS)
    else:
        heads, form = (choose(DRAWN_HEADS),), "tensor"
    return Program(source, width, steps, heads, form, choose(range(1000)))


def _step(choose: Choose) -> Step:
    """A family first, so that one with many kinds does not crowd out the others."""
    family = choose(sorted({kind.family for kind in CATALOGUE.values()}))
    kind = choose([k for k in CATALOGUE.values() if k.family == family])
    inputs = tuple(choose(BACK) for _ in range(kind.inputs))
    return Step(kind.name, inputs, {name: choose(values) for name, values in kind.options.items()})


def seeded(seed: int, family: str = "") -> Program:
    """The program of a seed; with a ``family``, the first one that it draws with a step of that family."""
    choose = random.Random(seed).choice
    while True:
        program = describe(choose)
        if not family or any(CATALOGUE[step.kind].family == family for step in program.steps):
            return program
