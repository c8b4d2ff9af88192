"""distil: train each cut block to give the dense block's outputs, block by block.

A block ends after its consumer (``reconstruct``) is added to the residual stream, so in a transformer it is an
attention or a feed-forward layer. Its inputs come from the cut and trained blocks before it. Its targets are the dense
model's values at its end. So it also learns to make up for earlier losses, which a fit on the dense model's inputs
cannot. BRECQ learns rounding in this way (Li et al. 2021, arXiv 2102.05426).

One block of each program is in memory at a time, so a model that is too large to train can be distilled.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from mptk.config import Settings
from mptk.cost.estimate import ModelSizes, Pass
from mptk.distributed.processes import Sharing, share_batches
from mptk.ir import Analysis, Cut, Dims, Program, Samples, Weights, collect_axes, list_removed_blocks
from mptk.methods.criteria.observe import find_sites, split_batches
from mptk.methods.maskprune.train import schedule
from mptk.methods.reconstruct import name_operand_weight
from mptk.progress import Count
from mptk.protocols import Kept, RunFolder
from mptk.staged.partition import Flow, partition_blocks
from mptk.staged.spool import Spool
from mptk.staged.staged import EXECUTOR, Executor, StagedRun
from passes.transforms.remove_blocks import mask_blocks
from passes.transforms.rewrite import Rewrite

STEP = 512
"""Tokens in a training step."""
JUDGING = 8
"""One step in this many is held out, to see whether training made the block better."""
WARMUP = 0.05
"""Share of the steps in which the rate rises."""
FLOOR = 1e-3
"""Least divisor of a position's error, as a share of the mean square. Else positions near 0 would decide the mean."""
ERRORS = "errors"
"""Name of a block's errors beside its weights in the folder of an unfinished run."""
NO_BLOCK = "no cut block has matrices of its own to train, so local distillation changed nothing"


@dataclass(frozen=True)
class Schedule:
    """Train with Adam for ``epochs`` over the samples, in an order from ``seed``, with a ``rate`` that falls to 0.

    ``step``: tokens in a training step.
    """

    epochs: int
    rate: float
    seed: int = 0
    step: int = STEP


@dataclass(frozen=True)
class Distilled:
    """``weights``: the trained weights, in the cut model's shapes. ``errors``: of each block, before and after."""

    weights: Weights
    errors: Sequence[tuple[float, float]]

    @property
    def note(self) -> str:
        """One line on the result."""
        before, after = (sum(each) / len(self.errors) for each in zip(*self.errors, strict=True))
        better = sum(after < before for before, after in self.errors)
        return (
            f"local distillation made {better} of {len(self.errors)} blocks better and left the others; mean error on "
            f"samples that were not trained on: {before:.3g} → {after:.3g}"
        )


def estimate_distillation(settings: Settings, sizes: ModelSizes, kept: float) -> dict[str, Pass]:
    """The cost of ``distil_blocks``: both models forward once, the small one forward and backward in each epoch."""
    s = settings
    if not s.distil_epochs:
        return {}
    passes = 1 + kept * (1 + 3 * s.distil_epochs)
    return {"distil": Pass(s.windows * s.length * passes, s.length, reads=2)}


