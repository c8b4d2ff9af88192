"""mask: the dense Program with a plan's removed channels masked. What the cut program must equal.

Removed positions of every weight become zero. At a reduction that zeros would disturb, masked channels do not take
part: layer-norm statistics run over the kept ones, a softmax or a top-k sees −inf (``passes/rules/reduce.py``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import layer_norm

from mptk.cut import Cut
from mptk.families import Analysis
from mptk.program import Program
from passes.rules.table import argument, op_name


def mask(analysis: Analysis, cut: Cut) -> Program:
    """The program with its removed channels masked: same shapes as the dense one."""
    program = analysis.program
    state = dict(program.state)
    for name, dims in analysis.weights.items():
        if any(cut.touches(d) for d in dims):
            keep = cut.mask_tensor(dims).to(state[name].device)
            state[name] = state[name] * keep if state[name].is_floating_point() else state[name]
    graph = program.copy_graph()
    nodes = {n.name: n for n in graph.graph.nodes}
    for r in analysis.walk.reductions:
        if r.kind in ("max", "statistic") and cut.touches(r.axis):
            _mask_reduction(graph.graph, nodes[r.node.name], r.kind, cut.mask(r.axis).tolist())
    graph.recompile()
    return replace(program, graph=graph, state=state)


def _mask_reduction(graph: fx.Graph, node: fx.Node, kind: str, keep: list[bool]) -> None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if kind == "statistic":
        node.target, node.args = masked_statistic(op_name(node)), (keep, *node.args)
        return
    dim = argument(node, 2 if op_name(node).startswith("aten.topk") else 1, "dim", -1)
    assert isinstance(dim, int)
    with graph.inserting_before(node):
        masked = graph.call_function(_fill, (source, dim, keep))
    node.replace_input_with(source, masked)


def _fill(x: Tensor, dim: int, keep: list[bool]) -> Tensor:
    shape = [1] * x.ndim
    shape[dim] = -1
    return x.masked_fill(~torch.tensor(keep).reshape(shape), -torch.inf)


def masked_statistic(name: str) -> Any:
    """The op of that name with its statistics over kept channels: ``f(keep, *the op's arguments)``."""
    op = name.split(".")[1]
    return {
        "layer_norm": masked_layer_norm,
        "var": _masked_var,
        "std": _masked_std,
        "group_norm": masked_group_norm,
    }[op]


def masked_layer_norm(
    keep: list[bool],
    x: Tensor,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """Layer norm over the last dimension whose mean and variance run over kept channels; others come out as 0."""
    normed = layer_norm(x[..., keep], [sum(keep)], eps=eps)
    out = torch.zeros_like(x)
    out[..., keep] = normed
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _masked_var(keep: list[bool], x: Tensor, dim: list[int], *_: Any, **kwargs: Any) -> Tensor:
    return torch.var(x.index_select(dim[0], torch.tensor(keep).nonzero()[:, 0]), dim, **kwargs)


def _masked_std(keep: list[bool], x: Tensor, dim: list[int], *_: Any, **kwargs: Any) -> Tensor:
    return torch.std(x.index_select(dim[0], torch.tensor(keep).nonzero()[:, 0]), dim, **kwargs)


def masked_group_norm(
    keep: list[bool],
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """Group norm over [N, C, …] whose statistics run over each group's kept channels (``keep``: [C / groups])."""
    grouped = x.reshape(x.shape[0], groups, len(keep), -1)
    kept = grouped[:, :, keep].flatten(2)
    mean, var = kept.mean(-1), kept.var(-1, unbiased=False)
    out = (grouped - mean[..., None, None]) * torch.rsqrt(var + eps)[..., None, None]
    out = (out * torch.tensor(keep)[:, None]).reshape(x.shape)
    shape = [1, -1] + [1] * (x.ndim - 2)
    out = out if weight is None else out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape)
