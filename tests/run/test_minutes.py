"""Minutes decide how many steps, windows and tokens a run takes; what is typed wins, and a run keeps its numbers.

It reaches for mptk.run.minutes and mptk.run.estimate: what a number of minutes allows at given rates.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml
from inside import Stopped
from rates import keep_rates
from timed_runs import RATES, TINY, complete, given, minutes_of
from typer.testing import CliRunner

import mptk
from mptk import Settings
from mptk.api.pruned import estimate_recovery
from mptk.cli.main import app
from mptk.config import MINUTES, MOST_STEPS
from mptk.errors import InputError
from mptk.ir import PassRecord
from mptk.run.amounts import describe_numbers
from mptk.run.minutes import LEAST_STEPS, complete_settings
from mptk.testing import expect_error

pytestmark = pytest.mark.usefixtures("rates")


def chosen(model: str, settings: Settings, **numbers: object) -> tuple[int | None, int | None]:
    """Steps and samples of a run."""
    found = complete(given(settings, **numbers), model)
    return found.learning.steps, found.samples


def test_minutes_allow_the_most_steps_and_windows_that_fit(llama):
    for steps, samples, epochs in ((5, 16, 0), (8, 52, 0), (19, 96, 0), (20, 96, 3), (4000, 96, 3)):
        minutes = minutes_of(llama, TINY, steps=steps, samples=samples, distil_epochs=epochs)
        found = complete(given(TINY, minutes=minutes), llama)
        assert (found.learning.steps, found.samples, found.distil_epochs) == (steps, samples, epochs)


def test_what_is_typed_wins(llama):
    minutes = minutes_of(llama, TINY, steps=40, samples=4)
    assert chosen(llama, TINY, minutes=minutes, samples=4) == (40, 4)
    assert chosen(llama, TINY, minutes=minutes, steps=7)[0] == 7
    assert chosen(llama, TINY, minutes=0.01, steps=900, samples=4) == (900, 4), "nothing is left to choose"


def test_a_method_that_learns_has_minutes_by_default_and_then_no_more_than_so_many_steps(llama):
    assert chosen(llama, TINY) == (MOST_STEPS, 96)
    assert complete(TINY, llama).minutes == MINUTES
    keep_rates(replace(RATES, flops=1e3))
    assert chosen(llama, TINY) == (LEAST_STEPS, 16), "a slow machine is told how long it takes"
    wanda = complete(replace(TINY, method="wanda"), llama)
    assert (wanda.learning.steps, wanda.samples, wanda.minutes) == (0, 32, None)


@pytest.mark.parametrize("more", [{}, {"reconstruct": True}, {"plan": "plan.json"}])
def test_minutes_bound_the_windows_of_a_one_shot_method_and_never_make_it_train(llama, more):
    wanda = given(replace(TINY, method="wanda"), **more)
    for minutes in (minutes_of(llama, wanda, samples=40), 10_000):
        found = complete(replace(wanda, minutes=minutes), llama)
        assert (found.steps, found.distil_epochs or 0) == (0, 0)
        assert found.samples == (40 if minutes < 10_000 and "plan" not in more else 96), "a plan costs no windows"
    asked = complete(given(wanda, minutes=10_000, steps=7), llama)
    assert (asked.steps, asked.samples) == (7, 96)


def test_minutes_count_bfloat16_if_the_machine_is_faster_with_it(llama):
    minutes = minutes_of(llama, TINY, steps=40, samples=96, distil_epochs=3)
    timed, float32 = replace(TINY, minutes=minutes), replace(TINY, minutes=minutes, compute_dtype="float32")
    keep_rates(RATES, torch.bfloat16)
    assert complete(timed, llama).compute_dtype == "float32", "equal rates"
    keep_rates(replace(RATES, speedup=2.0), torch.bfloat16)
    found = complete(timed, llama)
    assert (found.compute_dtype, found.learning.precision) == ("bfloat16", "bf16")
    assert found.steps > 60
    epochs = "3 epochs of local distillation"
    assert describe_numbers(found) == f"{found.steps} training steps, 96 calibration windows and {epochs} in bfloat16"
    assert complete(float32, llama).steps == 40, "what is typed wins"
    given_numbers = replace(given(TINY, steps=40, samples=96), minutes=None)
    assert complete(given_numbers, llama).compute_dtype == "float32", "the same on each machine"
    kept = {"compute_dtype": "float32", "learning": {"steps": 40}, "samples": 96, "distil_epochs": 3}
    resumed, sources = complete_settings(timed, None, unfinished=kept)
    assert resumed.compute_dtype == "float32", "a resumed run goes on as it began"
    assert sources["samples"] == "the unfinished run"


def test_text_that_the_model_writes_counts(llama):
    minutes = minutes_of(llama, TINY, steps=60, samples=60)
    assert 5 < chosen(llama, replace(TINY, data="self"), minutes=minutes)[0] < 60


def test_minutes_that_are_too_few_or_choose_nothing_are_refused_before_any_work(llama, tmp_path):
    keep_rates(replace(RATES, flops=1e6))
    ran: list[PassRecord] = []
    with expect_error(InputError, name="minutes"):
        mptk.prune(llama, tmp_path / "out", TINY, minutes=1, batch=8, on_stage=ran.append)
    assert ran == []
    recipe = tmp_path / "run.yaml"
    recipe.write_text(f"model: {llama}\nminutes: 1\ndata: text\nestimate: true\n")
    for words in (
        [llama, "--minutes", "1", "--estimate", "--data", "text"],
        ["--config", str(recipe)],
        [llama, "--minutes", "1", "--steps", "8", "--samples", "4", "--estimate"],
    ):
        refused = CliRunner().invoke(app, ["prune", *words]).exception
        assert isinstance(refused, InputError)
        assert refused.name == "minutes"


def test_a_run_says_its_numbers_and_a_resumed_one_keeps_them(laboratory, llama, tmp_path):
    settings = given(TINY, steps=6, data=str(laboratory.open_data()))
    settings = replace(settings, minutes=minutes_of(llama, settings, samples=28))

    def stop(record: PassRecord) -> None:
        if record.name == "reconstruct":
            raise Stopped

    with pytest.raises(Stopped):
        mptk.prune(llama, tmp_path / "out", settings, on_stage=stop)
    keep_rates(replace(RATES, flops=5e9))
    report = mptk.prune(llama, tmp_path / "out", replace(settings, minutes=None), resume=True).report
    assert (report.settings.learning.steps, report.settings.samples) == (6, 28)
    assert report.settings.minutes == settings.minutes
    recipe = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert (recipe["steps"], recipe["samples"], "minutes" in recipe) == (6, 28, False)


def test_a_recovery_has_minutes_too(laboratory, tmp_path):
    settings = replace(TINY, data=str(laboratory.open_data()))
    seconds = sum(estimate_recovery(laboratory.open_pruned(), given(settings, steps=9)).seconds.values())
    told: list[str] = []

    def listen(stage: str, *_: object) -> None:
        told.append(stage)
        if stage not in ("load", "reading"):
            raise Stopped

    with pytest.raises(Stopped):
        mptk.recover(
            laboratory.open_pruned(), tmp_path / "out", settings, minutes=seconds / 60 * (1 + 1e-9), progress=listen
        )
    assert told[-1].endswith(" for 9 training steps")
