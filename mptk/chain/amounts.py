"""amounts: how many steps, windows and tokens a run takes, and the numbers that its minutes allow."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import ceil

import torch

from mptk.config.choices import SAMPLES, TRIAL_TOKENS
from mptk.config.learning import MINUTES, MOST_STEPS, SEARCH_MINUTES
from mptk.config.setting import with_keywords
from mptk.config.settings import Settings
from mptk.conversions import fits
from mptk.cost.estimate import Estimate, duration, this_machine
from mptk.errors import MptkError
from mptk.io import data
from mptk.ir.plan import Plan
from mptk.methods import find_method
from mptk.methods.division.search import judged, least_tokens, searched
from mptk.protocols.chain import reconstructs
from mptk.protocols.execution import find_device
from mptk.protocols.values import PROOF_SHAPE
from mptk.report.view import plural

TRAINED_PER_HELD_OUT = 8
"""Hold out at most one sample per this number of training samples."""
LEAST_STEPS = 5
"""Fewest steps that minutes choose for a method that learns: two for the masks."""
MOST_TIMED_STEPS = 10**6
"""Most steps that minutes choose."""
WINDOWS, WINDOWS_PER_STEP = (16, 96), 4
"""Fewest and most calibration windows that minutes choose, and how many for each step: they are worth more than steps
(``benchmarks/maskprune.md``). As the model takes long to write one, it writes one for each step."""
EPOCHS, DISTILLED_STEPS = 3, 20
"""Minutes choose these epochs of local distillation if this number of steps still fits: further steps bring less
(``benchmarks/maskprune.md``)."""
FASTER = 1.5
"""A run of minutes computes in bfloat16 on a machine that multiplies it at least this many times as fast as float32."""
TRIALS = 3
"""With minutes the trials of a search get a third of the tokens of training."""
SHORTER = {
    "calibration data": "text with --data",
    "measure": "fewer --eval-windows",
    "write": "--no-onnx",
    "train shapes": "fewer --search-finalists",
    "shapes": "fewer --search-shapes",
}
"""Stage of a run → what makes it shorter."""

# ---- windows ----


def wanted(settings: Settings, *, own: bool = False) -> int:
    """Most samples that a run takes to calibrate and train on, with the held-out ones.

    ``own``: whether the model writes them. As that takes long, it writes none for the training steps, which repeat the
    others. So `mptk shapes` and a run that searches and then trains have the same text.
    """
    s = settings
    used = max(s.windows, searched(s), 0 if own else s.steps * s.learning.training.batch)
    return used + watched(s, used)


def watched(settings: Settings, samples: int) -> int:
    """Number of held-out samples for ``samples`` training samples: at most a batch for training, more for a search."""
    count = min(settings.learning.training.batch, max(1, samples // TRAINED_PER_HELD_OUT)) if settings.steps else 0
    return max(count, judged(samples)) if settings.search else count


def measured(settings: Settings, count: int) -> int:
    """Windows to measure on of the text that the model writes itself, beside ``count`` others."""
    return min(count, settings.eval_windows) if settings.eval_data is None else 0


def written(settings: Settings) -> int:
    """Windows of text that the model writes itself: to calibrate and train on, and to measure on."""
    count = wanted(settings, own=True) if settings.data == data.SELF else 0
    return count + measured(settings, count)


# ---- minutes ----


def settled(settings: Settings, recovers: bool = False, plan: Plan | None = None) -> Settings:
    """Complete settings. Numbers that minutes choose (``in_time``) have the values of a long run.

    ``recovers``: the run trains a pruned folder. ``plan``: what the settings' file of a plan says, if it was read.
    """
    learning = settings.learning
    timed = settings.minutes is not None or (learning.steps is None and (recovers or learns(settings)))
    found = (
        amounts(settings, MOST_STEPS)
        if timed
        else {"steps": 0, "samples": calibrating(settings, plan), "search_tokens": TRIAL_TOKENS, "distil_epochs": 0}
    )
    compute = "float32" if settings.compute_dtype == "auto" else settings.compute_dtype
    precision = "bf16" if learning.precision == "no" and compute == "bfloat16" else learning.precision
    minutes = (settings.minutes or (SEARCH_MINUTES if settings.search else MINUTES)) if timed else None
    learning = replace(learning, precision=precision, steps=learning.steps or 0)
    complete = replace(settings, minutes=minutes, compute_dtype=compute, learning=learning)
    return with_keywords(complete, {name: found[name] for name in undecided(settings, recovers)})


def calibrating(settings: Settings, plan: Plan | None) -> int:
    """Calibration windows of a run that minutes do not bound: if it scores, fits and trains nothing, the proof's."""
    s = settings
    used = not s.fixed or s.steps or s.reconstruct or s.distil_epochs or "int4" in s.quantize or fits(s, plan)
    return SAMPLES if used else PROOF_SHAPE[0]


def learns(settings: Settings) -> bool:
    """Whether the run learns masks."""
    return not settings.fixed and find_method(settings.method).learns


