"""minutes: the numbers of a run that the caller left open are as large as its minutes allow.

``complete_settings`` is the only place where settings are completed: nothing below it asks again.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

import torch

from mptk.config import MOST_STEPS, SAMPLES, Settings, with_keywords
from mptk.conversions import needs_fit
from mptk.cost.estimate import Estimate, describe_duration, measure_machine
from mptk.cost.limit import DISTILLED_STEPS
from mptk.errors import InputError
from mptk.io import data
from mptk.ir import Plan
from mptk.methods import find_method
from mptk.progress import CALLED
from mptk.protocols import PROOF_SHAPE, find_device, list_stages, should_reconstruct
from mptk.run.amounts import describe_numbers, should_learn_masks
from mptk.run.estimate import Estimator

LEAST_STEPS, LEAST_LATER = 5, 2
"""Fewest steps that minutes choose for a method that learns: two for the masks. A run that has begun, and is slower
than planned, takes only these."""
MOST_TIMED_STEPS = 10**6
"""Most steps that minutes choose: a bound for the bisection."""
WINDOWS, WINDOWS_PER_STEP = (16, 96), 12
"""Fewest and most calibration windows that minutes choose, and how many for each step beyond the fewest. In a run of a
few minutes they are worth more than steps (``benchmarks/maskprune.md``): of SmolLM2-135M in bfloat16 twelve windows
took 5 s of one core, and a step 7 s. As the model takes long to write one, it writes one for each step."""
EPOCHS = 3
"""Minutes choose these epochs of local distillation if ``DISTILLED_STEPS`` still fit."""
FASTER = 1.5
"""A run of minutes computes in bfloat16 on a machine that multiplies it at least this many times as fast as float32."""
SHORTER = {"calibration data": "text with --data", "measure": "fewer --eval-windows", "write": "--no-onnx"}
"""Stage of a run → what makes it shorter."""

NUMBERS = ("minutes", "steps", "samples", "distil_epochs", "compute_dtype")
"""What may be left open, beside the numbers of features."""


@dataclass(frozen=True)
class TimedRun:
    """The minutes of a run while it runs (``replan.py``).

    ``began``, ``ends``: of the run, on ``time.monotonic``. ``names``: the numbers that the minutes choose. ``least``,
    ``most``: bounds of the number of steps.
    """

    began: float
    ends: float
    names: frozenset[str]
    least: int
    most: int


def time_run(asked: Settings, settings: Settings, recovers: bool) -> TimedRun | None:
    """What the minutes of a run choose, from now or from its command on; None if it has none.

    ``asked``: as typed. ``settings``: complete. A resumed run has its minutes once more.
    """
    if settings.minutes is None:
        return None
    began = CALLED.get() or time.monotonic()
    given = asked.minutes is not None or settings.minutes != settings.default_minutes
    # Default minutes are no promise: quality is then measured on as many windows as in other runs.
    measured = {"eval_windows"} if given and asked.eval_windows == Settings.eval_windows else set[str]()
    names = frozenset({*list_undecided(asked, recovers), *measured})
    most = MOST_TIMED_STEPS if given else MOST_STEPS
    least = LEAST_LATER if should_learn_masks(asked) else 1
    return TimedRun(began, began + 60 * settings.minutes, names, least, most)


def complete_settings(
    asked: Settings,
    estimator: Estimator | None,
    *,
    recovers: bool = False,
    plan: Plan | None = None,
    unfinished: Mapping[str, object] | None = None,
) -> tuple[Settings, Mapping[str, str]]:
    """Complete settings; and number → where it came from: given, minutes, default, or the unfinished run.

    Numbers that ``asked`` leaves open are those of the unfinished run that is resumed, because the rates of another
    moment would give others; else as large as the minutes allow.

    Args:
        estimator: estimates a run with complete settings; None: numbers are those of a long run.
        recovers: the run trains a pruned folder.
        plan: what the settings' file of a plan says.
        unfinished: the settings of the unfinished run.

    Raises:
        MptkError: minutes were given, and a run with the smallest numbers takes longer.
    """
    # First what is known, then the values of a long run, then what fits into the minutes.
    known = take_numbers(asked, unfinished or {}, recovers)
    asked = with_keywords(asked, known)
    settings, names = fill_in(asked, recovers, plan), list_undecided(asked, recovers)
    timed = settings.minutes is not None and names and estimator is not None
    if timed:
        assert estimator is not None
        settings = fit_in_minutes(asked, settings, names, estimator, recovers, plan)
    chosen = dict.fromkeys(names, "minutes" if timed else "default")
    kept = dict.fromkeys(known, "the unfinished run")
    return settings, {**dict.fromkeys([*NUMBERS, *settings.further_numbers], "given"), **chosen, **kept}


def fill_in(settings: Settings, recovers: bool = False, plan: Plan | None = None) -> Settings:
    """Complete settings, in which numbers that minutes choose have the values of a long run.

    ``recovers``, ``plan``: as in ``complete_settings``.
    """
    learning = settings.learning
    # A one-shot method without minutes has no number to choose: it trains nothing, and its windows have a default.
    timed = settings.minutes is not None or (learning.steps is None and (recovers or should_learn_masks(settings)))
    found = (
        choose_amounts(settings, MOST_STEPS)
        if timed
        else {
            "steps": 0,
            "samples": count_calibration(settings, plan),
            "distil_epochs": 0,
            **settings.further_numbers,
        }
    )
    compute = "float32" if settings.compute_dtype == "auto" else settings.compute_dtype
    precision = "bf16" if learning.precision == "no" and compute == "bfloat16" else learning.precision
    minutes = (settings.minutes or settings.default_minutes) if timed else None
    learning = replace(learning, precision=precision, steps=learning.steps or 0)
    complete = replace(settings, minutes=minutes, compute_dtype=compute, learning=learning)
    return with_keywords(complete, {name: found[name] for name in list_undecided(settings, recovers)})


def count_calibration(settings: Settings, plan: Plan | None) -> int:
    """The number of calibration windows without minutes. A run that only cuts needs the proof's three."""
    s = settings
    used = not s.fixed or s.steps or s.reconstruct or s.distil_epochs or "int4" in s.schemes or needs_fit(s, plan)
    return SAMPLES if used else PROOF_SHAPE[0]


