"""What a run by minutes plans again while it runs, at rates and times that the test names.

It reaches for mptk.cost.limit, mptk.run.minutes and mptk.run.replan: what fits into a time; and for the training loop.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from inside import Stopped
from rates import keep_rates
from timed_runs import RATES, TINY, complete, given

import mptk
from mptk import Settings
from mptk.config import MOST_STEPS
from mptk.cost.limit import LEAST_SCORED, TimeLimit
from mptk.methods.maskprune.train import STALLED, Watch
from mptk.protocols.run_folder import make_now
from mptk.run.estimate import read_estimator
from mptk.run.minutes import LEAST_LATER, LEAST_STEPS, TimedRun, time_run
from mptk.run.replan import make_limit, plan_fitting, plan_measurement, take_steps
from mptk.trust import NO_CODE

LIMIT = TimeLimit(
    began=100.0, ends=400.0, before=20.0, scoring=10.0, after=50.0, elastic=0.0, distilling=0.0, least=5, most=1000
)


def test_as_many_steps_as_fit_before_what_comes_after_them():
    """At 150 there are 250 seconds; what follows takes 50 of them, or twice as many at half the pace."""
    assert LIMIT.fit_steps(150.0, done=10, seconds=2.0) == 10 + 100
    assert LIMIT.fit_steps(150.0, done=10, seconds=2.0, pace=2.0) == 10 + 75
    assert LIMIT.fit_steps(150.0, done=10, seconds=2.0, extra=40.0) == 10 + 80
    assert LIMIT.fit_steps(150.0, done=2.5, seconds=10.0) == 22
    elastic = replace(LIMIT, elastic=40.0)
    assert elastic.fit_steps(150.0, done=10, seconds=2.0, pace=2.0) == 10 + 55, "it does less on a slow machine"
    distils = replace(LIMIT, distilling=60.0)
    assert distils.fit_steps(150.0, done=10, seconds=2.0, pace=2.0) == 10 + 15
    assert distils.fit_steps(150.0, done=2, seconds=10.0, pace=1.0) == 20, "without it there would be 22"
    assert distils.fit_steps(150.0, done=2, seconds=20.0, pace=1.0) == 12


def test_steps_have_bounds_whatever_the_time():
    assert LIMIT.fit_steps(1e6, done=2, seconds=1.0) == 5, "the least are taken although the time is over"
    assert LIMIT.fit_steps(1e6, done=30, seconds=1.0) == 30
    assert LIMIT.fit_steps(150.0, done=2, seconds=1e-6) == 1000


def test_what_came_before_shows_the_pace_of_what_comes_after():
    assert LIMIT.measure_pace(160.0) == 3.0
    assert LIMIT.measure_pace(101.0) == 1.0, "a resumed run reads what others wait for"


def test_units_are_scored_on_as_many_batches_as_there_is_time_for():
    assert LIMIT.fit_batches(8, 1.0) == 8
    assert LIMIT.fit_batches(8, 2.5) == 4
    assert LIMIT.fit_batches(8, 1e3) == LEAST_SCORED
    assert LIMIT.fit_batches(1, 1e3) == 1


def watch_losses(*losses: float) -> Watch:
    watch = Watch(None)  # type: ignore[arg-type]  # its samples are not read
    for i, loss in enumerate(losses):
        watch.add(25 * i, loss)
    return watch


def test_a_loss_has_stopped_falling_if_no_measurement_of_so_many_is_lower():
    flat = [2.0] * STALLED
    assert watch_losses(2.0, *flat).has_stopped_falling
    assert not watch_losses(2.0, *flat[1:]).has_stopped_falling
    assert watch_losses(3.0, 2.0, *flat).has_stopped_falling
    assert watch_losses(2.0, *flat[1:], 2.0 * (1 - 1e-5)).has_stopped_falling, "about as high"
    assert not watch_losses(2.0, *flat[1:], 1.99).has_stopped_falling
    assert watch_losses(2.0, *[float("nan")] * STALLED).has_stopped_falling


def test_minutes_are_the_clocks_and_choose_what_was_not_typed():
    def time(asked: Settings, **numbers: object) -> frozenset[str] | None:
        typed = given(asked, **numbers)
        found = time_run(typed, replace(typed, minutes=typed.minutes or 20.0), recovers=False)
        assert found is not None
        assert found.ends - found.began == pytest.approx(60 * (typed.minutes or 20.0))
        assert found.least == LEAST_LATER
        assert (found.most == MOST_STEPS) is (typed.minutes is None)
        return found.names

    plain = replace(TINY, eval_windows=Settings.eval_windows)
    assert time(plain, minutes=3.0) == {"steps", "samples", "distil_epochs", "eval_windows"}
    assert time(TINY, minutes=3.0) == {"steps", "samples", "distil_epochs"}
    assert time(plain, minutes=3.0, steps=8) == {"samples", "distil_epochs", "eval_windows"}
    assert time(plain) == {"steps", "samples", "distil_epochs"}, "default minutes are no promise"
    assert time_run(plain, replace(plain, minutes=None), recovers=False) is None


@pytest.mark.usefixtures("rates")
def test_a_run_that_is_faster_than_planned_takes_more_steps_and_a_resumed_one_keeps_them(laboratory, tmp_path):
    """The rates in the cache allow the fewest steps, and by the clock there is time for the most of a default run."""
    keep_rates(replace(RATES, flops=1e6))
    model, settings = str(laboratory.open_model()), replace(TINY, data=str(laboratory.open_data()))
    assert complete(settings, model).steps == LEAST_STEPS
    seen: list[tuple[str, int]] = []

    def stop(stage: str, done: int, total: int, figures: str = "") -> None:
        if stage in ("masks", "recovery"):
            seen.append((stage, total))
        if (stage, done) == ("recovery", 60):
            raise Stopped

    with pytest.raises(Stopped):
        mptk.prune(model, tmp_path / "out", settings, progress=stop)
    masks = {total for stage, total in seen if stage == "masks"}
    assert masks == {2, 8}, "planned again in the first steps"
    assert seen[-1] == ("recovery", MOST_STEPS - 8)
    report = mptk.prune(model, tmp_path / "out", settings, resume=True).report
    assert report.settings.steps == MOST_STEPS
    assert report.settings.learning.mask_steps == 8
    recipe = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert recipe["steps"] == MOST_STEPS
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["phase"] == "recovery"] == list(range(1, MOST_STEPS - 8 + 1))


NEVER, LONG_AGO = 1e12, 0.0
"""Ends of a run, on a clock that is between them."""


@pytest.mark.usefixtures("rates")
def test_what_has_no_time_left_is_fitted_and_measured_on_fewer_windows(laboratory, tmp_path):
    """A run that took two steps to learn masks, and whose minutes are over, or never end."""
    model = str(laboratory.open_model())
    asked = replace(TINY, data=str(laboratory.open_data()), eval_windows=8, samples=40, distil_epochs=3)
    found = mptk.prune(model, None, given(asked, steps=2))
    compiled, sets = found.compiled, found._origin.sets
    chosen = replace(compiled.chosen, steps=2, seconds=1.0)
    names = frozenset({"steps", "samples", "distil_epochs", "eval_windows"})
    estimator = read_estimator(model, NO_CODE)

    def run(ends: float, which: frozenset[str] = names) -> Any:
        timed = TimedRun(began=0.0, ends=ends, names=which, least=2, most=1000)
        known = SimpleNamespace(timed=timed, estimator=estimator, keep=make_now)
        known.limit = make_limit(given(compiled.prepared.settings, steps=30), known)  # type: ignore[arg-type]
        return known

    for ends, windows, epochs, measured in ((LONG_AGO, 16, 0, 4), (NEVER, 40, 3, 8)):
        prepared, fewer = plan_fitting(compiled.prepared, chosen, sets, run(ends))
        assert (len(fewer.calibration), prepared.settings.samples) == (windows, windows)
        assert prepared.settings.distil_epochs == epochs
        again, fewer = plan_measurement(compiled, sets, run(ends))
        assert (len(fewer.evaluation), again.prepared.settings.eval_windows) == (measured, measured)
    prepared, fewer = plan_fitting(compiled.prepared, chosen, sets, run(LONG_AGO, frozenset({"steps"})))
    assert (len(fewer.calibration), prepared.settings.distil_epochs) == (40, 3), "what is typed stays"
    assert plan_measurement(compiled, sets, run(LONG_AGO, frozenset({"steps"})))[1] is sets
    ended = take_steps(replace(compiled, chosen=chosen), 3).prepared.settings.learning
    assert (ended.steps, ended.mask_steps) == (5, 2)
    assert take_steps(replace(compiled, chosen=replace(chosen, steps=8)), 3).prepared.settings.learning.mask_steps == 8
