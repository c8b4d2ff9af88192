"""Makes a program that fails smaller, as long as it fails for the same reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from .catalogue import CATALOGUE, Step
from .oracles import Outcome, check
from .program import Program

HEADS = (("linear",), ("sum",))


def cause_of(outcome: Outcome) -> str:
    """What failures of one cause have in common: the verdict, and the error's place or the oracles that differ."""
    return f"{outcome.verdict}: " + re.split(r": | \(| differ", outcome.cause)[0]


def reduced(program: Program, outcome: Outcome) -> Program:
    """The smallest program that greedy steps lead to."""
    cause = cause_of(outcome)
    while True:
        for smaller in _smaller(program):
            if _fails(smaller, cause):
                program = smaller
                break
        else:
            return program


def _fails(program: Program, cause: str) -> bool:
    try:
        return cause_of(check(program)) == cause
    except Exception:
        return False


def _smaller(program: Program) -> Iterator[Program]:
    """Programs that are simpler in one respect, the largest simplifications first."""
    for i in range(len(program.steps)):
        yield replace(program, steps=program.steps[:i] + program.steps[i + 1 :])
    if program.form != "tensor":
        yield replace(program, form="tensor", heads=program.heads[:1])
    if len(program.heads) > 1:
        yield replace(program, heads=program.heads[:-1])
    for heads in HEADS[: HEADS.index(program.heads) if program.heads in HEADS else None]:
        yield replace(program, heads=heads)
    for i, step in enumerate(program.steps):
        for simpler in _simpler(step):
            yield replace(program, steps=(*program.steps[:i], simpler, *program.steps[i + 1 :]))


def _simpler(step: Step) -> Iterator[Step]:
    """The step with one option at its first choice, or its inputs at the newest value."""
    if any(step.inputs):
        yield replace(step, inputs=(0,) * len(step.inputs))
    for name, values in CATALOGUE[step.kind].options.items():
        if step.options[name] != values[0]:
            yield replace(step, options={**step.options, name: values[0]})
