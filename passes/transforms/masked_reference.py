"""masked_reference: the dense Program with a plan's removed channels masked. The cut program must equal it.

Removed positions of every weight become zero, except in a weight that something is divided by. If zeros would
disturb a reduction, it leaves the masked channels out: a norm's statistics run over the kept ones, a softmax or a top-k
sees −inf (``passes/analysis/rules/reduce.py``). What a removed block adds is multiplied by 0 (``remove_blocks.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from mptk.ir import (
    ONE,
    Analysis,
    AxisFacts,
    Cut,
    Pass,
    PassResult,
    Program,
    Reduction,
    Term,
    get_argument,
    list_axes,
    list_removed_blocks,
    list_state_shapes,
    name_base_op,
)
from passes.analysis.rules.reduce import read_correction
from passes.analysis.rules.table import normalize_all
from passes.transforms.remove_blocks import mask_blocks

KeepMask = list[bool] | list["KeepMask"]
"""A nested list of booleans that broadcasts against the tensor it masks."""


def mask(analysis: Analysis, cut: Cut) -> Program:
    """The analysed program with its removed channels masked: same shapes as the dense one."""
    return Mask(analysis, cut)(analysis.program).program


@dataclass(frozen=True)
class Mask(Pass):
    """Zero the removed channels of every weight and leave them out of every statistic, softmax and maximum.

    What a removed block adds to its input is multiplied by 0.
    """

    analysis: Analysis
    cut: Cut
    name: ClassVar[str] = "mask"

    def requires(self, program: Program) -> None:
        """The program is the analysed one."""
        assert program.graph is self.analysis.program.graph, "the analysis is of another program"

    def run(self, program: Program) -> PassResult:
        graph = program.copy_graph()
        nodes = {n.name: n for n in graph.graph.nodes}
        # Weights, then the reductions that zeros would disturb, then whole blocks.
        for node in program.list_placeholders():
            if node.name in program.weights:
                self._mask_weight(graph, nodes[node.name], program.weights[node.name], program)
        disturbed = _find_disturbed(self.analysis.facts, self.cut)
        for node, reductions in disturbed.items():
            _mask_reduction(graph.graph, nodes[node.name], self.analysis.facts, self.cut, reductions)
        blocks = list_removed_blocks(self.analysis, self.cut)
        mask_blocks(graph.graph, blocks)
        graph.recompile()
        counts = {"reductions": len(disturbed), "blocks": len(blocks)}
        notes = tuple(f"{count} {what} masked" for what, count in counts.items() if count)
        return PassResult(replace(program, graph=graph), self.cut.removes, notes)

    def _mask_weight(self, graph: fx.GraphModule, node: fx.Node, name: str, program: Program) -> None:
        """Multiply a weight by its mask where it is first used, so that the product is freed after its last use."""
        dims, weight = self.analysis.weights.get(name, ()), program.state.find_like(name)
        # A weight that no call reads, and integers, need no mask.
        cut = self._cut_of(node.name)
        touched = [d for d, term in enumerate(dims) if cut.has_choice(term)]
        if not touched or not node.users or not (weight.is_floating_point() or weight.is_complex()):
            return
        keep = f"{node.name}_keep"
        graph.register_buffer(keep, keep_along(cut, dims, touched), persistent=False)
        with graph.graph.inserting_before(min(node.users)):
            product = graph.graph.call_function(torch.ops.aten.mul.Tensor, (node, graph.graph.get_attr(keep)))
        product.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(product, delete_user_cb=lambda user: user is not product)

    def _cut_of(self, placeholder: str) -> Cut:
        """The cut as it masks a weight: one that is divided by keeps its numbers."""
        # By name, since ``node`` is of a copy of the graph.
        kept = {n.name: axes for n, axes in self.analysis.facts.divisors.items()}.get(placeholder, ())
        return Cut({a: c for a, c in self.cut.choices.items() if a not in kept}, self.cut.sizes)

    def ensures(self, before: Program, after: Program) -> None:
        """The weights have the same names and shapes."""
        assert list_state_shapes(after) == list_state_shapes(before), "a weight has another shape"


def _find_disturbed(facts: AxisFacts, cut: Cut) -> dict[fx.Node, list[Reduction]]:
    """The calls whose result zeros would change, with their reductions over cut axes."""
    found: dict[fx.Node, list[Reduction]] = {}
    for reduction in facts.reductions:
        if reduction.kind in ("max", "min", "statistic") and cut.has_choice(reduction.axis):
            found.setdefault(reduction.node, []).append(reduction)
    return found


def _mask_reduction(graph: fx.Graph, node: fx.Node, facts: AxisFacts, cut: Cut, reductions: list[Reduction]) -> None:
    # Of a call with several reductions over cut axes, all have the kind of the first.
    first = reductions[0]
    dims = facts.dims(next(n for n in first.node.all_input_nodes if n in facts.results))
    if first.kind == "statistic":
        return _mask_statistic(node, dims, cut)
    # Fill the operand's masked positions with what the reduction ignores. topk and sort take the last dimension by
    # default, and maxima all.
    last = -1 if name_base_op(node.target) in ("topk", "sort") else None
    reduced = normalize_all(get_argument(node, "dim", last), len(dims))
    neutral = torch.inf if first.kind == "min" else -torch.inf
    source = node.args[0]
    assert isinstance(source, fx.Node)
    with graph.inserting_before(node):
        masked = graph.call_function(_fill, (source, keep_along(cut, dims, reduced).tolist(), neutral))
    masked.meta["val"] = source.meta["val"]
    node.replace_input_with(source, masked)
    return None


def keep_along(cut: Cut, dims: Sequence[Term], wanted: Sequence[int]) -> Tensor:
    """Which positions of dimensions ``wanted`` stay: a boolean tensor that broadcasts against one of ``dims``."""
    # The choice along these dimensions may vary along its scopes, so the mask has the scopes' dimensions, too.
    own = {leaf for d in wanted for leaf in list_axes(dims[d])} & cut.choices.keys()
    scopes = {s for a in own for s in cut.choices[a].scope}
    shape = [t if d in wanted or scopes & set(list_axes(t)) else ONE for d, t in enumerate(dims)]
    return Cut({a: cut.choices[a] for a in own}, cut.sizes).mask_tensor(shape)


def _fill(x: Tensor, keep: KeepMask, neutral: float) -> Tensor:
    return x.masked_fill(~torch.tensor(keep).to(x.device), neutral)


# ---- statistics over kept channels ----

# The mask is a nested list among the call's arguments, so that it is in the graph, and the printed text shows it.


def _mask_statistic(node: fx.Node, dims: Sequence[Term], cut: Cut) -> None:
    """Make ``node`` the same call with its mean and variance over kept channels."""
    op = name_base_op(node.target)
    if op == "layer_norm":
        reduced = list(range(len(dims) - len(get_argument(node, "normalized_shape")), len(dims)))
        node.target, node.args = mask_layer_norm, (keep_along(cut, dims, reduced).tolist(), *node.args)
    elif op == "group_norm":
        node.target, node.args = mask_group_norm, (cut.mask(dims[1]).tolist(), *node.args)
    elif op == "batch_norm":
        reduced = [d for d in range(len(dims)) if d != 1]
        node.target, node.args = mask_batch_norm, (keep_along(cut, dims, reduced).tolist(), *node.args)
    elif op == "_weight_norm":
        kept = keep_along(cut, dims, [get_argument(node, "dim", 0)])
        node.target, node.args = mask_weight_norm, (kept.tolist(), *node.args)
    else:
        reduced = normalize_all(get_argument(node, "dim"), len(dims))
        correction = read_correction(node)
        keepdim = get_argument(node, "keepdim", False)
        node.target, node.kwargs = _MOMENTS[op], {}
        node.args = (keep_along(cut, dims, reduced).tolist(), node.args[0], reduced, correction, keepdim)


def mask_layer_norm(
    keep: KeepMask,
    x: Tensor,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> Tensor:
    """Layer norm over the last dimensions whose mean and variance run over kept channels; others come out as 0."""
    return _apply_affine(
        _normalize_kept(torch.tensor(keep), x, list(range(x.ndim - len(shape), x.ndim)), eps), weight, bias, shape
    )


def mask_batch_norm(
    keep: KeepMask,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    _running_mean: Tensor | None,
    _running_var: Tensor | None,
    _training: bool,
    _momentum: float,
    eps: float,
    *_: object,
) -> Tensor:
    """Batch norm by the input's own statistics over kept positions of all dimensions but 1; others come out as 0."""
    out = _normalize_kept(torch.tensor(keep), x, [d for d in range(x.ndim) if d != 1], eps)
    return _apply_affine(out, weight, bias, [-1] + [1] * (x.ndim - 2))


