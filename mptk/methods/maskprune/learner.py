"""learning: MaskPrune's phases on a loaded model: learn masks and widths, choose units, take over, recover.

``mptk.methods.maskprune`` holds the parts that need no pass; here they meet the analysis and the masks' places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mptk.compat.peft import adapters_off
from mptk.cost.model import CostModel
from mptk.errors import MptkError
from mptk.ir.families import Analysis
from mptk.ir.plan import Plan
from mptk.ir.resolved_plan import resolve_plan
from mptk.methods import criteria
from mptk.methods.maskprune.adapters import adapt, merged, original, recompute
from mptk.methods.maskprune.losses import language_model
from mptk.methods.maskprune.run_folder import TRACKER, WorkFolder
from mptk.methods.maskprune.solver import Rates, Solver
from mptk.methods.maskprune.teacher import CachedTeacher, LiveTeacher, fingerprint
from mptk.methods.maskprune.train import Loop, Metrics, Training
from mptk.methods.processes import accelerator, anywhere, full, sharded
from mptk.methods.reconstruct import reconstruct
from passes.targets.legalize import Candidate
from passes.transforms.insert_masks import InsertedMasks, disturbed, find_mask_sites, insert_masks
from passes.verify import RUNTIME_TOLERANCE, TOLERANCE

HALF_TOLERANCE = 5e-2
"""Largest logit difference, relative to the largest logit, of a model that computes in half precision."""

TrainingProgress = Callable[[str, int, int, Metrics], None]
"""(phase, steps done, steps in all, metrics)."""


@dataclass(frozen=True)
class Learning:
    """How a model is trained while it is pruned and after.

    ``steps`` in all (None: 200 for MaskPrune, none for a one-shot method or a given plan); MaskPrune learns masks in
    the first ``mask_share`` of them. ``rank`` is LoRA's; 0 trains all weights (in recovery only). ``teacher``: ``live``
    or ``cached``, for this run or, in ``teacher_cache``, for others too. ``precision``: ``no``, ``bf16`` or ``fp16``.

    Raises:
        MptkError: an unknown teacher, precision or tracker, or a cached teacher with a hidden-state loss.
    """

    steps: int | None = None
    mask_share: float = 0.4
    rank: int = 16
    teacher: str = "live"
    teacher_cache: str | None = None
    precision: str = "no"
    gradient_checkpointing: bool = False
    tracker: str = "none"
    training: Training = field(default_factory=Training)
    rates: Rates = field(default_factory=Rates)

    def __post_init__(self) -> None:
        for what, chosen, known in (
            ("teacher", self.teacher, ("live", "cached")),
            ("precision", self.precision, ("no", "bf16", "fp16")),
            ("tracker", self.tracker, ("none", "tensorboard", "wandb")),
        ):
            if chosen not in known:
                raise MptkError(f"no {what} {chosen!r}; choose {', '.join(known[:-1])} or {known[-1]}")
        if self.teacher_cache is not None and self.teacher != "cached":
            raise MptkError("a folder for the teacher's outputs is of use to a cached teacher; add --teacher cached")
        if self.teacher == "cached" and self.training.losses.hidden:
            raise MptkError("a cached teacher keeps logits only; use --teacher live with a hidden-state loss")


class Learner:
    """The phases of one run. ``windows`` are the training text, int64 [n, length]; ``work`` keeps checkpoints.

    Raises:
        MptkError: the batch does not divide over the processes; a tracker that is not installed.
    """

    def __init__(
        self, model: Any, windows: Tensor, settings: Learning, work: WorkFolder, report: TrainingProgress
    ) -> None:
        self.model, self.windows, self.settings, self.work, self.report = model, windows, settings, work, report
        tracker = None if settings.tracker == "none" else settings.tracker
        self.accelerator = accelerator(settings.precision, log_with=tracker, project_dir=work.path)
        if tracker is not None:
            if not self.accelerator.log_with:
                raise MptkError(f"the tracker {tracker} is not installed; pip install {tracker}")
            self.accelerator.init_trackers(TRACKER)
        if settings.training.batch % self.accelerator.num_processes:
            raise MptkError(
                f"a batch of {settings.training.batch} windows does not divide over {self.accelerator.num_processes} "
                "processes; give another --batch"
            )
        self.mask_steps = max(2, round((settings.steps or 0) * settings.mask_share))
        self.used_rows = 0
        self.dense = "" if settings.teacher_cache is None else fingerprint(model)

    # ---- masks and widths ----

    def learn(
        self,
        analysis: Analysis,
        cost: CostModel,
        candidates: Sequence[Candidate],
        budget: float,
        calibration: Tensor,
        tokens: Tensor,
    ) -> tuple[Plan, dict[str, Tensor], Tensor]:
        """Learn masks and widths; returns the plan and the weights that changed, dense shapes, removed units at 0.

        Also the student's own logits on ``tokens``, hardened masks and adapters still in place: what those weights
        must give.

        Args:
            candidates: legal widths that meet the budget; the learned widths become the nearest of them.
            budget: share of the cost to keep.
            calibration: windows that units are judged on before anything is trained, int64 [n, length].
        """
        begins = self.work.latest("masks") is None
        prior = self._prior(analysis, list(candidates[0].widths), calibration) if begins else {}
        student, masks, solver, loop = self.begin(analysis, cost, candidates, budget)
        if begins:
            solver.prior = prior
            self._saliency(student, solver, calibration)
        loop.run()
        widths = {c: w for c, w in solver.fixed.items() if w < solver.shapes[c][2]}
        plan = criteria.select(analysis, {c: solver.saliency(c) for c in widths}, widths)
        solver.harden(tables(analysis, plan))
        logits = own_logits(self.accelerator, loop.student, tokens)
        changed = merged(student)
        recompute(student, False)
        masks.remove()
        student.unload()
        changed |= masks.folded({**dict(self.model.named_parameters()), **changed})
        self.model.cpu()
        self.accelerator.free_memory()
        self.used_rows = self.mask_steps * self.settings.training.batch
        return plan, {n: t.detach().cpu() for n, t in changed.items()}, logits

    def begin(
        self, analysis: Analysis, cost: CostModel, candidates: Sequence[Candidate], budget: float
    ) -> tuple[Any, InsertedMasks, Solver, Loop]:
        """The student with adapters and masks, the masks, their solver, and the loop that is to train them."""
        families = list(candidates[0].widths)
        shapes = {c: _shape(analysis, c) for c in families}
        given = {c: w for c, w in candidates[0].widths.items() if {k.widths[c] for k in candidates} == {w}}
        solver = Solver(shapes, cost.share, budget, self.mask_steps, self.settings.rates, given=given)
        base = deepcopy(self.model) if self.accelerator.is_fsdp2 else self.model  # shards do not become whole again
        student = adapt(base, self.settings.rank, self.settings.training.seed)
        masks = insert_masks(original(student), analysis, families, solver.applied, solver.watch)
        recompute(student, self.settings.gradient_checkpointing)
        teacher = self._teacher(lambda ids, **k: _dense(student, masks, ids, **k))

        def each_step(tokens: int) -> Metrics:
            self._average(solver)
            solver.step(tokens)
            if not solver.fixed and solver.step_count >= solver.ramp * solver.steps:
                solver.fix(nearest_candidate(candidates, solver.widths(), shapes))
            return solver.metrics()

        extra = (solver.state, solver.load)
        loop = self._loop(student, teacher, self.mask_steps, "masks", each_step=each_step, extra=extra)
        return student, masks, solver, loop

    def _prior(self, analysis: Analysis, families: Sequence[str], calibration: Tensor) -> criteria.Scores:
        """Wanda's scores: what they take for F comes from weights and inputs alone, without a gradient."""

        def say(done: int, total: int) -> None:
            self.report("activations", done, total, {})

        evidence = criteria.gather(analysis, "wanda", calibration, families=families, progress=say)
        return {c: t.detach().cpu() for c, t in criteria.score_evidence(evidence, "wanda", families).items()}

    def _saliency(self, student: Any, solver: Solver, calibration: Tensor) -> None:
        """F before anything is trained: gradients of the language-model loss in the masks, all at one.

        Each is of ``micro`` windows over all processes, rounded up to as many for each, so that F does not depend on
        how many processes there are; windows that are left over are not used.
        """
        a = self.accelerator
        together = -(-self.settings.training.micro // a.num_processes) * a.num_processes
        repeated = calibration.repeat(-(-together // len(calibration)), 1)
        parts = repeated[: len(repeated) // together * together].split(together)
        for done, part in enumerate(parts, 1):
            with adapters_off(student):
                ids = part.chunk(a.num_processes)[a.process_index].to(a.device)
                language_model(student(input_ids=ids, use_cache=False).logits, ids).backward()
            self._average(solver)
            solver.observe(part.numel())
            solver.clear()
            self.report("saliency", done, len(parts), {})

    def _average(self, solver: Solver) -> None:
        """Over processes, so that every one of them takes the same step."""
        a = self.accelerator
        if a.num_processes > 1:
            for m in solver.masks.values():
                assert m.grad is not None
                m.grad = a.reduce(m.grad.to(a.device), "mean").to(m.device)
            for c, squares in solver.squares.items():  # of gradients of each process's own mean
                mean = a.reduce(squares.to(a.device), "mean") / a.num_processes
                solver.squares[c] = mean.to(squares.device)

    # ---- after the cut ----

    def recover(self, small: Any, steps: int, tokens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Train the cut model against the dense one; returns the weights that changed, in its own shapes.

        Also the trained model's own logits on ``tokens``, adapters not yet merged.
        """
        loop = self.recovery(small, steps)
        loop.run()
        logits = own_logits(self.accelerator, loop.student, tokens)
        student = self.accelerator.unwrap_model(loop.student)
        state = merged(student) if self.settings.rank else dict(student.named_parameters())
        return {name: full(t.detach()).cpu() for name, t in state.items()}, logits

    @property
    def tolerance(self) -> float:
        """How near the weights taken over must come to the trained model's own logits, relative to the largest."""
        a = self.accelerator
        if a.is_fsdp2 and self.settings.precision != "no":  # its blocks compute in half precision, trained or not
            return HALF_TOLERANCE
        return TOLERANCE if a.device.type == "cpu" else RUNTIME_TOLERANCE

    def recovery(self, small: Any, steps: int) -> Loop:
        """The loop that is to train the cut model."""
        s = self.settings
        a = self.accelerator
        dense = sharded(a, deepcopy(self.model)) if a.is_fsdp2 else self.model
        teacher = self._teacher(
            lambda ids, **k: (dense if a.is_fsdp2 else dense.to(a.device))(ids, use_cache=False, **k)
        )
        student = adapt(small, s.rank, s.training.seed) if s.rank else small.requires_grad_(True)
        recompute(student, s.gradient_checkpointing)
        return self._loop(student, teacher, steps, "recovery")

    # ---- shared ----

    def _loop(self, student: Any, teacher: Any, steps: int, phase: str, **each: Any) -> Loop:
        return Loop(
            self.accelerator,
            student,
            teacher,
            self.windows,
            steps,
            self.settings.training,
            phase=phase,
            work=self.work,
            first_row=self.used_rows,
            progress=lambda done, total, metrics: self.report(phase, done, total, metrics),
            **each,
        )

    def _teacher(self, run: Callable[..., Any]) -> Any:
        hidden = bool(self.settings.training.losses.hidden)
        live = LiveTeacher(lambda ids: run(ids, output_hidden_states=hidden))
        if self.settings.teacher == "live":
            return live
        shared = self.settings.teacher_cache
        folder = self.work.path / "teacher" if shared is None else Path(shared) / self.dense
        return CachedTeacher(live, folder, wanted=lambda missing: anywhere(self.accelerator, missing))


@torch.no_grad()
def own_logits(accelerator: Accelerator, student: Any, tokens: Tensor) -> Tensor:
    """Logits of a student as it was trained, in evaluation mode and float32. All processes must ask.

    Its training is over: the wrapper that computes in half precision is taken off. Shards keep theirs.
    """
    if not accelerator.is_fsdp2:
        student = accelerator.unwrap_model(student, keep_fp32_wrapper=False)
    logits: Tensor = student.eval()(input_ids=tokens.to(accelerator.device), use_cache=False).logits
    return full(logits).float().cpu()


def nearest_candidate(
    candidates: Sequence[Candidate], learned: Mapping[str, float], shapes: Mapping[str, tuple[int, int, int]]
) -> dict[str, int]:
    """The candidate whose widths are nearest to the learned ones, as shares of the dense widths."""

    def distance(candidate: Candidate) -> float:
        return sum(((w - learned[c]) / shapes[c][2]) ** 2 for c, w in candidate.widths.items())

    return dict(min(candidates, key=distance).widths)


def tables(analysis: Analysis, plan: Plan) -> dict[str, Tensor]:
    """What a plan keeps of families that masks can hold: family → boolean [layers, scopes, size]."""
    choices = resolve_plan(analysis, plan).choices
    return {
        name: torch.stack([torch.from_numpy(choices[g.axis].table) for g in analysis.family(name).groups])
        for name in plan.families
        if disturbed(analysis, name) is None
    }


def take_over(
    model: Any,
    analysis: Analysis,
    plan: Plan,
    state: Mapping[str, Tensor],
    windows: Tensor,
    progress: Callable[..., None],
) -> dict[str, Tensor]:
    """``state`` with what is left of each consumer fitted to the dense layer's outputs (``reconstruct``)."""
    kept = tables(analysis, plan)
    held: dict[str, Tensor] = {}
    for place in find_mask_sites(analysis, model, list(kept)):
        if place.where == "input":
            flat = torch.cat([kept[place.family][place.layer].flatten(), torch.ones(1, dtype=torch.bool)])
            name = place.weights[0][0]
            held[name] = held.get(name, torch.tensor(True)) & flat[place.index]
    return reconstruct(model.cpu(), held, state, windows, lambda done, total: progress("take over", done, total))


def removed_at_zero(analysis: Analysis, model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """The weights at which a plan's masks go in, with the removed units at 0: a one-shot cut as ``learn`` gives it."""
    kept = {c: t.float() for c, t in tables(analysis, plan).items()}
    masks = insert_masks(model, analysis, list(kept), lambda family, layer: kept[family][layer])
    masks.remove()
    return masks.folded({n: p.detach() for n, p in model.named_parameters()})


def _shape(analysis: Analysis, name: str) -> tuple[int, int, int]:
    family = analysis.family(name)
    return len(family.groups), family.scopes, family.size


def _dense(student: Any, masks: InsertedMasks, ids: Tensor, **options: Any) -> Any:
    """The dense model inside the student: the same weights, with masks and adapters off."""
    with masks.disabled(), adapters_off(student):
        return student(input_ids=ids, use_cache=False, **options)


__all__ = ["Learner", "Learning", "nearest_candidate", "removed_at_zero", "tables", "take_over"]
