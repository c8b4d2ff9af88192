"""train: the distillation loop of both phases, masks being learned and recovery, on one device or many.

Devices, precision, gradient accumulation over processes and trackers are accelerate's. Which windows a step takes, and
its learning rate, follow from the seed and the step's number alone, so that a resumed run needs neither sampler nor
scheduler state, and any number of processes sees the same global batch.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mptk.errors import MptkError
from mptk.methods.maskprune.losses import TopLogits, hidden_error, token_losses
from mptk.run.folder import RunFolder
from mptk.run.processes import full, prepare, shard_like
from mptk.run.settings import Training

Teacher = Callable[[Tensor], tuple[Tensor | TopLogits, Any]]
"""Windows → logits or their shortened form, and hidden states or None."""
Metrics = dict[str, float]


class Loop:
    """Steps of one phase. ``run`` goes on from the newest checkpoint of that phase, if there is one.

    Args:
        accelerator: as the run's settings made it; it prepares ``student`` here.
        student: gives an output with ``logits`` for ids; its parameters that require a gradient are trained.
        windows: int64 [n, length].
        steps: how many; ``rows`` says which windows each takes.
        each_step: called with the tokens of the step after the gradients are there and before the optimiser; returns
            values for the metrics.
        extra: state beside the student's that checkpoints hold, and what takes it back.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        student: nn.Module,
        teacher: Teacher,
        windows: Tensor,
        steps: int,
        settings: Training,
        *,
        phase: str,
        folder: RunFolder,
        first_row: int = 0,
        each_step: Callable[[int], Metrics] = lambda tokens: {},
        extra: tuple[Callable[[], dict[str, Tensor]], Callable[[Mapping[str, Tensor]], None]] | None = None,
        progress: Callable[[int, int, Metrics], None] = lambda done, total, metrics: None,
    ) -> None:
        self.accelerator, self.teacher, self.windows, self.steps = accelerator, teacher, windows, steps
        self.settings, self.phase, self.folder, self.first_row = settings, phase, folder, first_row
        self.each_step, self.extra, self.progress = each_step, extra, progress
        trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=settings.lr, weight_decay=0.0)
        self.student, self.optimizer = prepare(accelerator, student, optimizer)
        self.parameters = {n: p for n, p in student.named_parameters() if n in trained}  # FSDP2 replaced them

    def run(self) -> None:
        """Train to the last step.

        Raises:
            MptkError: the loss or a gradient is not finite; the last good checkpoint is kept.
        """
        start = self._restore()
        for step in range(start, self.steps):
            began = time.perf_counter()
            metrics, tokens = self._step(step)
            metrics["tokens/s"] = tokens / (time.perf_counter() - began)
            done = step + 1
            saves = done % self.settings.save_every == 0 or done == self.steps
            state = self._state() if saves else {}  # shards are gathered from all processes
            if self.accelerator.is_main_process:
                self.folder.log(self.phase, done, metrics)
                if saves:
                    self.folder.checkpoint(self.phase, done, state)
            self.accelerator.log({f"{self.phase}/{name}": value for name, value in metrics.items()}, step=done)
            self.progress(done, self.steps, metrics)

    def rows(self, step: int) -> Tensor:
        """Rows of the set that ``step`` takes: the set in random order, epoch after epoch, each in another order."""
        first = self.first_row + step * self.settings.batch
        return shuffled(first, self.settings.batch, len(self.windows), self.settings.seed)

    def _step(self, step: int) -> tuple[Metrics, int]:
        a, s = self.accelerator, self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * schedule(step, self.steps, s.warmup)
        own = self.rows(step).chunk(a.num_processes)[a.process_index]
        parts = list(own.split(s.micro))
        sums: dict[str, Tensor] = {}
        for i, rows in enumerate(parts):
            share = len(rows) / len(own)
            with self._synchronised(i == len(parts) - 1):
                losses = self._losses(self.windows[rows].to(a.device))
                a.backward(losses["loss"] * share)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() * share
        metrics = {name: float(a.reduce(value, "mean")) for name, value in sums.items()}
        metrics["gradient"] = float(full(a.clip_grad_norm_(self.student.parameters(), s.clip)))
        self._require_finite(metrics, step)
        tokens = s.batch * self.windows.shape[1]
        metrics |= self.each_step(tokens)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return metrics, tokens

    def _synchronised(self, last: bool) -> Any:
        """Gradients are averaged over processes with the last part of a step only."""
        return self.accelerator.no_sync(self.student) if not last else contextlib.nullcontext()

    def _losses(self, ids: Tensor) -> dict[str, Tensor]:
        w = self.settings.losses
        target, states = self.teacher(ids) if w.kl or w.hidden else (None, None)
        output = self.student(input_ids=ids, use_cache=False, output_hidden_states=bool(w.hidden))
        found = token_losses(output.logits, ids, target, w)
        if w.hidden:
            assert states is not None
            found["hidden"] = hidden_error(output.hidden_states[1:], states[1:])
            found["loss"] = found["loss"] + w.hidden * found["hidden"]
        return found

    def _require_finite(self, metrics: Metrics, step: int) -> None:
        if not all(math.isfinite(v) for v in metrics.values()):
            values = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())
            raise MptkError(
                f"step {step + 1} of {self.phase}: {values}; lower --lr or use float32, then --resume from the last "
                f"checkpoint in {self.folder.path}"
            )

    # ---- checkpoints ----

    def _state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {f"parameter.{n}": full(p.detach()) for n, p in self.parameters.items()}
        moments = self.optimizer.optimizer.state
        for n, p in self.parameters.items():
            state.update({f"optimizer.{key}.{n}": full(value) for key, value in moments[p].items()})
        state["rng"] = torch.get_rng_state()
        return state | (self.extra[0]() if self.extra else {})

    @torch.no_grad()
    def _restore(self) -> int:
        latest = self.folder.latest(self.phase)
        if self.accelerator.is_main_process:
            self.folder.rewind(self.phase, latest[0] if latest else 0)
        self.accelerator.wait_for_everyone()
        if latest is None:
            return 0
        step, state = latest
        for n, p in self.parameters.items():
            p.copy_(shard_like(state[f"parameter.{n}"], p))
            values = {
                k.split(".", 2)[1]: state[k] for k in state if k.startswith("optimizer.") and k.split(".", 2)[2] == n
            }
            self.optimizer.optimizer.state[p] = {
                key: shard_like(value, p) if value.shape == p.shape else value for key, value in values.items()
            }
        torch.set_rng_state(state["rng"])
        if self.extra:
            self.extra[1](state)
        return step


def schedule(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at ``step``: linear warm-up, then a cosine to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def shuffled(first: int, many: int, count: int, seed: int) -> Tensor:
    """Rows at positions ``first`` … ``first + many − 1`` of ``count`` rows repeated, each epoch in another order."""
    wanted = range(first, first + many)
    orders = {
        epoch: torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for epoch in {i // count for i in wanted}
    }
    return torch.stack([orders[i // count][i % count] for i in wanted])


__all__ = ["Loop", "Metrics", "Teacher", "Training", "schedule", "shuffled"]
