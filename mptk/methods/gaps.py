"""gaps: the runs of blocks that a cut removes, and the layer before each that can make up for it.

Without a gap's blocks its input x takes the place of its result y. If x = W h + the rest, then a W' with
W' h = W h + y − x gives y without the blocks; ``reconstruct`` fits it by least squares. (ReplaceMe, Shopkhoev et al.
2025, arXiv 2505.02819, fits a square matrix and merges it into W.)

W h must reach x by additions only, and x must reach only the gap: then nothing else changes. So a gap has no such layer

1. at the start of a model, where x is an embedding;
2. behind a norm of the layer's result (BERT, Gemma);
3. behind a mixture of experts, whose weight has a matrix for each expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from mptk.ir.blocks import Block
from mptk.ir.families import Analysis
from mptk.ir.ops import get_argument, name_base_op
from mptk.ir.resolved_plan import Cut, list_removed_blocks
from mptk.methods.criteria.observe import Site, find_sites

_PASSED = frozenset({"clone", "contiguous", "dropout", "view", "reshape", "_unsafe_view", "to", "_to_copy"})
_TURNED = frozenset({"t", "transpose", "permute", "numpy_T"})


@dataclass(frozen=True)
class Gap:
    """A run of removed blocks from ``x`` to ``y``, and the layer before it.

    ``weight``: its name; ``dim``: the dimension that it sums over; ``h``: its inputs, along their last dimension.
    """

    x: fx.Node
    y: fx.Node
    weight: str
    dim: int
    h: fx.Node


def find_gaps(analysis: Analysis, cut: Cut) -> list[Gap]:
    """The gaps of a cut that a layer can make up for, in the graph's order."""
    sites = {site.node: site for site in find_sites(analysis)}
    found = []
    for run in _split_runs(list_removed_blocks(analysis, cut)):
        x, y = run[0].input, run[-1].output
        if {node for block in run for node in block.nodes}.issuperset(x.users):
            before = sorted((sites[node] for node in _find_summands(x) if node in sites), key=lambda site: site.node)
            matrices = [(matrix, site.x) for site in before if (matrix := _own_matrix(analysis, site)) is not None]
            found += [Gap(x, y, weight, dim, h) for (weight, dim), h in matrices[-1:]]
    return found


def _own_matrix(analysis: Analysis, site: Site) -> tuple[str, int] | None:
    """The name and the summed dimension of a layer's weight; None unless it is one matrix that only this layer uses."""
    program, node, dim = analysis.program, site.weight, site.weight_dim
    while len(node.users) == 1 and name_base_op(node.target) in _TURNED:
        node, dim = node.all_input_nodes[0], 1 - dim
    name = program.weights.get(node.name)
    plain = site.x_dim == site.x.meta["val"].ndim - 1 and site.ends is None and not site.shared
    if name is None or not plain or len(node.users) > 1 or name in program.aliases.values():
        return None
    return (name, dim) if program.state.like(name).ndim == 2 else None


def _split_runs(blocks: list[Block]) -> Iterator[list[Block]]:
    """Blocks that follow each other."""
    run: list[Block] = []
    for block in blocks:
        if run and block.input is not run[-1].output:
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def _find_summands(x: fx.Node) -> Iterator[fx.Node]:
    """``x`` and the values that reach only it, by additions and by calls that keep every number."""
    waiting, like = [x], x.meta["val"]
    while waiting:
        node = waiting.pop()
        yield node
        name = name_base_op(node.target) if node.op == "call_function" else ""
        if name in _PASSED or (name == "add" and get_argument(node, "alpha", 1) == 1):
            given = [source for source in node.all_input_nodes if len(source.users) == 1]
            waiting += [source for source in given if _has_same_rows(source.meta["val"], like)]


def _has_same_rows(one: object, other: Tensor) -> bool:
    """Whether two values have the same number of rows of the same length."""
    if not isinstance(one, Tensor) or not one.ndim:
        return False
    return one.shape[-1] == other.shape[-1] and str(one.numel()) == str(other.numel())
