"""train: the distillation loop of both phases, mask learning and recovery, on one or more devices.

accelerate handles devices, precision, gradient synchronisation and trackers. The seed and the number of a step
determine its windows and its learning rate. So a resumed run needs no sampler or scheduler state, and the global batch
does not depend on the number of processes. ``Watch`` has the losses on held-out samples, and finds the best step. The
parts of a step have names for torch's profiler (``benchmarks/training_profile.py``).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.optim import AdamW

from mptk.compat.glibc import retain_memory
from mptk.config import Learning, Training
from mptk.cost.limit import TimeLimit
from mptk.distributed.processes import (
    find_widest_float,
    gather_tensor,
    gather_tensors,
    prepare_training,
    run_once,
    shard_like,
)
from mptk.errors import InputError, ModelError, take_first_line
from mptk.ir import ProgramModule, Samples, join_outputs
from mptk.methods.maskprune.losses import compute_distillation_losses, compute_hidden_error
from mptk.methods.maskprune.rounding import WeightRounding
from mptk.methods.maskprune.teacher import Output, TeacherOutputs
from mptk.protocols import RunFolder, Task
from passes.frontend.trace import unwrap_module

NAME = "held-out"
"""Name of the held-out loss in the log of a phase."""
STATE = "watched"
"""Name of the held-out losses in a checkpoint."""
PLANNED_STEPS = "plan"
"""Name of what a run by minutes keeps in a checkpoint: its number of steps, and the seconds of one."""
STALLED, FALL = 10, 1e-4
"""A run by minutes ends its recovery if this many measurements in a row bring no loss that is lower than the lowest by
this share: early stopping with patience (Goodfellow et al., Deep Learning, algorithm 7.1), with the patience and the
threshold of torch's ``ReduceLROnPlateau``."""
FIRST_STEPS, EARLY = 2, 0.1
"""The number of steps is planned again after the first two (the first is slower than the others), after each power of
two, and at each checkpoint. It may grow while at most this share of the steps is done: later, the rate of learning has
begun to fall, and would rise again. It may shrink at any time: the rate then falls faster, and still ends at 0."""


@dataclass
class Watch:
    """``losses``: number of steps → the training loss on ``samples``, which are never trained on.

    ``metric``: how the report calls it. ``planned``: the steps of training that ended early, as the loss had stopped
    falling; else None.
    """

    samples: Samples
    losses: dict[int, float] = field(default_factory=dict)
    metric: str = "training loss"
    planned: int | None = None

    def add(self, step: int, loss: float) -> None:
        """Record the loss after ``step`` steps. NaN counts as infinite."""
        self.losses[step] = math.inf if math.isnan(loss) else loss

    @property
    def best(self) -> int:
        """The step with the lowest loss, the first of equal ones."""
        return min(self.losses, key=lambda step: (self.losses[step], step))

    @property
    def has_stopped_falling(self) -> bool:
        """Whether the last ``STALLED`` losses are all about as high as the lowest one before them, or higher."""
        losses = [loss for _, loss in sorted(self.losses.items())]
        before, last = losses[:-STALLED], losses[-STALLED:]
        return bool(before) and min(last) > min(before) * (1 - FALL)

    def state(self) -> Tensor:
        """The losses for a checkpoint, float64 [n, 2]."""
        return torch.tensor(list(self.losses.items()), dtype=torch.float64)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue with the losses of a checkpoint, if it has some."""
        if STATE in state:
            self.losses = {int(step): loss for step, loss in state[STATE].tolist()}

    def to_row(self, source: str, every: int) -> dict[str, object]:
        """The report's row. ``source``: of the samples. ``every``: steps between two measurements."""
        when = f"before training, every {every} steps and at the end"
        return {
            "metric": self.metric,
            "protocol": f"{len(self.samples)} samples of {source}, never trained on; {when}",
            "losses": {str(step): loss for step, loss in self.losses.items()},
            "kept": self.best,
        }

    def note(self) -> str:
        """One line if training ended early, or worse than an earlier step; else empty."""
        first, last, best = 0, max(self.losses), self.best
        if self.planned is not None:
            return (
                f"recovery ended after step {last} of {self.planned}, as the loss on held-out samples had stopped "
                f"falling; the weights of step {best} were kept (loss {self.losses[best]:.4g}, at first "
                f"{self.losses[first]:.4g})"
            )
        if best == last:
            return ""
        worse = f"{self.losses[best]:.4g} → {self.losses[last]:.4g}"
        if best == first:
            return (
                f"recovery made the model worse on held-out samples (loss {worse} in {last} steps), and the weights "
                "from before it were kept; try a lower --lr or more text"
            )
        return (
            f"recovery got worse on held-out samples after step {best} of {last} (loss {worse}); the weights of step "
            f"{best} were kept"
        )


