"""replan: a run by minutes plans again what is left of it, by the clock and by the rates that it has shown.

``minutes.py`` plans before the run, at the rates of an idle machine. Here training gets its time (``TimeLimit``),
fitting gets fewer windows and epochs, and quality is measured on fewer windows, so that the run ends with its minutes.
What the user typed stays.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import torch

from mptk.config import Settings, with_keywords
from mptk.cost.limit import DISTILLED_STEPS, TimeLimit
from mptk.distributed.processes import run_once
from mptk.protocols import Chosen, Compiled, Kept, Prepared, SampleSets
from mptk.run.dense_types import DENSE_TYPES
from mptk.run.minutes import choose_amounts
from mptk.run.run import Run

DISTILLING, FITTING, MEASURING = "distil", "reconstruct", "measure"
"""Stages of an estimate that do less if time is short, or are left out."""
ENDING = ("prove", DENSE_TYPES, "write")
"""Those that follow whatever the time."""
STARTING = 1.5
"""Steps' time that recovery takes besides its steps: models are placed, and held-out samples measured at both ends."""
LEAST_MEASURED = 4
"""Fewest windows to measure on if time is short: the figure is then about twice as uncertain as of 16."""
LEAST_SCORING = 0.05
"""Least share of the minutes in which units are scored."""
REPLANNED = "replanned"
"""Name of the numbers that were planned again, in the folder of an unfinished run."""


def limit_masks(prepared: Prepared, run: Run) -> Run:
    """The run with the time that learning masks has, if minutes choose its steps."""
    return replace(run, limit=make_limit(prepared.settings, run))


def limit_recovery(settings: Settings, chosen: Chosen, run: Run) -> TimeLimit | None:
    """The time that recovery has after ``chosen``, whose steps count among the run's."""
    limit = make_limit(settings, run)
    if limit is None or run.estimator is None:
        return None
    # Consumers are fitted by now.
    found = run.estimator.estimate(settings).seconds
    fitted, measuring = limit.before + found.get(FITTING, 0.0) + limit.distilling, found[MEASURING]
    began, least, most = limit.began + chosen.steps * chosen.seconds, limit.least, limit.most
    return replace(
        limit,
        began=began,
        before=fitted,
        elastic=measuring,
        distilling=0.0,
        least=max(0, least - chosen.steps),
        most=max(0, most - chosen.steps),
    )


def make_limit(settings: Settings, run: Run) -> TimeLimit | None:
    """The time of the steps of a run, before masks are learned; None if minutes do not choose their number."""
    timed = run.timed
    if timed is None or run.estimator is None or "steps" not in timed.names or not settings.steps:
        return None
    found = run.estimator.estimate(settings).seconds
    whole, after = sum(found.values()), sum(found.get(name, 0.0) for name in ENDING)
    elastic, distilling = found.get(FITTING, 0.0) + found[MEASURING], found.get(DISTILLING, 0.0)
    return TimeLimit(
        began=timed.began,
        ends=timed.ends,
        before=whole - found["train"] - after - elastic - distilling,
        # Scoring keeps its share of the run, and has at least a small one: of a small model its estimate is too low.
        scoring=max(LEAST_SCORING, found.get("score", 0.0) / whole) * (timed.ends - timed.began),
        after=after,
        elastic=elastic,
        distilling=distilling,
        least=timed.least,
        most=timed.most,
    )


def count_recovery_steps(prepared: Prepared, chosen: Chosen, limit: TimeLimit | None) -> int:
    """The steps with which recovery begins: what the steps that learned masks left, or by the rate of these.

    By minutes there may be no time for any.
    """
    if limit is None or not chosen.seconds:
        return prepared.settings.steps - chosen.steps
    now = time.monotonic()
    pace, start = limit.measure_pace(now), STARTING * chosen.seconds
    return run_once(partial(limit.fit_steps, now, 0, chosen.seconds, pace, start))


def plan_fitting(prepared: Prepared, chosen: Chosen, sets: SampleSets, run: Run) -> tuple[Prepared, SampleSets]:
    """Before consumers are fitted: as many windows and epochs as belong to the steps for which there is time."""
    if run.limit is None or run.timed is None or not chosen.steps:
        return prepared, sets
    s, names = prepared.settings, run.timed.names
    limit = replace(run.limit, began=run.limit.began + chosen.steps * chosen.seconds)

    def plan() -> Kept:
        now = time.monotonic()
        steps = limit.fit_steps(now, chosen.steps, chosen.seconds, limit.measure_pace(now))
        epochs = s.distil_epochs if steps > DISTILLED_STEPS else 0
        found = choose_amounts(s, steps) | {"distil_epochs": epochs or 0}
        windows = min(found["samples"], s.windows)
        numbers = {"samples": windows if "samples" in names else s.windows}
        numbers |= {"distil_epochs": found["distil_epochs"] if "distil_epochs" in names else s.distil_epochs or 0}
        return Kept({name: torch.tensor(number) for name, number in numbers.items()})

    numbers = {name: int(number) for name, number in run.keep(REPLANNED, plan, once=True).tensors.items()}
    return replace(prepared, settings=with_keywords(s, numbers)), replace(
        sets, calibration=sets.calibration[: numbers["samples"]]
    )


def take_steps(compiled: Compiled, steps: int) -> Compiled:
    """The compiled model with the number of steps that recovery took, if that differs from what was planned."""
    prepared, taken = compiled.prepared, compiled.chosen.steps
    learning = replace(prepared.settings.learning, steps=taken + steps)
    # So that the same numbers, typed, learn masks in as many steps again.
    if taken and learning.mask_steps != taken:
        learning = replace(learning, mask_share=taken / (taken + steps))
    return replace(compiled, prepared=replace(prepared, settings=replace(prepared.settings, learning=learning)))


def plan_measurement(compiled: Compiled, sets: SampleSets, run: Run) -> tuple[Compiled, SampleSets]:
    """Before quality is measured: fewer windows, if there is no time for all."""
    prepared, timed, planned = compiled.prepared, run.timed, len(sets.evaluation)
    if timed is None or run.estimator is None or "eval_windows" not in timed.names:
        return compiled, sets
    found = run.estimator.estimate(prepared.settings).seconds
    measuring = found[MEASURING] + found.get(DENSE_TYPES, 0.0)

    def count() -> int:
        now = time.monotonic()
        pace = max(1.0, (now - timed.began) / (sum(found.values()) - measuring))
        fits = int(planned * max(0.0, timed.ends - now) / (pace * measuring))
        return min(planned, max(LEAST_MEASURED, fits))

    if (windows := run_once(count)) == planned:
        return compiled, sets
    settings = replace(prepared.settings, eval_windows=windows)
    return replace(compiled, prepared=replace(prepared, settings=settings)), replace(
        sets, evaluation=sets.evaluation[:windows]
    )


def record_numbers(run: Run, compiled: Compiled) -> Run:
    """The run with the numbers that were planned again, for its recipe."""
    if run.timed is None:
        return run
    s, learning = compiled.prepared.settings, compiled.prepared.settings.learning
    own = replace(run.settings.learning, steps=learning.steps, mask_share=learning.mask_share)
    settings = replace(
        run.settings, learning=own, samples=s.samples, distil_epochs=s.distil_epochs, eval_windows=s.eval_windows
    )
    return replace(run, settings=settings)
