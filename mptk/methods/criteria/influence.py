"""influence: how far a residual block turns its input (block influence of ShortGPT, arXiv 2403.03853).

    score(b) = 1 − mean over tokens of cos(x_b, y_b)

for the input x_b and the result y_b of block b, vectors of the residual width. A block that hardly turns the residual
stream is removed first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mptk.distributed.sharing import sharing
from mptk.errors import MptkError
from mptk.ir.axes import axes_in, leaves
from mptk.ir.blocks import Block
from mptk.ir.families import Analysis, Family
from mptk.ir.samples import Samples
from mptk.methods.criteria.base import Evidence, Scores
from mptk.methods.criteria.observe import OBSERVED_TOKENS, batches, in_samples
from mptk.progress import Count
from mptk.staged.staged import EXECUTOR, Executor


def score(evidence: Evidence, families: Sequence[Family]) -> Scores:
    """The influence of each block, or its rank (``greedy.py``), [1, 1, blocks].

    Raises:
        MptkError: the units of a family are channels.
    """
    for family in families:
        if family.stack is None:
            raise MptkError(refusal(family.name))
    return {family.name: evidence.influences[family.name].float().reshape(1, 1, -1) for family in families}


def refusal(name: str) -> str:
    """Why a family of channels is not scored."""
    return (
        f"this method judges whole blocks, not the channels of {name}; name a depth, or use another --method, which "
        "removes blocks by their influence, too"
    )


def measure(
    analysis: Analysis,
    depths: Sequence[Family],
    samples: Samples,
    progress: Count | None = None,
    executor: Executor = EXECUTOR,
) -> dict[str, Tensor]:
    """Depth → the influence of each of its blocks on ``samples``, float64 [blocks]. Processes of a run share them."""
    stacks = [family.stack for family in depths if family.stack is not None]
    if not stacks:
        return {}
    sums = [torch.zeros(2, len(stack.blocks), dtype=torch.float64) for stack in stacks]

    def see(stack: int, unit: int, dim: int, x: Tensor, y: Tensor) -> None:
        turned = 1 - cosine_similarity(x.float(), y.float(), dim)
        sums[stack][:, unit] += torch.tensor([turned.double().sum(), turned.numel()], dtype=torch.float64)

    watches = [
        ((block.input, block.output), partial(see, i, unit, _width(analysis, block)))
        for i, stack in enumerate(stacks)
        for unit, block in enumerate(stack.blocks)
    ]
    given = batches(analysis.program, samples, OBSERVED_TOKENS)
    share = sharing(len(given))
    own = share.own(given)
    executor.watch(analysis.program, [batch.tensors for batch in own], watches, in_samples(progress, own))
    totals = [share.total(seen.to(executor.device)).cpu() for seen in sums]
    return {family.name: turned / count for family, (turned, count) in zip(depths, totals, strict=True)}


def _width(analysis: Analysis, block: Block) -> int:
    """The dimension of the residual width: the last one along which weights have an axis of the block's result."""
    held = axes_in(term for dims in analysis.weights.values() for term in dims)
    dims = analysis.facts.dims(block.output)
    return max((d for d, term in enumerate(dims) if held & set(leaves(term))), default=len(dims) - 1)
