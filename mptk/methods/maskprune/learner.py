"""learner: MaskPrune's phases on a loaded model: learn masks and widths, choose units; then recovery.

The phases use the solver, the training loop, the adapters and the teacher of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from mptk.compat.peft import adapters_off
from mptk.errors import MptkError
from mptk.ir.families import Analysis
from mptk.ir.resolved_plan import resolve_plan
from mptk.methods.criteria import Scores, gather, score_evidence, select
from mptk.methods.maskprune.adapters import adapt, merged, original, recompute
from mptk.methods.maskprune.losses import language_model
from mptk.methods.maskprune.solver import Solver
from mptk.methods.maskprune.teacher import CachedTeacher, LiveTeacher, fingerprint
from mptk.methods.maskprune.train import Loop, Metrics
from mptk.methods.reconstruct import kept_units
from mptk.progress import Progress
from mptk.run.folder import TRACKER, RunFolder
from mptk.run.processes import accelerator, anywhere, full, sharded
from mptk.run.settings import Learning
from mptk.run.values import Chosen, Prepared, Text, Witness
from passes.targets.legalize import Candidate
from passes.transforms.insert_masks import InsertedMasks
from passes.verify import RUNTIME_TOLERANCE, TOLERANCE

HALF_TOLERANCE = 5e-2
"""Largest logit difference, relative to the largest logit, of a model that computes in half precision."""


def start_training(settings: Learning, folder: RunFolder) -> Accelerator:
    """The processes of this run, with the tracker that the settings name.

    Raises:
        MptkError: the batch does not divide over the processes; a tracker that is not installed.
    """
    tracker = None if settings.tracker == "none" else settings.tracker
    made = accelerator(settings.precision, log_with=tracker, project_dir=folder.path)
    if tracker is not None:
        if not made.log_with:
            raise MptkError(f"the tracker {tracker} is not installed; pip install {tracker}")
        made.init_trackers(TRACKER)
    if settings.training.batch % made.num_processes:
        raise MptkError(
            f"a batch of {settings.training.batch} windows does not divide over {made.num_processes} processes; "
            "give another --batch"
        )
    return made


class Learner:
    """The phases of one run. ``windows`` are the training text, int64 [n, length]; ``folder`` keeps checkpoints."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: PreTrainedModel,
        windows: Tensor,
        settings: Learning,
        folder: RunFolder,
        progress: Progress,
    ) -> None:
        self.accelerator, self.model, self.windows = accelerator, model, windows
        self.settings, self.folder, self.progress = settings, folder, progress
        self.mask_steps = max(2, round((settings.steps or 0) * settings.mask_share))
        self.dense = "" if settings.teacher_cache is None else fingerprint(model)

    # ---- masks and widths ----

    def learn(self, prepared: Prepared, text: Text) -> Chosen:
        """Learn masks and widths. The changed weights have dense shapes, with removed units at 0.

        The witness is the student's own logits, hardened masks and adapters still in place: what those weights must
        give. Units are judged on ``text.calibration`` before anything is trained.
        """
        analysis = prepared.analysis
        begins = self.folder.latest("masks") is None
        prior = self._prior(analysis, prepared.families, text.calibration) if begins else {}
        student, masks, solver, loop = self.begin(prepared)
        if begins:
            solver.prior = prior
            self._saliency(student, solver, text.calibration)
        loop.run()
        widths = {c: w for c, w in solver.fixed.items() if w < solver.shapes[c][2]}
        plan = select(analysis, {c: solver.saliency(c) for c in widths}, widths)
        cut = resolve_plan(analysis, plan)
        solver.harden(kept_units(analysis, cut, list(widths)))
        logits = own_logits(self.accelerator, loop.student, text.proof)
        changed = merged(student)
        recompute(student, False)
        masks.remove()
        student.unload()
        changed |= masks.folded({**dict(self.model.named_parameters()), **changed})
        self.model.cpu()
        self.accelerator.free_memory()
        state = {n: t.detach().cpu() for n, t in changed.items()}
        witness = Witness("learned masks", logits, self.tolerance)
        return Chosen(plan, cut, state, tuple(state), witness=witness, steps=self.mask_steps)

    def begin(self, prepared: Prepared) -> tuple[Any, InsertedMasks, Solver, Loop]:
        """The student with adapters and masks, the masks, their solver, and the loop that is to train them."""
        candidates = prepared.candidates
        shapes = {c: _shape(prepared.analysis, c) for c in prepared.families}
        given = {c: w for c, w in candidates[0].widths.items() if {k.widths[c] for k in candidates} == {w}}
        budget = 1 - prepared.settings.sparsity
        solver = Solver(shapes, prepared.cost.share, budget, self.mask_steps, self.settings.rates, given=given)
        base = deepcopy(self.model) if self.accelerator.is_fsdp2 else self.model  # shards do not become whole again
        student = adapt(base, self.settings.rank, self.settings.training.seed)
        masks = InsertedMasks(original(student), prepared.mask_sites, solver.applied, solver.watch)
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

    def _prior(self, analysis: Analysis, families: Sequence[str], calibration: Tensor) -> Scores:
        """Wanda's scores: what they take for F comes from weights and inputs alone, without a gradient."""
        say = partial(self.progress, "activations")
        evidence = gather(analysis, "wanda", calibration, families=families, progress=say)
        return {c: t.detach().cpu() for c, t in score_evidence(evidence, "wanda", families).items()}

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
            self.progress("saliency", done, len(parts))

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

    def recover(self, small: Any, steps: int, tokens: Tensor, used: int = 0) -> tuple[dict[str, Tensor], Witness]:
        """Train the cut model against the dense one; returns the weights that changed, in its own shapes.

        ``used``: training windows that were used before. The witness is the trained model's own logits on ``tokens``,
        adapters not yet merged.
        """
        loop = self.recovery(small, steps, used)
        loop.run()
        logits = own_logits(self.accelerator, loop.student, tokens)
        student = self.accelerator.unwrap_model(loop.student)
        state = merged(student) if self.settings.rank else dict(student.named_parameters())
        self.model.cpu()
        trained = {name: full(t.detach()).cpu() for name, t in state.items()}
        return trained, Witness("trained model", logits, self.tolerance)

    @property
    def tolerance(self) -> float:
        """How near the weights taken over must come to the trained model's own logits, relative to the largest."""
        a = self.accelerator
        if a.is_fsdp2 and self.settings.precision != "no":  # its blocks compute in half precision, trained or not
            return HALF_TOLERANCE
        return TOLERANCE if a.device.type == "cpu" else RUNTIME_TOLERANCE

    def recovery(self, small: Any, steps: int, used: int = 0) -> Loop:
        """The loop that is to train the cut model."""
        s = self.settings
        a = self.accelerator
        dense = sharded(a, deepcopy(self.model)) if a.is_fsdp2 else self.model
        teacher = self._teacher(
            lambda ids, **k: (dense if a.is_fsdp2 else dense.to(a.device))(ids, use_cache=False, **k)
        )
        student = adapt(small, s.rank, s.training.seed) if s.rank else small.requires_grad_(True)
        recompute(student, s.gradient_checkpointing)
        return self._loop(student, teacher, steps, "recovery", first_row=used)

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
            folder=self.folder,
            progress=lambda done, total, metrics: self.progress(phase, done, total, _figures(metrics)),
            **each,
        )

    def _teacher(self, run: Callable[..., Any]) -> Any:
        hidden = bool(self.settings.training.losses.hidden)
        live = LiveTeacher(lambda ids: run(ids, output_hidden_states=hidden))
        if self.settings.teacher == "live":
            return live
        shared = self.settings.teacher_cache
        folder = self.folder.path / "teacher" if shared is None else Path(shared) / self.dense
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


def _figures(metrics: Metrics) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _shape(analysis: Analysis, name: str) -> tuple[int, int, int]:
    family = analysis.family(name)
    return len(family.groups), family.scopes, family.size


def _dense(student: Any, masks: InsertedMasks, ids: Tensor, **options: Any) -> Any:
    """The dense model inside the student: the same weights, with masks and adapters off."""
    with masks.disabled(), adapters_off(student):
        return student(input_ids=ids, use_cache=False, **options)


__all__ = ["Learner", "nearest_candidate", "start_training"]
