"""limit: how many steps of training fit into what is left of a run's minutes, at the rate that the steps have shown."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_SCORED = 2
"""Fewest batches on which units are scored."""
DISTILLED_STEPS = 20
"""Minutes choose local distillation if this number of steps still fits: further steps bring less
(``benchmarks/maskprune.md``)."""
TICK = 1e-9
"""Least seconds of a step: a clock may stand still over one."""


@dataclass(frozen=True)
class TimeLimit:
    """The time of a run as its training sees it. Times are of the clock, since a user's minutes are.

    ``began``, ``ends``: of the run, on ``time.monotonic``; time that was spent in steps already is added to ``began``.
    ``before``, ``after``: seconds as estimated, of all that comes before the steps and after the last one. ``elastic``,
    ``distilling``: of what also comes after them, but does less on a slow machine (on fewer windows), or is left out.
    ``scoring``: seconds in which units may be scored. ``least``, ``most``: bounds of the number of steps.
    """

    began: float
    ends: float
    before: float
    scoring: float
    after: float
    elastic: float
    distilling: float
    least: int
    most: int

    def measure_pace(self, now: float) -> float:
        """How many times as long as estimated the run took to get to its steps, at least 1.

        What comes after the steps is expected to be as slow. A resumed run has read what others wait for, and says
        nothing of the machine: hence at least 1.
        """
        return max(1.0, (now - self.began) / self.before)

    def fit_batches(self, count: int, seconds: float) -> int:
        """How many of ``count`` batches to score on, if one takes ``seconds``: as many as scoring's time holds."""
        return min(count, max(LEAST_SCORED, int(self.scoring / max(seconds, TICK))))

    def fit_steps(self, now: float, done: float, seconds: float, pace: float = 1.0, extra: float = 0.0) -> int:
        """How many steps the phase should have in all.

        Args:
            now: on ``time.monotonic``.
            done: steps that are taken.
            seconds: of each further step, with its share of checkpoints.
            pace: of what comes after the steps (``measure_pace``).
            extra: seconds at the end of the steps, as for the last checkpoint.
        """
        left = self.ends - now - pace * self.after - self.elastic - extra
        with_distilling, without = (
            int(done + max(0.0, time) / max(seconds, TICK)) for time in (left - pace * self.distilling, left)
        )
        fits = with_distilling if with_distilling > DISTILLED_STEPS else min(without, DISTILLED_STEPS)
        return max(self.least, min(self.most, fits if self.distilling else without))
