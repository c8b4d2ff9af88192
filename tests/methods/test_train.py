"""The training loop: what a step's gradient is of, and what a stopped run goes on with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mptk import testing, trace
from mptk.config import Learning, LossWeights, Training
from mptk.cost.limit import TimeLimit
from mptk.distributed.processes import make_accelerator
from mptk.errors import InputError
from mptk.ir import compute_typical_size, make_token_samples
from mptk.methods.maskprune.train import STALLED, Loop, Watch
from mptk.protocols import RunFolder
from mptk.tasks import CAUSAL_LM
from mptk.testing import expect_error

WINDOWS = make_token_samples(testing.draw_tokens(8, 9))


class Drawing(nn.Module):
    """A student that draws random numbers in its forward pass."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.noise = nn.Embedding(97, 12), nn.Linear(12, 97), noise

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        x = self.embed(input_ids)
        return (self.head(x + self.noise * torch.randn(x.shape)),)


def loop(tmp_path: Path, name: str, *, micro: int = 4, noise: float = 0.0, steps: int = 4, **how: Any) -> Loop:
    """``how``: its watch and its limit."""
    training = Training(batch=4, micro=micro, lr=1e-2, save_every=1, losses=LossWeights(kl=0.0))
    given = make_accelerator("no"), Drawing(noise), lambda _: (None, None), CAUSAL_LM, WINDOWS, steps, training
    return Loop(*given, phase="masks", folder=RunFolder(tmp_path / name, {}, resume=True), **how)


