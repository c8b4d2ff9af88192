"""influence: how much a residual block turns its input (block influence of ShortGPT, arXiv 2403.03853).

    score(b) = 1 − mean over tokens of cos(x_b, y_b)

for the input x_b and the result y_b of block b, vectors of the residual width. A block that hardly turns the residual
stream is removed first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from mptk.ir import Analysis, Block, Depth, Variable, collect_axes, list_axes
from mptk.methods.criteria.base import Criterion, Scores
from mptk.methods.criteria.observe import Calibration, watch


def score_by_influence(influences: Mapping[str, Tensor], variables: Sequence[Variable]) -> Scores:
    """The influence of each block, or its rank (``greedy.py``), [1, 1, blocks]."""
    return {v.name: influences[v.name].float().reshape(1, 1, -1) for v in variables}


def measure_influence(given: Calibration) -> dict[str, Tensor]:
    """Depth → the influence of each of its blocks on the text, float64 [blocks]."""
    # For each block the sum over tokens, and the number of tokens.
    depths = [v.family for v in given.variables if isinstance(v.family, Depth)]
    stacks = [depth.stack for depth in depths]
    sums = [torch.zeros(2, len(stack.blocks), dtype=torch.float64) for stack in stacks]

    def see(stack: int, unit: int, dim: int, x: Tensor, y: Tensor) -> None:
        turned = 1 - cosine_similarity(x.float(), y.float(), dim)
        sums[stack][:, unit] += torch.tensor([turned.double().sum(), turned.numel()], dtype=torch.float64)

    watches = [
        ((block.input, block.output), partial(see, i, unit, _find_width_dim(given.analysis, block)))
        for i, stack in enumerate(stacks)
        for unit, block in enumerate(stack.blocks)
    ]
    share = watch(given, watches)
    totals = [share.sum_all(seen.to(given.executor.device)).cpu() for seen in sums]
    return {depth.name: turned / count for depth, (turned, count) in zip(depths, totals, strict=True)}


def _find_width_dim(analysis: Analysis, block: Block) -> int:
    """The dimension of the residual width: the last one along which weights have an axis of the block's result."""
    held = collect_axes(term for dims in analysis.weights.values() for term in dims)
    dims = analysis.facts.dims(block.output)
    return max((d for d, term in enumerate(dims) if held & set(list_axes(term))), default=len(dims) - 1)


INFLUENCE = Criterion(
    "influence",
    "how far a block turns its input, 1 − cosine",
    measure_influence,
    score_by_influence,
    judges=("blocks",),
)
