"""Random programs: what the analysis offers is cut right, or it refuses by name. `make fuzz` tries thousands more."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tests import eager_modules
from tests.programs import CATALOGUE, check, seeded


def list_kinds(seeds: Iterable[int]) -> set[str]:
    return {step.kind for seed in seeds for step in seeded(seed).steps}


def choose_seeds(first: int, most: int) -> list[int]:
    """The ``first`` seeds, and of those below ``most`` as few as have every kind of step."""
    seeds = list(range(first))
    missing = set(CATALOGUE) - list_kinds(seeds)
    while missing:
        seeds.append(max(range(first, most), key=lambda seed: len(list_kinds([seed]) & missing)))
        missing -= list_kinds(seeds[-1:])
    return seeds


SEEDS = choose_seeds(8, 200)
OTHERS = {2: "without family", 8: "without family", 16: "refused", 23: "without family", 32: "without family"}
"""Seed → what becomes of its program, if it is not cut and proven."""


@pytest.mark.parametrize("seed", SEEDS)
def test_a_program_is_cut_right_or_refused_by_name(seed):
    """`python -m tests.fuzz --program DESCRIPTION` makes the description of a failure smaller."""
    outcome = check(seeded(seed))
    assert outcome.verdict == OTHERS.get(seed, "proven"), f"{outcome.cause}\n  {seeded(seed)}"


@pytest.mark.parametrize("seed", range(4))
def test_a_module_with_python_in_its_forward_is_cut_right_or_refused(seed):
    outcome = eager_modules.check(eager_modules.described(seed))
    assert outcome.verdict in (eager_modules.EQUAL, eager_modules.REFUSED), outcome.cause


def test_a_description_is_one_line_that_gives_the_program_back():
    for seed in range(50):
        program = seeded(seed)
        assert "\n" not in repr(program)
        assert repr(type(program).parse(repr(program))) == repr(program)