@torch.no_grad()
def distil_blocks(
    analysis: Analysis,
    cut: Cut,
    consumers: Collection[str],
    changes: Mapping[str, Tensor],
    samples: Samples,
    how: Schedule,
    progress: Count | None = None,
    executor: Executor = EXECUTOR,
    folder: RunFolder | None = None,
) -> Distilled | None:
    """Train the matrices of every block that has a consumer of a cut family. Processes share a step if it divides.

    Args:
        analysis: of the dense model.
        consumers: names of the weights that sum over cut units; each ends a block.
        changes: the weights in which the pruned model differs from the dense one, in dense shapes.
        samples: the model's inputs.
        executor: runs both programs; values that exceed its memory go to files.
        folder: holds the blocks of an unfinished run.

    Returns:
        None if no block has a matrix that no other block uses.
    """
    if not consumers:
        return None
    # Both programs are divided at the same values, so that a block of one has its counterpart in the other.
    dense, sites = analysis.program, find_sites(analysis)
    small, flow = _cut_student(analysis, cut, dense.with_state(changes)), Flow(dense)
    part = partition_blocks(flow, [site.node for site in sites if name_operand_weight(dense, site.weight) in consumers])
    given, share = _split_steps(dense, samples, how.step)
    teacher, student = (StagedRun(executor, each, part, given) for each in (flow, Flow(small)))

    # What follows the last consumer is a further stage, which is not trained.
    count = len(part.ends)
    gone = tuple(f"{block.module}." for block in list_removed_blocks(analysis, cut))
    matrices = {name for site in sites if not (name := name_operand_weight(dense, site.weight)).startswith(gone)}
    owned = _find_owned(student, matrices)
    if not any(owned[:count]):
        return None

    # If an earlier run has stored every block, no model needs to run.
    runs = folder is None or not all(folder.keeps(f"block-{k}") for k in range(count))
    shelf, errors = Spool(executor.borders), list[tuple[float, float]]()
    for k in range(count):
        block = _Block(analysis, cut, teacher, student, share, k, owned[k])
        # The teacher goes first: its values after the block are the targets. The student follows with the trained
        # weights, so the next block learns to make up for this one's errors.
        if runs:
            teacher.advance(k)
        train = partial(block.train, how)
        found = dict((train() if folder is None else folder.keep(f"block-{k}", train)).tensors)
        if runs:
            student.advance(k, weights=block.join_weights(found))
        before, after = found.pop(ERRORS).tolist()
        errors.append((before, after))
        for name, weight in found.items():
            shelf.add(name, weight)
        if progress is not None:
            progress(k + 1, count)
    return Distilled(shelf.weights, errors)


def _cut_student(analysis: Analysis, cut: Cut, changed: Program) -> Program:
    """The cut program with the dense program's calls; the outputs of removed blocks are multiplied by 0."""
    # Removed blocks stay as zeros: without them the two programs could not be divided at the same values.
    small = Rewrite(analysis, cut)(changed).program
    if removed := list_removed_blocks(analysis, cut):
        small = replace(small, graph=small.copy_graph())
        mask_blocks(small.graph.graph, removed)
        small.graph.recompile()
    return small


def _split_steps(program: Program, samples: Samples, tokens: int) -> tuple[list[tuple[Tensor, ...]], Sharing]:
    """The program's inputs in each step of ``tokens`` for this process, and how the processes share them."""
    steps = split_batches(program, samples, tokens)
    if len(steps) > 1 and len(steps[-1]) < len(steps[0]):  # a step of fewer samples would count as much as another
        steps.pop()
    share = share_batches(min(len(step) for step in steps))
    if len(steps[0]) % share.count:  # unequal parts would weigh unequally in the mean gradient
        share = Sharing()
    return [step.chunk(share.count)[share.index].tensors for step in steps], share


def _find_owned(run: StagedRun, matrices: Collection[str]) -> list[dict[fx.Node, str]]:
    """Each stage's matrices that no other stage uses, by name: training a shared one would harm the other stages."""
    weights = run.program.weights
    each = [{weights[node.name] for node in stage.weights} for stage in run.stages]
    return [
        {
            node: name
            for node in stage.weights
            if (name := weights[node.name]) in matrices and sum(name in used for used in each) == 1
        }
        for stage in run.stages
    ]