def list_undecided(settings: Settings, recovers: bool = False) -> list[str]:
    """The numbers that the settings leave to minutes. A one-shot method trains only if it is asked to."""
    # Without training, minutes still choose the samples.
    trains = recovers or should_learn_masks(settings)
    numbers = {"steps": settings.learning.steps} if trains else {}
    numbers |= {name: getattr(settings, name) for name in ("samples", *settings.further_numbers)}
    found = [name for name, number in numbers.items() if number is None]
    # Distillation goes on from fitted consumers.
    distils = trains and should_reconstruct(settings, find_method(settings.method))
    return [*found, "distil_epochs"] if "samples" in found and distils and settings.distil_epochs is None else found


def fit_in_minutes(
    asked: Settings,
    settings: Settings,
    names: Sequence[str],
    estimator: Estimator,
    recovers: bool,
    plan: Plan | None,
) -> Settings:
    """``settings`` with the numbers ``names`` as large as its minutes allow. ``asked``: before ``fill_in``.

    Raises MptkError if minutes were given, and a run with the smallest numbers takes longer.
    """
    # The type is decided first: the estimate of each step depends on it.
    if asked.compute_dtype == "auto" and is_half_faster(find_device(asked.device)):
        settings = fill_in(replace(asked, compute_dtype="bfloat16"), recovers, plan)
    least = LEAST_STEPS if should_learn_masks(asked) else int(recovers)
    most = MOST_STEPS if asked.minutes is None else MOST_TIMED_STEPS
    assert settings.minutes is not None
    seconds = 60 * settings.minutes

    def with_steps(steps: int, epochs: int = 0) -> Settings:
        found = choose_amounts(settings, max(least, steps)) | {"distil_epochs": epochs}
        return with_keywords(settings, {name: found[name] for name in names})

    def take(steps: int, epochs: int) -> float:
        return float(sum(estimator.estimate(with_steps(steps, epochs)).seconds.values()))

    # bisect finds how many numbers of steps fit, from none on: a run takes longer with each step
    if "distil_epochs" in names:
        fits = bisect_right(range(most + 1), seconds, key=lambda steps: take(steps, EPOCHS))
        if fits > DISTILLED_STEPS:
            return with_steps(fits - 1, EPOCHS)
    fits = bisect_right(range(most + 1), seconds, key=lambda steps: take(steps, 0))
    # Default minutes are no promise: a run that takes longer runs with the smallest numbers.
    if not fits and asked.minutes is not None:
        raise InputError(explain_too_short(with_steps(0), estimator.estimate(with_steps(0))), name="minutes")
    return with_steps(max(0, fits - 1))


def is_half_faster(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 ``FASTER`` times as fast as float32."""
    return measure_machine(device, torch.bfloat16).speedup >= FASTER


def choose_amounts(settings: Settings, steps: int) -> dict[str, int]:
    """The numbers that minutes choose for a run of ``steps`` steps."""
    tokens = steps * settings.learning.training.batch * settings.length
    each = 1 if settings.data == data.SELF else WINDOWS_PER_STEP
    samples = min(WINDOWS[0] + each * max(0, steps - LEAST_STEPS), WINDOWS[1])
    found = {"steps": steps, "samples": samples, "distil_epochs": 0}
    for stage in list_stages():
        found |= stage.choose_numbers(settings, tokens)
    return found


def explain_too_short(least: Settings, needs: Estimate) -> str:
    """The error for minutes in which not even ``least`` fits."""
    assert least.minutes is not None
    total, longest = sum(needs.seconds.values()), max(needs.seconds, key=lambda stage: needs.seconds[stage])
    less = "fewer --steps" if least.steps else "fewer --samples"
    less = "a one-shot --method, as wanda" if should_learn_masks(least) else less
    shorter = dict(SHORTER)
    for stage in list_stages():
        shorter |= stage.shorter
    return (
        f"--minutes {least.minutes:g} is too short: {describe_numbers(least)} take about {describe_duration(total)}, "
        "of which "
        f"{describe_duration(needs.seconds[longest])} are for {longest!r}; give --minutes {ceil(total / 60)}, or "
        f"{shorter.get(longest, less)}"
    )


def take_numbers(asked: Settings, unfinished: Mapping[str, object], recovers: bool = False) -> dict[str, object]:
    """The numbers that ``asked`` leaves open and the unfinished run chose."""
    learning = unfinished.get("learning")
    known = {**unfinished, **(learning if isinstance(learning, dict) else {})}
    open_ones = {"minutes": asked.minutes is None, "compute_dtype": asked.compute_dtype == "auto"}
    names = [*list_undecided(asked, recovers), *(name for name, is_open in open_ones.items() if is_open)]
    return {name: known[name] for name in names if name in known}


def note_minutes(settings: Settings) -> str:
    """The report's note on the numbers that the time limit chose; empty without a limit."""
    return "" if settings.minutes is None else f"{describe_numbers(settings)}, as {settings.minutes:g} minutes allowed"
