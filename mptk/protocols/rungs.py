"""rungs: how a search divides its tokens of text over rounds of successive halving."""

from __future__ import annotations

from mptk.config.settings import Settings
from mptk.errors import MptkError

JUDGED = 8
"""At most so many samples, or a quarter of as many as there are others, are what a search measures shapes on."""


def judged(samples: int) -> int:
    """How many samples a search holds out beside so many others."""
    return min(JUDGED, max(1, samples // 4))


def rungs(settings: Settings, shapes: int) -> list[tuple[int, int]]:
    """How many shapes each rung trains, and for how many steps. ``shapes``: those that there are.

    Raises:
        MptkError: the tokens do not suffice for a step of each.
    """
    alive = [min(settings.search_finalists, shapes)]
    while alive[-1] > 2:
        alive.append(-(-alive[-1] // 2))
    if alive[0] < 2 or not settings.search_tokens:
        return []
    step = settings.learning.training.batch * settings.length
    units = sum(count * 2**rung for rung, count in enumerate(alive))
    if settings.search_tokens < units * step:
        raise MptkError(
            f"{settings.search_tokens} tokens do not suffice to train {alive[0]} shapes by halves: a step has {step}, "
            f"so give {units * step} or more, fewer finalists, or a smaller --batch"
        )
    return [(count, settings.search_tokens * 2**rung // (units * step)) for rung, count in enumerate(alive)]


def searched(settings: Settings) -> int:
    """How many samples the shape is trained on that is trained longest."""
    planned = rungs(settings, settings.search_finalists) if settings.search else []
    return sum(steps for _, steps in planned) * settings.learning.training.batch
