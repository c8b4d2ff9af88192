"""state: a program starts each time from the state that it holds: what it writes to is a copy.

A buffer that ``forward`` writes in place is cloned at the start of the graph, so that to run a program changes neither
it nor the user's module. ``ProgramModule`` has buffers of its own, leaves the copies out and keeps its state.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from mptk.ir.module import STATE
from mptk.ir.ops import storage, written


def own_state(graph: fx.Graph, weights: Collection[str]) -> None:
    """Clone each of the placeholders ``weights`` that a call of the graph writes to, in place."""
    targets = {storage(target) for node in graph.nodes if node.op == "call_function" for target in written(node)}
    state = [node for node in graph.nodes if node.op == "placeholder" and node in targets and node.name in weights]
    for node in state:
        first = min(node.users)
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            copy = graph.call_function(torch.ops.aten.clone.default, (node,))
        copy.meta = {**first.meta, "val": node.meta["val"], STATE: True}
        node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
