"""Runs whose minutes decide their numbers, on a machine of known rates."""

from __future__ import annotations

from mptk.config import Learning, Settings, Training, with_keywords
from mptk.cost.estimate import Machine
from mptk.run.estimate import read_estimator
from mptk.run.minutes import complete_settings, fill_in
from mptk.trust import NO_CODE

RATES = Machine(flops=1e9, read=1e9, write=1e9)
LEARNING = Learning(rank=2, training=Training(batch=2, micro=2))
TINY = Settings(data="text", length=32, align=8, onnx=False, eval_windows=2, eval_length=32, learning=LEARNING)


def given(settings: Settings, **numbers: object) -> Settings:
    return with_keywords(settings, numbers)


def complete(settings: Settings, model: str) -> Settings:
    """The settings with what their minutes allow."""
    return complete_settings(settings, read_estimator(model, NO_CODE))[0]


def minutes_of(model: str, settings: Settings, **numbers: object) -> float:
    """What a run with these numbers is estimated to take, in minutes, and a little more."""
    found = read_estimator(model, NO_CODE).estimate(fill_in(given(settings, **numbers)))
    return sum(found.seconds.values()) / 60 * (1 + 1e-9)