@pytest.mark.parametrize("micro", [1, 3])
def test_a_step_is_of_its_batch_however_that_is_divided(tmp_path, micro):
    whole, _ = loop(tmp_path, "whole")._step(0)
    parts, _ = loop(tmp_path, "parts", micro=micro)._step(0)
    for name in ("loss", "lm", "gradient"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


def test_random_numbers_go_on_where_a_stopped_run_left_them(tmp_path):
    def losses() -> list[float]:
        seen: list[float] = []
        one = loop(tmp_path, "run", noise=1.0)
        one.progress = lambda done, total, metrics: seen.append(metrics["loss"])
        one.run()
        return seen

    whole = losses()
    (tmp_path / "run.run" / "masks-00000004.safetensors").unlink()
    torch.manual_seed(99)  # as another process would begin
    assert losses() == whole[3:]


class Told(Watch):
    """A watch that is told other losses than those that were measured."""

    told: Sequence[float] = ()

    def add(self, step: int, loss: float) -> None:
        super().add(step, self.told[step])


def watching(tmp_path: Path, losses: Sequence[float], **how: Any) -> tuple[Loop, list[Tensor]]:
    """A loop with these losses on held-out samples, and what its embedding was after each step, as at the start."""
    watch = Told(WINDOWS)
    watch.told = losses
    one = loop(tmp_path, "watched", watch=watch, **how)
    weights = [one.parameters["embed.weight"].detach().clone()]
    one.progress = lambda *_: weights.append(one.parameters["embed.weight"].detach().clone())
    return one, weights


@pytest.mark.parametrize(
    ("losses", "kept", "said"),
    [
        ([5.0, 4.0, 3.0, 2.0, 1.0], 4, ()),
        ([5.0, 4.0, float("nan"), 4.0, 4.5], 1, ("1", "4", "4", "4.5", "1")),
        ([5.0, 6.0, 7.0, 8.0, 9.0], 0, ("5", "9", "4")),
    ],
)
def test_the_weights_of_the_least_held_out_loss_are_kept(tmp_path, losses, kept, said):
    """Before a stop and after. A note gives the step that is kept, the number of steps, and both losses."""
    one, weights = watching(tmp_path, losses)
    one.run()
    assert torch.equal(one.parameters["embed.weight"], weights[kept])
    assert not torch.equal(weights[0], weights[4])
    (tmp_path / "watched.run" / "masks-00000004.safetensors").unlink()
    again, _ = watching(tmp_path, losses)
    again.run()
    assert torch.equal(again.parameters["embed.weight"], weights[kept])
    assert again.watch.to_row("text", 1) == one.watch.to_row("text", 1)
    assert one.watch.to_row("text", 1)["kept"] == kept
    assert tuple(re.findall(r"\d+(?:\.\d+)?", one.watch.note())) == said


NEVER, LONG_AGO = 1e12, 0.0
"""Ends of a run, on a clock that is between them."""


def limited(ends: float, *, least: int = 1, most: int = 40) -> TimeLimit:
    costs = {"before": 1.0, "scoring": 1.0, "after": 0.0, "elastic": 0.0, "distilling": 0.0}
    return TimeLimit(began=0.0, ends=ends, **costs, least=least, most=most)


def test_a_run_by_minutes_takes_as_many_steps_as_there_is_time_for(tmp_path):
    """The rate of the last step shows that the rate of learning falls to its end over the steps that are taken."""

    def run(name: str, limit: TimeLimit | None, steps: int) -> tuple[int, float, Tensor]:
        one = loop(tmp_path, name, steps=steps, limit=limit)
        one.run()
        return one.steps, one.optimizer.param_groups[0]["lr"], one.parameters["embed.weight"].detach().clone()

    for ends, least, most, expected in ((NEVER, 1, 7, 7), (LONG_AGO, 3, 40, 3), (LONG_AGO, 1, 40, 1)):
        steps, rate, _ = run(f"{ends} {least}", limited(ends, least=least, most=most), 5)
        assert steps == expected
        assert rate == run(f"given {expected}", None, expected)[1]
    whole = run("whole", limited(NEVER, most=7), 5)[2]
    for file in sorted((tmp_path / "whole.run").glob("masks-*"))[1:]:
        file.unlink()
    steps, _, weights = run("whole", limited(LONG_AGO), 5)
    assert steps == 7, "a resumed run keeps the number"
    assert torch.equal(weights, whole)


def test_a_run_by_minutes_ends_when_the_held_out_loss_has_stopped_falling(tmp_path):
    losses = [5.0, 4.0, *[4.1] * 60]
    one, weights = watching(tmp_path, losses, steps=30, limit=limited(NEVER, most=30))
    one.run()
    assert (one.steps, one.watch.planned, one.watch.best) == (1 + STALLED, 30, 1)
    assert torch.equal(one.parameters["embed.weight"], weights[1])
    assert re.findall(r"\d+", one.watch.note())[:3] == [str(1 + STALLED), "30", "1"]
    (tmp_path / "typed").mkdir()
    typed, _ = watching(tmp_path / "typed", losses, steps=14)
    typed.run()
    assert typed.steps == 14, "steps that the user gave are taken"


def test_a_step_that_is_not_finite_stops_the_run_and_leaves_its_last_checkpoint(tmp_path):
    loop(tmp_path, "run", steps=2).run()
    with expect_error(InputError, name="lr"):
        loop(tmp_path, "run", noise=float("inf")).run()
    step, state = RunFolder(tmp_path / "run", {}, resume=True).read_latest("masks")
    assert step == 2
    assert state["parameter.embed.weight"].isfinite().all()


def test_the_held_out_loss_is_that_of_all_windows(tmp_path):
    one = loop(tmp_path, "held", watch=Watch(WINDOWS))
    with torch.no_grad():
        (losses,) = one._compute_losses(WINDOWS)
        assert one._measure_held_out(WINDOWS) == pytest.approx(float(losses["loss"]), rel=1e-6)


@pytest.mark.parametrize(("size", "masks", "lora", "full"), [(0.19, 1e-3, 3e-3, 3e-4), (0.0395, 2e-4, 6e-4, 6e-5)])
def test_rates_follow_the_size_of_the_weights(size, masks, lora, full):
    found = Learning(steps=8)
    assert found.of_masks(size).training.lr == masks
    assert found.of_recovery(False, size).training.lr == full
    assert found.of_recovery(True, size).training.lr == lora
    assert replace(found, rank=4).of_recovery(False, size).training.lr == lora
    given = replace(found, training=Training(lr=0.5))
    assert given.of_masks(size).training.lr == given.of_recovery(False, size).training.lr == 0.5


def test_the_size_of_weights_is_the_median_of_the_matrices():
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        for i, value in ((0, 0.01), (1, 7.0), (2, -3.0), (3, 0.2)):
            module[i].weight.fill_(value)
    assert compute_typical_size(trace(module, (torch.ones(2, 4),))) == pytest.approx(0.2)
