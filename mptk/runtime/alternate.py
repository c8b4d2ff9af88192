"""turns: timing several things against each other, so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

ROUND_S = 0.05
"""A step shorter than this is repeated within its turn, so that the change of sides does not dominate it."""


def alternate(steps: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Milliseconds of each step in each round. The steps take turns; the order is reversed every other round."""
    repeats = [_repeats(step) for step in steps]
    times: list[list[float]] = [[] for _ in steps]
    order = list(range(len(steps)))
    for _ in range(rounds):
        for index in order:
            start = time.perf_counter()
            for _ in range(repeats[index]):
                steps[index]()
            times[index].append((time.perf_counter() - start) / repeats[index] * 1000)
        order.reverse()
    return times


def _repeats(step: Callable[[], None]) -> int:
    """Runs of ``step`` in one turn. Running it here warms it up, too."""
    for _ in range(2):
        start = time.perf_counter()
        step()
        elapsed = time.perf_counter() - start
        if elapsed > ROUND_S:
            return 1
    return min(50, int(ROUND_S / elapsed))