def mask_weight_norm(keep: KeepMask, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """A weight whose rows have the norms ``g``; removed rows have no direction and come out as 0."""
    weight: Tensor = torch.ops.aten._weight_norm.default(v, g, dim)
    return weight.masked_fill(~torch.tensor(keep).to(v.device), 0)


def mask_moments(keep: KeepMask, x: Tensor, dim: list[int], correction: float, keepdim: bool) -> tuple[Tensor, Tensor]:
    """Variance and mean of ``x`` over the kept positions of ``dim``."""
    var, mean = _compute_moments(torch.tensor(keep), x, dim, correction)
    return (var, mean) if keepdim else (var.squeeze(dim), mean.squeeze(dim))


def _compute_moments(keep: Tensor, x: Tensor, dim: list[int], correction: float) -> tuple[Tensor, Tensor]:
    # Masked, and not selected: other rows may keep other positions.
    kept = keep.to(x.device).expand(x.shape)
    count = kept.sum(dim, keepdim=True).clamp_min(1)  # a group that lost all its channels must not give NaN
    mean = (x * kept).sum(dim, keepdim=True) / count
    return ((x - mean).square() * kept).sum(dim, keepdim=True) / (count - correction), mean


def _normalize_kept(keep: Tensor, x: Tensor, dim: list[int], eps: float) -> Tensor:
    """``x`` with mean 0 and variance 1 over the kept positions of ``dim``; others come out as 0."""
    var, mean = _compute_moments(keep, x, dim, 0)
    return (x - mean) * torch.rsqrt(var + eps) * keep.to(x.device)


_MOMENTS: dict[str, Callable[..., object]] = {
    "var": lambda *a: mask_moments(*a)[0],
    "std": lambda *a: mask_moments(*a)[0].sqrt(),
    "var_mean": mask_moments,
    "std_mean": lambda *a: (mask_moments(*a)[0].sqrt(), mask_moments(*a)[1]),
}


def mask_group_norm(
    keep: list[bool],
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> Tensor:
    """Group norm over [N, C, …]; its statistics run over each group's kept channels (``keep``: [C])."""
    kept = torch.tensor(keep).reshape(groups, -1, 1)
    grouped = x.reshape(x.shape[0], groups, kept.shape[1], -1)
    out = _normalize_kept(kept, grouped, [2, 3], eps).reshape(x.shape)
    return _apply_affine(out, weight, bias, [-1] + [1] * (x.ndim - 2))


def _apply_affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int]) -> Tensor:
    """``x · weight + bias``, both of this shape, which broadcasts against ``x``."""
    scaled = x if weight is None else x * weight.reshape(shape)
    return scaled if bias is None else scaled + bias.reshape(shape)
