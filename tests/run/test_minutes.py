"""Minutes decide how many steps, windows and tokens a run takes; what is typed wins, and a run keeps its numbers.

It reaches for mptk.run.minutes and mptk.run.estimate: what a number of minutes allows at given rates.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy_checkpoints as toys
import yaml
from commands import refused
from inside import Inside, Stopped
from lab import remembered
from transformers import LlamaForCausalLM

import mptk
from mptk import MptkError, Settings, testing
from mptk.api.pruned import estimate_recovery
from mptk.config.learning import MINUTES, MOST_STEPS, Learning, Training
from mptk.cost.estimate import Machine
from mptk.run.amounts import describe_numbers
from mptk.run.estimate import read_estimator
from mptk.run.minutes import LEAST_STEPS, complete_settings, fill_in
from mptk.trust import NO_CODE

RATES = Machine(flops=1e9, read=1e9, write=1e9)
TRAINING = Training(batch=2, micro=2)
TINY = Settings(data="text", length=32, align=8, onnx=False, eval_windows=2, eval_length=32)
TINY = replace(TINY, learning=Learning(rank=2, training=TRAINING))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return testing.save_word_model(LlamaForCausalLM(toys.llama_config()), tmp_path_factory.mktemp("llama") / "dense")


@pytest.fixture(autouse=True)
def rates(inside: Inside) -> None:
    inside.gives("mptk.run.estimate.measure_machine", RATES)
    inside.gives("mptk.run.minutes.measure_machine", RATES)


def given(settings: Settings, **numbers: object) -> Settings:
    return mptk.config.setting.with_keywords(settings, numbers)


def complete(settings: Settings, model: str) -> Settings:
    """The settings with what their minutes allow."""
    return complete_settings(settings, read_estimator(model, NO_CODE))[0]


def minutes_of(model: str, settings: Settings, **numbers: object) -> float:
    """What a run with these numbers is estimated to take, in minutes, and a little more."""
    return (
        sum(read_estimator(model, NO_CODE).estimate(fill_in(given(settings, **numbers))).seconds.values())
        / 60
        * (1 + 1e-9)
    )


def chosen(model: str, settings: Settings, **numbers: object) -> tuple[int | None, int | None]:
    """Steps and samples of a run."""
    found = complete(given(settings, **numbers), model)
    return found.learning.steps, found.samples


def test_minutes_allow_the_most_steps_and_windows_that_fit(llama: str) -> None:
    for steps, samples, epochs in ((5, 20, 0), (19, 76, 0), (20, 80, 3), (23, 92, 3), (4000, 96, 3)):
        minutes = minutes_of(llama, TINY, steps=steps, samples=samples, distil_epochs=epochs)
        assert chosen(llama, TINY, minutes=minutes) == (steps, samples)
        assert complete(given(TINY, minutes=minutes), llama).distil_epochs == epochs


def test_what_is_typed_wins(llama: str) -> None:
    minutes = minutes_of(llama, TINY, steps=40, samples=4)
    assert chosen(llama, TINY, minutes=minutes, samples=4) == (40, 4)
    assert chosen(llama, TINY, minutes=minutes, steps=7)[0] == 7
    assert chosen(llama, TINY, minutes=0.01, steps=900, samples=4) == (900, 4), "nothing is left to choose"


def test_a_method_that_learns_has_minutes_by_default_and_then_no_more_than_so_many_steps(
    llama: str, inside: Inside
) -> None:
    assert chosen(llama, TINY) == (MOST_STEPS, 96)
    assert complete(TINY, llama).minutes == MINUTES
    inside.gives("mptk.run.estimate.measure_machine", Machine(flops=1e3, read=1e9, write=1e9))
    assert chosen(llama, TINY) == (LEAST_STEPS, 20), "a slow machine is told how long it takes"
    wanda = complete(replace(TINY, method="wanda"), llama)
    assert (wanda.learning.steps, wanda.samples, wanda.minutes) == (0, 32, None)


@pytest.mark.parametrize("more", [{}, {"reconstruct": True}, {"plan": "plan.json"}])
def test_minutes_bound_the_windows_of_a_one_shot_method_and_never_make_it_train(
    llama: str, more: dict[str, object]
) -> None:
    wanda = given(replace(TINY, method="wanda"), **more)
    for minutes in (minutes_of(llama, wanda, samples=44), 10_000):
        found = complete(replace(wanda, minutes=minutes), llama)
        assert (found.steps, found.distil_epochs or 0) == (0, 0)
        assert found.samples == (44 if minutes < 10_000 and "plan" not in more else 96), "a plan costs no windows"
    asked = complete(given(wanda, minutes=10_000, steps=7), llama)
    assert (asked.steps, asked.samples) == (7, 96)


def test_minutes_count_bfloat16_if_the_machine_is_faster_with_it(llama: str, inside: Inside) -> None:
    minutes = minutes_of(llama, TINY, steps=40, samples=96, distil_epochs=3)
    timed, float32 = replace(TINY, minutes=minutes), replace(TINY, minutes=minutes, compute_dtype="float32")
    assert complete(timed, llama).compute_dtype == "float32", "equal rates"

    def rate(real: object, device: torch.device, dtype: torch.dtype = torch.float32) -> Machine:
        return replace(RATES, speedup=2.0) if dtype is torch.bfloat16 else RATES

    for place in ("estimate", "minutes"):
        inside.around(f"mptk.run.{place}.measure_machine", rate)
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


def test_text_that_the_model_writes_counts(llama: str) -> None:
    minutes = minutes_of(llama, TINY, steps=60, samples=60)
    assert 5 < chosen(llama, replace(TINY, data="self"), minutes=minutes)[0] < 60


def test_too_few_minutes_are_refused_before_any_work(llama: str, tmp_path: Path, inside: Inside) -> None:
    inside.forbid("mptk.run.prune.prepare")
    inside.gives("mptk.run.estimate.measure_machine", Machine(flops=1e6, read=1e9, write=1e9))
    said = (
        r"^minutes=1 is too short: 5 training steps and 20 calibration windows take about \d+ min, of which \d+ \w+ "
        r"are for 'train'; give minutes=\d+, or a one-shot method, as wanda$"
    )
    with pytest.raises(MptkError, match=said):
        mptk.prune(llama, tmp_path / "out", TINY, minutes=1, batch=8)
    assert "is too short" in refused("prune", llama, "--minutes", "1", "--estimate", "--data", "text")
    recipe = tmp_path / "run.yaml"
    recipe.write_text(f"model: {llama}\nminutes: 1\ndata: text\nestimate: true\n")
    assert "is too short" in refused("prune", "--config", recipe)


def test_processes_take_the_numbers_of_the_first(llama: str, tmp_path: Path, inside: Inside) -> None:
    first = complete(given(TINY, steps=7, samples=5), llama)
    inside.around("mptk.run.run.run_once", lambda real, find: first)  # what the first process sends to the others
    inside.stop("mptk.run.prune.prepare")
    started = inside.calls("mptk.run.prune.prepare")
    with pytest.raises(Stopped):
        mptk.prune(llama, tmp_path / "out", TINY)
    assert started[0][1].settings == first


def test_minutes_that_choose_nothing_are_refused(llama: str) -> None:
    said = refused("prune", llama, "--minutes", "1", "--steps", "8", "--samples", "4", "--estimate")
    assert "--minutes would do nothing" in said


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(testing.WORDS * 200))
    return file


def test_a_run_says_its_numbers_and_a_resumed_one_keeps_them(
    llama: str, text: Path, tmp_path: Path, inside: Inside
) -> None:
    said: list[str] = []
    settings = replace(TINY, data=str(text), minutes=minutes_of(llama, TINY, steps=6, samples=24))
    with remembered():
        inside.stop("mptk.run.recover.reconstruct_consumers")
        with pytest.raises(Stopped):
            mptk.prune(llama, tmp_path / "out", settings, progress=lambda stage, *_: said.append(stage))
        inside.undo()
        inside.gives("mptk.run.estimate.measure_machine", replace(RATES, flops=5e9))
        report = mptk.prune(llama, tmp_path / "out", replace(settings, minutes=None), resume=True).report
    assert [line for line in said if line.endswith("for 6 training steps and 24 calibration windows")]
    assert (report.settings.learning.steps, report.settings.samples) == (6, 24)
    assert report.settings.minutes == settings.minutes
    assert any(note.startswith("6 training steps and 24 calibration windows, as ") for note in report.notes)
    recipe = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text())
    assert (recipe["steps"], recipe["samples"], "minutes" in recipe) == (6, 24, False)


def test_a_recovery_has_minutes_too(llama: str, text: Path, tmp_path: Path) -> None:
    settings = replace(TINY, data=str(text))
    with remembered():
        mptk.prune(llama, tmp_path / "cut", replace(settings, method="magnitude"))
        seconds = sum(estimate_recovery(tmp_path / "cut", given(settings, steps=9)).seconds.values())
        found = mptk.recover(tmp_path / "cut", tmp_path / "out", settings, minutes=seconds / 60 * (1 + 1e-9))
    assert found.report.settings.learning.steps == 9
    assert any(note.startswith("9 training steps, as ") for note in found.report.notes)