Teacher = Callable[[Samples], TeacherOutputs]
"""Samples on the host → the dense model's outputs, on the device."""
Metrics = dict[str, float]
ExtraState = tuple[Callable[[], dict[str, Tensor]], Callable[[Mapping[str, Tensor]], None]]
"""State that checkpoints hold besides the student's: a call that returns it, and one that restores it."""


@dataclass(eq=False)
class Loop:
    """The steps of one phase: ``run`` takes them all; ``take_steps`` lets the caller act after each.

    It continues from the newest checkpoint of the phase, if there is one. With a ``watch`` the loss on its samples is
    measured before the first step and at each checkpoint. The student ends with the weights of the lowest loss.

    Args:
        accelerator: made from the run's settings; it prepares ``student`` here.
        student: a module of ``task``. Parameters that require a gradient are trained.
        samples: the training samples.
        steps: number of steps. ``pick_rows`` gives the samples of each.
        each_step: called with the tokens of the step, after the backward passes and before the optimiser; returns
            metrics.
        extra: state that checkpoints also hold.
        sizes: modules that compute with the weights of ``student``, which are trained together: the first imitates the
            teacher, the others the first. By default the student itself.
        rounding: weights with whose rounded values the passes compute, in training and on held-out samples.
        limit: the time of a run by minutes, which may change ``steps``; None: ``steps`` are taken.

    Attributes:
        done: steps that are taken.
        plans: whether ``steps`` may change. A resumed run keeps the number that its checkpoint has.
        pace: of what comes after the steps (``TimeLimit``).
    """

    accelerator: Accelerator
    student: nn.Module
    teacher: Teacher
    task: Task
    samples: Samples
    steps: int
    settings: Training
    phase: str
    folder: RunFolder
    first_row: int = 0
    each_step: Callable[[int], Metrics] = lambda tokens: {}
    extra: ExtraState | None = None
    watch: Watch | None = None
    sizes: Sequence[nn.Module] = ()
    rounding: WeightRounding | None = None
    limit: TimeLimit | None = None
    progress: Callable[[int, int, Metrics], None] = lambda done, total, metrics: None
    done: int = field(default=0, init=False)
    pace: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        given = self.student
        trained = {n for n, p in given.named_parameters() if p.requires_grad}
        self.student, self.optimizer = prepare_training(self.accelerator, given, make_optimizer(given, self.settings))
        # Looked up again by name: FSDP2 has replaced the parameters by shards.
        self.parameters = {n: p for n, p in given.named_parameters() if n in trained}
        self.sizes = self.sizes or (self.student,)
        self.plans = self.limit is not None
        self._times: list[float] = []
        self._kept_seconds = self._checked = 0.0
        self._metrics: Metrics = {}

    def run(self) -> None:
        """Train to the last step.

        Raises:
            MptkError: the loss or a gradient is not finite; the last good checkpoint is kept.
        """
        for _ in self.take_steps():
            if self.plans and self.limit is not None and self._is_planned_now():
                self._plan_steps(self.limit)

    def take_steps(self) -> Iterator[int]:
        """Train, and give the number of steps taken after each, before it is logged and stored. Raises as ``run``."""
        with retain_memory():
            self._begin()
            while self.done < self.steps:
                self._take_step()
                yield self.done
                self._keep_step()
            self._finish()

    def _begin(self) -> None:
        """Go back to the newest checkpoint, if there is one."""
        began = time.monotonic()
        if self.limit is not None:
            self.pace = self.limit.measure_pace(began)
        self.done = self._restore()
        # The weights from before the first step may turn out to be the best ones, so they are measured and stored.
        if self.watch is not None and self.done not in self.watch.losses:
            self.watch.add(self.done, self._measure_held_out(self.watch.samples))
            self._save(self.done)
            self._checked = time.monotonic() - began

    def _take_step(self) -> None:
        began = time.monotonic()
        self._metrics, tokens = self._step(self.done)
        self._times.append(time.monotonic() - began)
        self._metrics["tokens/s"] = tokens / max(self._times[-1], 1e-9)
        self.done += 1

    def _keep_step(self) -> None:
        """Log the step and, if its turn has come, measure it on held-out samples and store a checkpoint."""
        done, metrics, began = self.done, self._metrics, time.monotonic()
        # Measure before the checkpoint: it keeps the losses, and the folder keeps the best checkpoint.
        saves = done % self.settings.save_every == 0 or done == self.steps
        if saves and self.watch is not None:
            self.watch.add(done, self._measure_held_out(self.watch.samples))
            metrics[NAME] = self.watch.losses[done]
            if self.limit is not None and done < self.steps and self.watch.has_stopped_falling:
                self.watch.planned, self.steps = self.steps, done
        if self.accelerator.is_main_process:
            self.folder.log(self.phase, done, metrics)
        if saves:
            self._save(done)
            self._checked = time.monotonic() - began
        self.accelerator.log({f"{self.phase}/{name}": value for name, value in metrics.items()}, step=done)
        self.progress(done, self.steps, metrics)

    def _finish(self) -> None:
        """Go back to the weights with the lowest loss on held-out samples."""
        if self.watch is not None:
            self._adopt(self.watch.best)

    @property
    def seconds(self) -> float:
        """Clock time of a step: the mean without the first one, or what the checkpoint says; 0 if nothing is known."""
        taken = self._times[1:] or self._times
        return sum(taken) / len(taken) if taken else self._kept_seconds

    def _is_planned_now(self) -> bool:
        again = self.done >= FIRST_STEPS and self.done & (self.done - 1) == 0
        return again or self.done % self.settings.save_every == 0

    def _plan_steps(self, limit: TimeLimit) -> None:
        """Set the number of steps to what fits into the time that is left."""
        each = self.seconds + self._checked / self.settings.save_every
        fit = partial(limit.fit_steps, time.monotonic(), self.done, each, self.pace, self._checked)
        grows = self.done <= max(FIRST_STEPS, EARLY * self.steps)
        fits = max(self.done, run_once(fit))  # one process decides for all
        self.steps = fits if grows else min(fits, self.steps)

    def pick_rows(self, step: int) -> Tensor:
        """The samples of ``step``, as row numbers. Each epoch takes all samples in a random order of its own."""
        first = self.first_row + step * self.settings.batch
        return draw_epoch_rows(first, self.settings.batch, len(self.samples), self.settings.seed)

    def _step(self, step: int) -> tuple[Metrics, int]:
        acc, settings = self.accelerator, self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, self.steps, settings.warmup)

        # Each process takes its part of the batch, in parts that fit memory. A part counts by its number of samples.
        own = self.pick_rows(step).chunk(acc.num_processes)[acc.process_index]
        parts = list(own.split(settings.micro))
        sums: dict[str, Tensor] = {}
        with self._round_weights():
            for i, rows in enumerate(parts):
                share = len(rows) / len(own)
                with self._synchronize_if_last(i == len(parts) - 1):
                    for losses in self._compute_losses(self.samples[rows]):
                        with record_function("backward"):
                            acc.backward(losses["loss"] * share)
                        for name, value in losses.items():
                            sums[name] = sums.get(name, 0) + value.detach() * share

        # Nothing is updated before losses and gradients are known to be finite: the last checkpoint stays good.
        metrics = {name: float(acc.reduce(value, "mean")) for name, value in sums.items()}
        with record_function("clip"):
            metrics["gradient"] = float(gather_tensor(acc.clip_grad_norm_(self.student.parameters(), settings.clip)))
        self._require_finite(metrics, step)

        # The solver of masks reads their gradients, which belong to the weights from before the step.
        tokens = settings.batch * self.samples.positions
        with record_function("masks"):
            metrics |= self.each_step(tokens)
        with record_function("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return metrics, tokens

    def _synchronize_if_last(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Average gradients over processes after the last part of a step only."""
        if last:
            return contextlib.nullcontext()
        without: contextlib.AbstractContextManager[None] = self.accelerator.no_sync(self.student)
        return without

    def _round_weights(self) -> contextlib.AbstractContextManager[None]:
        return self.rounding.round_weights() if self.rounding is not None else contextlib.nullcontext()

    def _compute_losses(self, samples: Samples) -> Iterator[dict[str, Tensor]]:
        """The losses of each size, which are to be propagated back before the next size runs."""
        weights, task = self.settings.losses, self.task
        compares = weights.kl or weights.hidden_loss or task.compares
        with record_function("teacher"):
            target, states = self.teacher(samples) if compares else (None, None)
        own = samples.to(self.accelerator.device)
        for i, size in enumerate(self.sizes):
            with record_function("student"):
                output, hidden = run_module(task, size, own, hidden=bool(weights.hidden_loss))
            with record_function("losses"):
                found = compute_distillation_losses(output, own.targets, target, weights, classes=task.classes)
            if weights.hidden_loss:
                assert states is not None
                assert hidden is not None
                found["hidden"] = compute_hidden_error(hidden[1:], states[1:])
                found["loss"] = found["loss"] + weights.hidden_loss * found["hidden"]
            yield found | ({f"loss of size {i + 1}": found["loss"]} if len(self.sizes) > 1 else {})
            # In-place distillation: the smaller sizes imitate the largest one, and not the teacher.
            if compares and not i:
                target, states = output.detach(), None if hidden is None else [state.detach() for state in hidden]

    @torch.no_grad()
    def _measure_held_out(self, samples: Samples) -> float:
        """The mean loss on ``samples``, whose windows the processes share. It does not depend on their number."""
        # One sample at a time, so the mean is the same whatever the number of processes. ``fewest``: the samples that
        # the trace of a graph needs at least.
        acc, count = self.accelerator, len(samples)
        each, fewest = -(-count // acc.num_processes), getattr(unwrap_module(self.student), "fewest", 1)
        total = torch.zeros((), dtype=find_widest_float(acc.device), device=acc.device)
        # Every process runs as many samples, since a sharded model needs all of them; those too many do not count.
        with self._round_weights():
            for row in range(acc.process_index * each, (acc.process_index + 1) * each):
                one = samples[row % count : row % count + 1].repeat(fewest)
                losses = self._compute_losses(one)
                total = total + sum(found["loss"] for found in losses) * (row < count)
        return float(acc.reduce(total, "sum")) / count

    def _require_finite(self, metrics: Metrics, step: int) -> None:
        if not all(math.isfinite(v) for v in metrics.values()):
            values = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())
            raise InputError(
                f"step {step + 1} of {self.phase}: {values}; lower --lr or use float32, then --resume from the last "
                f"checkpoint in {self.folder.path}",
                name="lr",
            )

    # ---- checkpoints ----

    def _save(self, step: int) -> None:
        state = self._state()  # shards are gathered from all processes
        if self.accelerator.is_main_process:
            best = None if self.watch is None else self.watch.best
            self.folder.save_checkpoint(self.phase, step, state, best)

    def _adopt(self, step: int) -> None:
        """Go back to the weights after ``step`` steps."""
        if step == self.steps:
            return
        self.accelerator.wait_for_everyone()  # the first process writes
        state = self.folder.read_checkpoint(self.phase, step)
        with torch.no_grad():
            for n, p in self.parameters.items():
                p.copy_(shard_like(state[f"parameter.{n}"], p))

    def _state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, on the host of the main process. All processes must call it."""
        moments = self.optimizer.optimizer.state
        parameters = [(f"parameter.{n}", p) for n, p in self.parameters.items()]
        parameters += [
            (f"optimizer.{key}.{n}", value) for n, p in self.parameters.items() for key, value in moments[p].items()
        ]
        state = gather_tensors(parameters, keep=self.accelerator.is_main_process)
        state["rng"] = torch.get_rng_state()
        if self.watch is not None:
            state[STATE] = self.watch.state()
        if self.limit is not None:
            state[PLANNED_STEPS] = torch.tensor([self.steps, self.seconds], dtype=torch.float64)
        return state | (self.extra[0]() if self.extra else {})

    @torch.no_grad()
    def _restore(self) -> int:
        # Metrics of steps after the checkpoint are written again.
        latest = self.folder.read_latest(self.phase)
        if self.accelerator.is_main_process:
            self.folder.drop_metrics(self.phase, latest[0] if latest else 0)
        self.accelerator.wait_for_everyone()
        if latest is None:
            return 0
        step, state = latest
        for n, p in self.parameters.items():
            p.copy_(shard_like(state[f"parameter.{n}"], p))
            # Names are "optimizer.KEY.PARAMETER". Moments have the parameter's shape; AdamW's counter is a scalar.
            values = {
                k.split(".", 2)[1]: state[k] for k in state if k.startswith("optimizer.") and k.split(".", 2)[2] == n
            }
            self.optimizer.optimizer.state[p] = {
                key: shard_like(value, p) if value.shape == p.shape else value for key, value in values.items()
            }
        torch.set_rng_state(state["rng"])
        if self.watch is not None:
            self.watch.load(state)
        # Before the first step nothing was planned again.
        if step and self.limit is not None and PLANNED_STEPS in state:
            planned, self._kept_seconds = state[PLANNED_STEPS].tolist()
            self.steps, self.plans = int(planned), False
        if self.extra:
            self.extra[1](state)
        return step


def run_module(task: Task, module: nn.Module, samples: Samples, *, hidden: bool = False) -> Output:
    """A module's output on ``samples``, and its hidden states if ``hidden``.

    Raises:
        MptkError: the module gives no hidden states, or its code does not run in an autocast to half precision.
    """
    try:
        if not hidden:
            output, states = task.compute_output(module, samples), None
        else:
            found = task.call(module, samples, output_hidden_states=True)
            output, states = task.read(found), getattr(found, "hidden_states", None)
    except RuntimeError as error:
        # DeBERTa fills a mask with float32's least number, which half precision does not hold.
        if "without overflow" not in str(error):
            raise
        name = type(unwrap_module(module)).__name__
        raise ModelError(
            f"{name} does not run in half precision ({take_first_line(error)}); give --compute-dtype float32, and no "
            "--precision",
            name=name,
        ) from error
    if hidden and states is None:
        raise InputError("this model gives no hidden states to compare; leave out --hidden-loss", name="hidden_loss")
    return output if isinstance(output, Tensor) else join_outputs(output), states


def move_to_host(outputs: Tensor | Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Whole outputs in float32 on the host."""
    if isinstance(outputs, Tensor):
        return gather_tensor(outputs).float().cpu()
    return tuple(gather_tensor(each).float().cpu() for each in outputs)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Learning rate at ``step``, as a share of its peak: linear warm-up, then a cosine to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def draw_epoch_rows(first: int, length: int, count: int, seed: int) -> Tensor:
    """Entries ``first`` to ``first + length − 1`` of all epochs in a row: each is a random order of ``count`` rows."""
    # A step may lie in two epochs. A large prime keeps the orders of all epochs and seeds apart.
    wanted = range(first, first + length)
    orders = {
        epoch: torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for epoch in {i // count for i in wanted}
    }
    return torch.stack([orders[i // count][i % count] for i in wanted])


# ---- the optimizers: AdamW, and Muon for the matrices of a model whose own weights are trained ----

MUON_RATE = 12.0
"""Muon's rate as a multiple of AdamW's. At 12 it was best, and at 20 the loss rose (``benchmarks/recovery.md``)."""
MOMENTUM, SIZE = 0.95, 0.2
"""``SIZE``: root mean square of an update at a rate of 1, about that of AdamW's updates (arXiv 2502.16982)."""
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.775, 2.0315)
"""The steps of the Newton–Schulz iteration, and the coefficients of its quintic (Jordan et al. 2024)."""
PRODUCT_TOKENS = 8
"""Tokens of a forward pass that take as long as a step's products, over the hidden size: 7.9 for SmolLM2-135M on one
core in float32, 4.3 in bfloat16."""
BFLOAT16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
"""Whether this processor multiplies in bfloat16. If not, torch emulates it, which takes minutes a step."""


def make_optimizer(student: nn.Module, settings: Training) -> AdamW:
    """The optimizer of all parameters that require a gradient. A group's ``peak`` is its highest rate."""
    rate, trained = settings.lr, [p for p in student.parameters() if p.requires_grad]
    assert rate is not None
    if settings.optimizer == "adamw":
        return AdamW([{"params": trained, "peak": rate}], lr=rate, weight_decay=0.0, fused=True)
    chosen = {id(p) for p in find_matrices(student)}
    return Muon([p for p in trained if id(p) in chosen], [p for p in trained if id(p) not in chosen], rate)


def count_product_tokens(settings: Learning, hidden: int) -> float:
    """Tokens of a forward pass of the dense model that take as long as Muon's products in a step."""
    return 0.0 if settings.rank or settings.training.optimizer == "adamw" else PRODUCT_TOKENS * hidden


def find_matrices(model: nn.Module) -> list[Tensor]:
    """Parameters with two dimensions, except tables with a row for each token: embeddings and a language model's head.

    Muon is for matrices that multiply vectors. A token's row is trained by itself.
    """
    tables = [p for module in model.modules() for p in _find_tables(module) if p.ndim == 2]
    rows = max((len(p) for p in tables), default=None)
    own = {id(p) for p in tables}
    # A head that is not tied to the embedding is known by its number of rows.
    return [p for p in model.parameters() if p.ndim == 2 and id(p) not in own and len(p) != rows]


def _find_tables(module: nn.Module) -> Sequence[Tensor]:
    if isinstance(module, ProgramModule):
        return module.tables
    return [module.weight] if isinstance(module, nn.Embedding) else []


class Muon(AdamW):
    """Steps along the nearest orthogonal matrix to the momentum (Jordan et al. 2024), like ``torch.optim.Muon``.

    torch's own always multiplies in bfloat16, and does not know shards: here each process computes whole matrices.
    ``others``: parameters that AdamW trains, at ``rate``.
    """

    def __init__(self, matrices: Sequence[Tensor], others: Sequence[Tensor], rate: float) -> None:
        groups = [
            {"params": matrices, "peak": MUON_RATE * rate, "muon": True},
            {"params": others, "peak": rate, "muon": False},
        ]
        super().__init__([group for group in groups if group["params"]], lr=rate, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change each parameter that has a gradient."""
        # AdamW's step sees only its own groups.
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            for p in group["params"] if group["muon"] else ():
                if p.grad is not None:
                    self._turn(p, p.grad, group["lr"])

    def _turn(self, p: Tensor, gradient: Tensor, rate: float) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        update = make_orthogonal(gather_tensor(gradient.lerp(state["momentum"], MOMENTUM)))  # Nesterov's momentum
        # An orthogonal matrix has a root mean square of 1 / √(its longer side).
        p.add_(shard_like(update, p), alpha=-rate * SIZE * max(update.shape) ** 0.5)


def make_orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix whose singular values are all 1: theirs are from 0.7 to 1.2."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]  # x xᵀ is the smaller product if x is wide
    x = matrix.T if tall else matrix
    x = x.bfloat16() if x.device.type != "cpu" or BFLOAT16 else x.float()
    x = x / x.norm().clamp(min=1e-7)  # the iteration converges for singular values of at most 1
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


__all__ = ["Loop", "Metrics", "Teacher", "Training", "draw_epoch_rows", "schedule"]
