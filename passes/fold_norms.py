"""fold_norms: after a cut of the residual width, RMS norms become ordinary ones over fewer channels.

The rewritten graph keeps a norm equal to the masked one by scaling: mean over n' channels · n'/n
(``rules/reduce.py``).
With c = n'/n, 1/√(c·m + eps) = 1/√c · 1/√(m + eps/c). So the scale goes into the weight and eps is divided by c:
weight' = weight/√c, or for a norm that multiplies by (1 + weight): 1 + weight' = (1 + weight)/√c.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from mptk.program import Program

MUL, ADD = torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor


def fold_norms(program: Program) -> tuple[Program, dict[float, float]]:
    """Fold the scales of cut norms into their weights and epsilons.

    Returns the program and, for the stock config, each epsilon that changed (old → new). A norm whose scale has no
    weight to go into keeps it.
    """
    graph = program.copy_graph()
    state = dict(program.state)
    epsilons: dict[float, float] = {}
    for node in list(graph.graph.nodes):
        scale = _scale_of(node)
        if scale is None:
            continue
        if node.args[0].target is torch.ops.aten.mean.dim:
            _fold_mean(program, node, scale, state, epsilons)
        elif node.args[0].target is torch.ops.aten.rms_norm.default:
            _fold_rms(program, node, scale, state, epsilons)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return replace(program, graph=graph, state=state), epsilons


def _scale_of(node: fx.Node) -> float | None:
    """The factor of a ``mul(x, number)`` that the rewriting inserted (it has no metadata of the trace)."""
    inserted = node.target is MUL and "nn_module_stack" not in node.meta and "stack_trace" not in node.meta
    scale = node.args[1] if inserted else None
    return scale if isinstance(scale, float) and isinstance(node.args[0], fx.Node) else None


def _fold_mean(
    program: Program, node: fx.Node, c: float, state: dict[str, Tensor], epsilons: dict[float, float]
) -> None:
    add = _only_user(node)
    if add is None or add.target is not ADD or not isinstance(add.args[1], float):
        return
    root = _only_user(add)
    found = None if root is None else _weight_after(program, root)
    if found is None:
        return
    name, offset = found
    state[name] = (state[name] + offset) / math.sqrt(c) - offset
    epsilons[add.args[1]] = add.args[1] / c
    add.args = (node.args[0], add.args[1] / c)


def _fold_rms(
    program: Program, node: fx.Node, scale: float, state: dict[str, Tensor], epsilons: dict[float, float]
) -> None:
    norm: Any = node.args[0]
    weight = norm.args[2] if len(norm.args) > 2 else None
    if not isinstance(weight, fx.Node) or weight.name not in program.weights or len(weight.users) != 1:
        return
    state[program.weights[weight.name]] = state[program.weights[weight.name]] * scale
    new = norm.args[3]
    epsilons[new / scale**2] = new
    node.replace_all_uses_with(norm)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = [u for u in node.users if "_assert_tensor_metadata" not in str(u.target)]
    return users[0] if len(users) == 1 else None


def _weight_after(program: Program, node: fx.Node) -> tuple[str, float] | None:
    """The weight that the norm's result is multiplied by further on, and what is added to it first (0 or 1)."""
    for _ in range(6):
        user = _only_user(node)
        if user is None:
            return None
        if user.target is MUL:
            for other in user.all_input_nodes:
                found = _weight(program, other) if other is not node else None
                if found is not None:
                    return found
        node = user
    return None


def _weight(program: Program, node: fx.Node) -> tuple[str, float] | None:
    offset = 0.0
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        if node.target is ADD and isinstance(node.args[1], (int, float)):
            offset += float(node.args[1])
        elif "aten.to" not in str(node.target):
            return None
        node = node.all_input_nodes[0]
    if node.op != "placeholder" or node.name not in program.weights or _only_user(node) is None:
        return None
    return program.weights[node.name], offset