class _Block:
    """Block ``k`` of both programs. ``owned``: the placeholders of the trained weights, with their names."""

    def __init__(
        self,
        analysis: Analysis,
        cut: Cut,
        teacher: StagedRun,
        student: StagedRun,
        share: Sharing,
        k: int,
        owned: dict[fx.Node, str],
    ) -> None:
        self.cut, self.teacher, self.student, self.share, self.k = cut, teacher, student, share, k
        stages = teacher.stages[k], student.stages[k]
        made, theirs = set(stages[0].nodes), {node.name: node for node in stages[1].outputs}
        # An axis that weights have is one of channels. Errors are summed over these, and averaged over the others.
        learned = {axis for dims in analysis.weights.values() for axis in collect_axes(dims)}
        # Only results that this block makes count, not values that it passes on.
        self.ends: list[tuple[fx.Node, fx.Node, Dims, list[int]]] = []
        for node in stages[0].outputs:
            dims = analysis.facts.results.get(node)
            if (
                node in made
                and node.name in theirs
                and isinstance(dims, tuple)
                and node.meta["val"].is_floating_point()
            ):
                channels = [d for d, term in enumerate(dims) if learned & set(collect_axes([term]))]
                self.ends.append((node, theirs[node.name], dims, channels))
        self.owned = owned if self.ends else {}

    def train(self, how: Schedule) -> Kept:
        """The weights of the epoch with the least error, or the initial ones if no epoch had less, and ``ERRORS``."""
        values = {node: weight.detach() for node, weight in self.student.read(self.k).items()}
        values |= {node: values[node].clone().requires_grad_() for node in self.owned}
        learned = [values[node] for node in self.owned]

        # The last steps are held out. If there is only one step, it is trained on and judged by.
        steps = range(self.student.count)
        judged = steps[-max(1, len(steps) // JUDGING) :]
        taught = steps[: -len(judged)] or judged
        first = least = self._mean(values, judged)
        best = [weight.detach().clone() for weight in learned]

        # A block may own no matrix. torch refuses an empty list of parameters, but not a group without any.
        optimizer = torch.optim.Adam([{"params": learned}], lr=how.rate, fused=True)
        # A large prime keeps the orders of all blocks and seeds apart.
        generator = torch.Generator().manual_seed(how.seed * 1_000_003 + self.k)
        for epoch in range(how.epochs if learned else 0):
            for done, i in enumerate(torch.randperm(len(taught), generator=generator).tolist()):
                rate = schedule(epoch * len(taught) + done, how.epochs * len(taught), WARMUP)
                self._step(optimizer, how.rate * rate, values, taught[i])
            found = self._mean(values, judged)
            if found < least:
                least, best = found, [weight.detach().clone() for weight in learned]
        named = {name: weight.cpu() for name, weight in zip(self.owned.values(), best, strict=True)}
        return Kept({**named, ERRORS: torch.tensor([first, least], dtype=torch.float64)})

    def join_weights(self, found: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
        """The student's weights in this block with the trained ones among them."""
        values = self.student.read(self.k)
        return values | {node: found[name].to(values[node].device) for node, name in self.owned.items()}

    def _step(self, optimizer: torch.optim.Optimizer, rate: float, values: dict[fx.Node, Tensor], i: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        with torch.enable_grad():
            self._compute_error(values, i).backward()
        for node in self.owned:
            if (gradient := values[node].grad) is not None:
                values[node].grad = self.share.sum_all(gradient) / self.share.count
        optimizer.step()

    def _mean(self, values: dict[fx.Node, Tensor], steps: Sequence[int]) -> float:
        """The mean error in some steps; 0 if the block has no results to compare."""
        if not self.ends:
            return 0.0
        total = torch.stack([self._compute_error(values, i) for i in steps]).mean()
        return float(self.share.sum_all(total)) / self.share.count

    def _compute_error(self, values: dict[fx.Node, Tensor], i: int) -> Tensor:
        """The block's squared error in step ``i`` over the squares of the dense block's results, a mean of places."""
        # Values between stages are dropped once they are taken; these are needed in each epoch.
        given = self.student.borders.take((self.k, i), keep=True)
        found = self.student.run_stage(self.student.stages[self.k], self.student.cast_values(values), given)
        wanted = self.teacher.borders.take((self.k + 1, i), keep=True)
        errors = []
        for dense, small, dims, channels in self.ends:
            target = self.cut.slice(wanted[dense].float(), dims)
            apart, size = (found[small].float() - target).square(), target.square()
            if channels:
                apart, size = apart.sum(channels), size.sum(channels)
            errors.append((apart / size.clamp_min(FLOOR * size.mean() + 1e-12)).mean())
        return torch.stack(errors).sum()