def undecided(settings: Settings, recovers: bool = False) -> list[str]:
    """The numbers that the settings leave to minutes. A one-shot method trains only if it is asked to."""
    trains = recovers or learns(settings)
    numbers = {"steps": settings.learning.steps} if trains else {}
    numbers |= {"samples": settings.samples}
    numbers |= {"search_tokens": settings.search_tokens} if settings.search else {}
    found = [name for name, number in numbers.items() if number is None]
    distils = trains and not settings.shared and reconstructs(settings, find_method(settings.method))
    return [*found, "distil_epochs"] if "samples" in found and distils and settings.distil_epochs is None else found


def in_time(
    asked: Settings, needs: Callable[[Settings], Estimate], recovers: bool = False, plan: Plan | None = None
) -> Settings:
    """Complete settings, in which the numbers that ``asked`` leaves open are as large as its minutes allow.

    ``needs`` estimates a run with complete settings. ``recovers``, ``plan``: as in ``settled``.

    Raises:
        MptkError: minutes were given, and a run with the smallest numbers takes longer.
    """
    settings, names = settled(asked, recovers, plan), undecided(asked, recovers)
    minutes = settings.minutes
    if minutes is None or not names:
        return settings
    if asked.compute_dtype == "auto" and half_is_faster(find_device(asked.device)):
        settings = settled(replace(asked, compute_dtype="bfloat16"), recovers, plan)
    least = LEAST_STEPS if learns(asked) else int(recovers)

    def sized(steps: int, epochs: int = 0) -> Settings:
        found = amounts(settings, max(least, steps)) | {"distil_epochs": epochs}
        return with_keywords(settings, {name: found[name] for name in names})

    def fitting(epochs: int = 0) -> int:
        """How many numbers of steps fit, from none on."""
        return bisect_right(range(most + 1), 60 * minutes, key=lambda n: sum(needs(sized(n, epochs)).seconds.values()))

    most = MOST_STEPS if asked.minutes is None else MOST_TIMED_STEPS
    if "distil_epochs" in names and (fits := fitting(EPOCHS)) > DISTILLED_STEPS:
        return sized(fits - 1, EPOCHS)
    fits = fitting()
    if not fits and asked.minutes is not None:
        raise MptkError(too_short(sized(0), needs(sized(0))))
    return sized(max(0, fits - 1))


def half_is_faster(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 ``FASTER`` times as fast as float32."""
    return this_machine(device, torch.bfloat16).speedup >= FASTER


def amounts(settings: Settings, steps: int) -> dict[str, int]:
    """The numbers that minutes choose for a run of ``steps`` steps."""
    tokens = steps * settings.learning.training.batch * settings.length
    each = 1 if settings.data == data.SELF else WINDOWS_PER_STEP
    samples = min(max(each * steps, WINDOWS[0]), WINDOWS[1])
    trials = max(tokens // TRIALS, least_tokens(settings))
    return {"steps": steps, "samples": samples, "search_tokens": trials, "distil_epochs": 0}


def too_short(least: Settings, needs: Estimate) -> str:
    """The error for minutes in which not even ``least`` fits."""
    assert least.minutes is not None
    total, longest = sum(needs.seconds.values()), max(needs.seconds, key=lambda stage: needs.seconds[stage])
    less = "a one-shot --method, as wanda" if learns(least) else "fewer --steps" if least.steps else "fewer --samples"
    return (
        f"--minutes {least.minutes:g} is too short: {said(least)} take about {duration(total)}, of which "
        f"{duration(needs.seconds[longest])} are for {longest!r}; give --minutes {ceil(total / 60)}, or "
        f"{SHORTER.get(longest, less)}"
    )


def resumed(asked: Settings, kept: Mapping[str, object], recovers: bool = False) -> Settings:
    """``asked`` with the numbers that the unfinished run chose: the rates of another moment give others."""
    learning = kept.get("learning")
    known = {**kept, **(learning if isinstance(learning, dict) else {})}
    open_ones = {"minutes": asked.minutes is None, "compute_dtype": asked.compute_dtype == "auto"}
    names = [*undecided(asked, recovers), *(name for name, is_open in open_ones.items() if is_open)]
    return with_keywords(asked, {name: known[name] for name in names if name in known})


def said(settings: Settings) -> str:
    """The numbers of complete settings in words, and bfloat16 if they are computed in it."""
    found = [plural(settings.steps, "training step")] if settings.steps else []
    found += [plural(settings.windows, "calibration window")] if not settings.fixed else []
    found += [f"{settings.trial_tokens:,} tokens for the search"] if settings.search else []
    found += [f"{plural(settings.distil_epochs, 'epoch')} of local distillation"] if settings.distil_epochs else []
    numbers = " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)
    return f"{numbers} in bfloat16" if numbers and settings.compute_dtype == "bfloat16" else numbers


def note(settings: Settings) -> str:
    """A note on what complete settings owe to their minutes; empty without minutes."""
    return "" if settings.minutes is None else f"{said(settings)}, as {settings.minutes:g} minutes allowed"
