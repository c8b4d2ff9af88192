"""alternate: time several steps in turns, so that disturbances of the machine affect all of them equally."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

ROUND_S = 0.05
"""A shorter step, in seconds, is repeated within its turn, so that switching between steps does not dominate."""


def alternate(steps: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Milliseconds of each step in each round. The steps take turns; every other round reverses their order."""
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
    """Number of runs of ``step`` in one turn. This also warms it up."""
    for _ in range(2):
        start = time.perf_counter()
        step()
        elapsed = time.perf_counter() - start
        if elapsed > ROUND_S:
            return 1
    return min(50, int(ROUND_S / elapsed))
