"""learner: MaskPrune's phases on a loaded model: learn masks and widths, choose units, and recover after the cut.

The phases use the solver, the training loop, the adapters and the teacher of this package.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mptk.compat.accelerate import without_autocast
from mptk.compat.peft import adapt_as_named, is_lora_refused, switch_off_adapters
from mptk.config import FREE, Learning, Settings
from mptk.cost.estimate import ModelSizes, Pass
from mptk.cost.fixed import TRAINING_START_S
from mptk.cost.limit import LEAST_SCORED, TimeLimit
from mptk.distributed.processes import (
    find_module_blocks,
    gather_tensor,
    gather_tensors,
    holds,
    is_anywhere,
    is_leader,
    make_accelerator,
    place_model,
    run_once,
)
from mptk.errors import InputError, ModelError, PackageError
from mptk.ir import Samples, collect_kept_units, resolve_plan
from mptk.methods.criteria import Scores, score_units, select_units
from mptk.methods.criteria.wanda import WANDA
from mptk.methods.division.layers import describe_ends
from mptk.methods.maskprune.losses import cross_entropy
from mptk.methods.maskprune.rounding import SCHEME_BITS, WeightRounding
from mptk.methods.maskprune.solver import Solver
from mptk.methods.maskprune.teacher import TOP, CachedTeacher, Output, hash_model_weights
from mptk.methods.maskprune.train import (
    FIRST_STEPS,
    Loop,
    Metrics,
    Teacher,
    Watch,
    count_product_tokens,
    move_to_host,
    run_module,
)
from mptk.progress import Progress
from mptk.protocols import TRACKER, Chosen, Kept, Prepared, RunFolder, SampleSets, Task, Witness
from passes.targets.legalize import Candidate
from passes.transforms.insert_masks import InsertedMasks
from passes.verify import HALF_TOLERANCE, RUNTIME_TOLERANCE, TOLERANCE

STEP_S = 0.002
"""Seconds for each layer that a step takes however few its tokens. Without them a tiny model would be planned to take a
million steps, for which text is read."""
SCORED = 32
"""Most calibration windows on which units are scored before training. The steps that learn masks measure the same on
further windows, and 96 took a fifth of a run of 20 minutes (``mptk prune smollm2-135m --minutes 20 --estimate``)."""
SALIENCY = "saliency"
"""Name of the scores from before training in the folder of an unfinished run."""


def estimate_training(settings: Settings, sizes: ModelSizes, kept: float) -> dict[str, Pass]:
    """The cost of learning masks and of recovery together: of both models, in each step and on held-out samples."""
    s, training = settings, settings.learning.training
    if not s.steps:
        return {}
    # In a step the teacher goes forward, the student forward and backward, and backward costs as much as two passes.
    # The held-out samples, up to a batch, go forward before the first step, at each checkpoint and at the end.
    batches = s.steps * (1 + 3 * kept) + (2 + s.steps // training.save_every) * (1 + kept)
    products = s.steps * kept * count_product_tokens(settings.learning, sizes.hidden)
    tokens = batches * training.batch * s.length + products
    memory = estimate_training_memory(s, sizes, kept)
    return {"train": Pass(tokens, s.length, reads=0, training=memory, fixed=TRAINING_START_S + s.steps * STEP_S)}


def estimate_training_memory(settings: Settings, sizes: ModelSizes, kept: float) -> float:
    """Bytes that training takes beside the weights: optimizer and gradients, activations, logits of both models.

    ``kept``: the share of the parameters that stay.
    """
    s, tokens = settings.learning, settings.learning.training.micro * settings.length
    # All weights: a gradient and two moments of each, 4 bytes a number. LoRA: these and the adapters themselves, in a
    # layer about 8 rank × hidden numbers.
    states = 12.0 * kept * sizes.parameters if not s.rank else 16.0 * s.rank * sizes.layers * 8 * sizes.hidden
    # What autograd keeps of a token in a block, in hidden and inner sizes. With checkpointing only one block's are
    # there, and what enters each block.
    layers = 1 if s.gradient_checkpointing else sizes.layers
    activations = 4 * tokens * (layers * (12 * sizes.hidden + 4 * sizes.widest) + sizes.layers * sizes.hidden)
    # Logits of both models, and their temporary copies in the loss.
    return states + activations + 4 * 4 * tokens * sizes.vocab


def start_training(settings: Learning, folder: RunFolder) -> Accelerator:
    """The processes of this run, with the tracker of the settings.

    Raises:
        MptkError: the batch does not divide over the processes, or the tracker is not installed.
    """
    tracker = None if settings.tracker == "none" else settings.tracker
    if tracker is not None and is_leader():
        folder.make()  # with its mark, before the tracker makes it
    made = make_accelerator(settings.precision, log_with=tracker, project_dir=folder.path)
    if tracker is not None:
        if not made.log_with:
            raise PackageError(f"the tracker {tracker} is not installed; pip install {tracker}", name=tracker)
        made.init_trackers(TRACKER)
    if settings.training.batch % made.num_processes:
        raise InputError(
            f"a batch of {settings.training.batch} windows does not divide over {made.num_processes} processes; "
            "give another --batch",
            name="batch",
        )
    return made


@dataclass(frozen=True)
class Recovered:
    """``weights``: the changed weights, in the cut model's shapes. ``watch``: the losses on held-out samples.

    ``steps``: how many were taken.
    """

    weights: dict[str, Tensor]
    witness: Witness
    watch: Watch | None
    steps: int


@dataclass(frozen=True, eq=False)
class Learner:
    """The phases of one run.

    Args:
        prepared: gives each phase its own dense model and teacher on the host, to adapt and to move. Their parameters
            need values only in the first process, which sends them to the others.
        samples: the training samples.
        settings: ``Learning.of_masks`` or ``of_recovery``.
        folder: keeps checkpoints. scored: keeps the scores from before training, which depend on no width; by default
            that is ``folder``, too. limit: the time of a run by minutes; None: all steps are taken.
    """

    accelerator: Accelerator
    prepared: Prepared
    samples: Samples
    settings: Learning
    folder: RunFolder
    progress: Progress
    scored: RunFolder | None = None
    limit: TimeLimit | None = None

    @property
    def rank(self) -> int:
        """The rank of the adapters; 0 if all weights are trained."""
        return self.settings.rank or 0

    @property
    def keeps(self) -> bool:
        """Whether this process needs weights."""
        return holds()

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the teacher's weights, computed in the first process, and the precision if it is less."""
        found = [hash_model_weights(self.prepared.copy_teacher()) if self.accelerator.is_main_process else ""]
        less = "" if self.settings.precision == "no" else f"-{self.settings.precision}"
        return f"{broadcast_object_list(found)[0]}{less}"

    # ---- masks and widths ----

    def learn(self, sets: SampleSets) -> Chosen:
        """Learn masks and widths. The changed weights have dense shapes; removed units are 0.

        The witness holds the student's outputs with hardened masks and adapters; the changed weights must give the
        same. Units are first scored on ``sets.calibration``, before any training. Processes that need no weights
        (``processes.holds``) get no changes and no witness.
        """
        # Models and optimizer live only in the inner call: after it, accelerate holds the last references to them.
        chosen = self._learn_masks(sets)
        self.accelerator.free_memory()
        return chosen

    def _learn_masks(self, sets: SampleSets) -> Chosen:
        # Score units before training, unless a checkpoint of the loop holds the solver's later state.
        prepared, analysis, parts = self.prepared, self.prepared.analysis, self.prepared.settings.learning.mask_parts
        student, masks, solver, loop = self.begin()
        if self.folder.read_latest("masks") is None:
            before = partial(self._score_units, student, solver, sets.calibration[:SCORED])
            solver.load(dict((self.scored or self.folder).keep(SALIENCY, before).tensors))
        for done in loop.take_steps():
            if loop.plans and done == max(FIRST_STEPS, parts):
                self._plan_mask_steps(loop, solver, parts)

        # Units by their last scores, at the widths that the solver fixed.
        widths = {family: width for family, width in solver.fixed.items() if width < solver.shapes[family][2]}
        scores = {family: solver.compute_scores(family).cpu() for family in widths}
        plan = select_units(analysis, scores, widths, stock=prepared.legal.stock)
        cut = resolve_plan(analysis, plan)

        # The class may hold other units than the tail left (whole blocks), so masks follow the plan. The outputs are
        # computed with masks and adapters in place: the proof compares them with the merged weights'.
        solver.harden(collect_kept_units(analysis, cut, list(widths)))
        outputs = self.compute_outputs(loop.student, sets.proof)
        state = gather_tensors(collect_changed_weights(student, masks, analysis.program.state), keep=self.keeps)
        witness = Witness("learned masks", outputs, self.tolerance) if self.keeps else None
        notes = () if prepared.settings.layers == FREE else (describe_ends(prepared, scores, plan, sets),)
        steps, seconds = loop.steps // parts, loop.seconds * parts
        return Chosen(plan, cut, state, tuple(state), notes=notes, witness=witness, steps=steps, seconds=seconds)

    def _plan_mask_steps(self, loop: Loop, solver: Solver, parts: int) -> None:
        """Set the number of steps that learn masks, by how many steps the run will have in all.

        ``parts``: the loop's steps for each step of the settings.
        """
        assert self.limit is not None
        done, seconds = loop.done / parts, loop.seconds * parts
        fit = partial(self.limit.fit_steps, time.monotonic(), done, seconds, loop.pace)
        masks = replace(self.prepared.settings.learning, steps=run_once(fit)).mask_steps
        loop.steps = max(masks * parts, loop.done)
        solver.plan_steps(loop.steps)

    def begin(self) -> tuple[PeftModel, InsertedMasks, Solver, Loop]:
        """The student with adapters and masks, the masks, their solver, and the loop that trains them."""
        # Widths in which all candidates agree are given; the others are learned.
        prepared, candidates = self.prepared, self.prepared.candidates
        variables = {name: prepared.analysis.variable(name) for name in prepared.families}
        shapes = {name: (len(v.groups), v.scopes, v.size) for name, v in variables.items()}
        given = {
            family: width
            for family, width in candidates[0].widths.items()
            if all(candidate.widths[family] == width for candidate in candidates)
        }
        budget = 1 - prepared.settings.sparsity
        rates, device = self.settings.rates, self.accelerator.device
        depths = {f.name: f.stack.stay for f in prepared.analysis.depths if f.name in shapes}
        whole, batch, count = prepared.settings.learning, self.settings.training.batch, self.accelerator.num_processes
        if batch % count:
            raise InputError(
                f"a step that learns masks has {batch} windows, which do not divide over {count} processes; "
                f"give --batch {whole.mask_parts * count}",
                name="batch",
                nearest=(whole.mask_parts * count,),
            )
        # A step of the settings is several of the solver's (``mask_parts``), each with a part of the batch.
        steps = whole.mask_steps * whole.mask_parts
        stays = {family: units.to(device) for family, units in prepared.stays.items()}
        update = self.settings.masks
        solver = Solver(shapes, prepared.cost.share, budget, steps, rates, 0.6, given, device, depths, stays, update)

        # LoRA would have no effect where weights are read past their module, and hides a weight that is masked itself.
        masked = {site.module for site in prepared.mask_sites if site.masks_weights}
        student = adapt(prepared.copy_model(self.keeps), self.rank, self.settings.training.seed, masked)
        masks = InsertedMasks(unwrap_adapters(student), prepared.mask_sites, solver.get_mask, solver.watch)
        recompute(student, self.settings.gradient_checkpointing)

        # The student without masks and adapters is the dense model: a second copy is needed only for another teacher.
        dense = partial(_run_dense, prepared.task, student, masks)
        teacher = self._make_teacher(dense if prepared.compared is prepared.loaded else self._make_separate_teacher())

        # Once the target has reached the budget, widths are rounded to legal ones, and only masks and LoRA move.
        def each_step(tokens: int) -> Metrics:
            self._average(solver)
            solver.step(tokens)
            if not solver.fixed and solver.step_count >= solver.ramp * solver.steps:
                solver.fix(find_nearest_candidate(candidates, solver.compute_widths(), shapes))
            return solver.collect_metrics()

        extra = (solver.state, solver.load)
        loop = self._make_loop(student, teacher, steps, "masks", each_step=each_step, extra=extra)
        return student, masks, solver, loop

    def _score_units(self, student: PeftModel, solver: Solver, calibration: Samples) -> Kept:
        """The state of the solver before any training: with the prior and the saliency."""
        # First what shows how many samples there is time for.
        scored = self._estimate_saliency(student, solver, calibration)
        prior = self._score_prior(calibration[:scored])
        solver.prior = {family: values.to(solver.device) for family, values in prior.items()}
        return Kept(solver.state())

    def _score_prior(self, calibration: Samples) -> Scores:
        """Wanda's scores, an estimate of √F from weights and inputs without gradients, and the influence of blocks."""
        families, say = self.prepared.families, partial(self.progress, "activations")
        analysis, executor = self.prepared.analysis, self.prepared.calibrator
        return score_units(analysis, WANDA.name, calibration, families=families, progress=say, executor=executor)

    def _estimate_saliency(self, student: PeftModel, solver: Solver, calibration: Samples) -> int:
        """Estimate F before any training, from gradients of the task's loss in the masks, which are all 1.

        Returns the number of samples that it took: fewer than given if a run by minutes has no time for all of them.

        A batch has ``micro`` samples over all processes, rounded up to a multiple of their number. So F does not
        depend on the number of processes. Samples that do not fill a batch are dropped.
        """
        acc = self.accelerator
        together = -(-self.settings.training.micro // acc.num_processes) * acc.num_processes
        repeated = calibration.repeat(-(-together // len(calibration)))  # at least one whole batch
        parts = repeated[: len(repeated) // together * together].split(together)
        count, taken = len(parts), list[float]()
        for done, part in enumerate(parts, 1):
            if done > count:
                break
            began = time.monotonic()
            with switch_off_adapters(student):  # they change nothing before training, and cost time
                own = part.chunk(acc.num_processes)[acc.process_index].to(acc.device)
                self._compute_sensitivity(run_module(self.prepared.task, student, own)[0], own).backward()
            self._average(solver)
            solver.observe(len(part) * part.positions)
            solver.clear()
            # The first batch is slower than the others, and all processes must take as many.
            taken.append(time.monotonic() - began)
            if self.limit is not None and done == LEAST_SCORED:
                count = int(run_once(partial(self.limit.fit_batches, len(parts), min(taken))))
            self.progress("saliency", done, count)
        return len(calibration) if count == len(parts) else count * together

    def _compute_sensitivity(self, output: Tensor, samples: Samples) -> Tensor:
        """The mean of the function whose gradient is the saliency, on this process's part of a batch."""
        task = self.prepared.task
        if task.classes and samples.targets is not None and not task.compares:
            return cross_entropy(output, samples.targets)  # in chunks: logits are large
        return task.compute_sensitivity(output, samples) / task.count_predictions(samples)

    def _average(self, solver: Solver) -> None:
        """Average gradients over processes, so that all of them take the same step."""
        acc = self.accelerator
        if acc.num_processes > 1:
            for m in solver.masks.values():
                assert m.grad is not None
                m.grad = acc.reduce(m.grad, "mean")
            for family, squares in solver.squares.items():  # each process's gradients are of its own mean
                solver.squares[family] = acc.reduce(squares, "mean") / acc.num_processes

    # ---- after the cut ----

    def recover(
        self, small: nn.Module, steps: int, batch: Samples, used: int = 0, held_out: Samples | None = None
    ) -> Recovered | None:
        """Train the cut model to imitate the dense model.

        ``small``: the cut model, which is adapted. Only processes that hold weights need its values. ``used``: number
        of training samples that the run has used already. ``held_out``: samples that say which weights are kept. The
        witness holds the outputs of these on ``batch``, before adapters are merged. Only the first process gets them.
        """
        watch = None if held_out is None or not steps else Watch(held_out)
        recovered = self._recover_weights(small, steps, batch, used, watch)
        self.accelerator.free_memory()
        return recovered if self.accelerator.is_main_process else None

    def _recover_weights(
        self, small: nn.Module, steps: int, batch: Samples, used: int, watch: Watch | None
    ) -> Recovered:
        loop = self.make_recovery(small, steps, used, watch)
        loop.run()
        steps = loop.steps
        # Before adapters are merged: the proof compares these outputs with the merged weights'.
        outputs = self.compute_outputs(loop.student, batch)
        student = self.accelerator.unwrap_model(loop.student)
        state = merge_adapters(student) if self.rank else student.named_parameters()
        trained = gather_tensors(state, keep=self.accelerator.is_main_process)
        return Recovered(trained, Witness("trained model", outputs, self.tolerance), watch, steps)

    @property
    def tolerance(self) -> float:
        """Largest difference of the trained model and its stored weights, relative to the largest output."""
        acc = self.accelerator
        # Shards compute in half precision even after training; elsewhere autocast is switched off for the outputs.
        if acc.is_fsdp2 and self.settings.precision != "no":
            return HALF_TOLERANCE
        return TOLERANCE if acc.device.type == "cpu" else RUNTIME_TOLERANCE

    def make_recovery(self, small: nn.Module, steps: int, used: int = 0, watch: Watch | None = None) -> Loop:
        """The loop that trains the cut model."""
        settings = self.settings
        if self.rank:
            assert isinstance(small, PreTrainedModel)
            student: nn.Module = adapt(small, self.rank, settings.training.seed)
        else:
            student = small
        recompute(student, settings.gradient_checkpointing)
        rounding = self._make_rounding(student) if settings.quantize_aware else None
        return self.make_recovery_loop(student, steps, first_row=used, watch=watch, rounding=rounding)

    def _make_rounding(self, student: nn.Module) -> WeightRounding | None:
        """How the run's one quantised graph rounds the weights that are trained; None if it has none after all."""
        if self.rank:
            raise InputError(
                "this cut is recovered by adapters, not by the weights that are rounded; leave out --quantize-aware",
                name="quantize_aware",
            )
        # With ``auto`` the type that was chosen may be float32.
        scheme = next((name for name in self.prepared.settings.quantize if name in SCHEME_BITS), None)
        return None if scheme is None else WeightRounding(student, scheme)

    def make_recovery_loop(self, student: nn.Module, steps: int, **more: Any) -> Loop:
        """The loop that trains the parameters of ``student`` that require a gradient. ``more``: its other fields."""
        return self._make_loop(student, self._make_teacher(self._make_separate_teacher()), steps, "recovery", **more)

    # ---- shared ----

    def _make_separate_teacher(self) -> Callable[[Samples, bool], Output]:
        """A function that runs a teacher that is separate from the student."""

        # Placed at the first call: with a cached teacher there may be none.
        @cache
        def load_dense() -> Any:  # with a cached teacher it may never run
            return place_model(self.accelerator, self.prepared.copy_teacher(self.keeps))

        return lambda samples, hidden: run_module(self.prepared.task, load_dense(), samples, hidden=hidden)

    @torch.no_grad()
    def compute_outputs(self, student: nn.Module, batch: Samples) -> Tensor | tuple[Tensor, ...]:
        """The trained student's outputs in evaluation mode. All processes call it; shards stay in half precision."""
        acc = self.accelerator
        if not acc.is_fsdp2:
            student = without_autocast(acc, student)
        return move_to_host(self.prepared.task.compute_output(student.eval(), batch.to(acc.device)))

    def _make_loop(self, student: nn.Module, teacher: Teacher, steps: int, phase: str, **more: Any) -> Loop:
        """A loop of the run. ``more``: its other fields."""

        def report(done: int, total: int, metrics: Metrics) -> None:
            self.progress(phase, done, total, "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

        task, training = self.prepared.task, self.settings.training
        given = (self.accelerator, student, teacher, task, self.samples, steps, training, phase, self.folder)
        return Loop(*given, limit=self.limit, progress=report, **more)

    def _make_teacher(self, run: Callable[[Samples, bool], Output]) -> Teacher:
        """``run``: (samples, whether hidden states are wanted) → the dense model's output."""
        acc, shared = self.accelerator, self.settings.teacher_cache
        hidden, top = bool(self.settings.training.losses.hidden_loss), TOP if self.prepared.task.classes else 0
        live: Callable[[Samples], Output]
        live = torch.no_grad()(acc.autocast()(lambda given: run(given.to(acc.device), hidden)))
        if self.settings.teacher == "live":
            return live
        # A folder of the run belongs to one teacher. A folder that runs share has a subfolder for each.
        folder = self.folder.make() / "teacher" if shared is None else Path(shared) / self.fingerprint
        return CachedTeacher(live, folder, top, partial(is_anywhere, acc), acc.device)


def collect_changed_weights(
    student: PeftModel, masks: InsertedMasks, dense: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Each weight that learning changed, by name: adapters merged, masks folded, one at a time. Dense shapes.

    ``dense``: the dense model's weights.
    """
    adapted = set()
    for name, weight in merge_adapters(student):
        adapted.add(name)
        yield name, masks.fold(name, weight)
    for name in masks.weights:
        if name not in adapted:
            yield name, masks.fold(name, dense[name])


def find_nearest_candidate(
    candidates: Sequence[Candidate], learned: Mapping[str, float], shapes: Mapping[str, tuple[int, int, int]]
) -> dict[str, int]:
    """The widths of the candidate nearest to the learned widths, measured as shares of the dense widths."""

    def compute_distance(candidate: Candidate) -> float:
        return sum(((width - learned[family]) / shapes[family][2]) ** 2 for family, width in candidate.widths.items())

    return dict(min(candidates, key=compute_distance).widths)


def _run_dense(task: Task, student: PeftModel, masks: InsertedMasks, samples: Samples, hidden: bool) -> Output:
    """The output of the dense model inside the student: the same weights, with masks and adapters off."""
    with masks.switch_off(), switch_off_adapters(student):
        return run_module(task, student, samples, hidden=hidden)


# ---- LoRA (Hu et al. 2021, arXiv 2106.09685) with peft ----


def adapt(model: PreTrainedModel, rank: int, seed: int, but: Container[str] = ()) -> PeftModel:
    """``model`` with LoRA of ``rank`` and scale 2 on all linear layers but the head. Its own weights are frozen.

    ``seed``: of the adapters' initial weights. ``but``: modules without adapters.
    """
    # A tied head is the embedding, too: an adapter that is merged into it would change both.
    head = model.get_output_embeddings()
    # Other modules that hold the same weight would not have its adapter. A subclass with a forward of its own (a
    # router, a layer of groups) gives what none can be added to.
    held = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    linear = [
        name
        for name, module in model.named_modules()
        if type(module).forward in (nn.Linear.forward, Conv1D.forward)
        and module is not head
        and held[id(module.weight)] == 1
    ]
    names = [name for name in linear if name not in but and not is_lora_refused(model, name)]
    if not names:
        raise ModelError(
            f"{type(model).__name__} has no linear layer for LoRA, with which masks are learned; give a one-shot "
            "--method, as wanda, and no --rank",
            name=type(model).__name__,
        )
    transposed = any(isinstance(m, Conv1D) for m in model.modules())  # GPT-2's layers hold [in, out]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, fan_in_fan_out=transposed)
    with torch.random.fork_rng(devices=[]), adapt_as_named():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def unwrap_adapters(model: PeftModel) -> nn.Module:
    """The wrapped module, whose submodules keep their names."""
    return model.base_model.get_submodule("model")


def merge_adapters(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Each adapted layer's (weight name, weight plus adapter), one at a time, on the device. The model does not change.

    If weights are sharded over processes, all processes must call it, and each gets whole weights.
    """
    for name, layer in unwrap_adapters(model).named_modules():
        if isinstance(layer, Linear):
            with torch.no_grad():
                weight = gather_tensor(
                    layer.get_base_layer().get_parameter("weight") + layer.get_delta_weight("default")
                )
            yield f"{name}.weight", weight


def recompute(model: nn.Module, on: bool) -> None:
    """Switch gradient checkpointing of the blocks on or off.

    transformers' own gradient checkpointing needs training mode, which would switch dropout on.
    """
    for block in find_module_blocks(model):
        # An attribute of the instance hides the class's method; without it the method is back.
        if on:
            vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
        else:
            vars(block).pop("forward", None)


__all__ = ["Learner", "find_nearest_candidate", "start_training"]
