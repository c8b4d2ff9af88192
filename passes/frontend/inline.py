"""inline: move regions that only set a mode into the graph around them.

torch.export keeps ``with torch.autocast(…)`` and ``with torch.enable_grad()`` as a call of a separate graph.
``inline_regions`` moves the calls of these graphs into the exported program's graph, each with its module and source
line. The program computes the same numbers. The modes:

1. gradients off: no number depends on them, but training does. A value that leaves such a region is detached, so that
   no gradient goes back into it. Gradients on: the calls as they are;
2. autocast off, or on for a device on which the region has no tensor: the calls compute the same without it;
3. autocast on: it casts the inputs and outputs of calls without a trace in the graph. Refused;
4. a region within another: the innermost one decides.

Control flow (``cond``, ``while_loop``) stays: no axis rule takes it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from mptk.errors import TraceError
from mptk.ir import SourceLocation

AUTOCAST = torch.ops.higher_order.wrap_with_autocast
GRADIENTS = torch.ops.higher_order.wrap_with_set_grad_enabled
OFF = "gradients off"
"""In the ``meta`` of a call: whether it is made while gradients are off; not there if no region says so."""
REGION_ARGUMENT: dict[object, int] = {AUTOCAST: 4, GRADIENTS: 1}
"""The position of the region's graph in each call's arguments. Later arguments are the graph's inputs."""


def inline_regions(exported: ExportedProgram) -> None:
    """Move the calls of all regions that set a mode into the graph of ``exported``, in place.

    Raises:
        MptkError: autocast is on for the device of a region's tensors.
    """
    # Values that leave a region get other names, so the signature's outputs must follow both steps.
    renamed = _inline(exported.graph_module, casts=frozenset())
    for old, new in renamed.items():
        exported.graph_signature.replace_all_uses(old, new)
    for old, new in _detach(exported.graph_module.graph).items():
        exported.graph_signature.replace_all_uses(old, new)
    exported.graph_module.recompile()


def _inline(module: fx.GraphModule, casts: frozenset[str]) -> dict[str, str]:
    """Inline the regions of ``module``. ``casts``: the devices for which autocast is on around it."""
    renamed: dict[str, str] = {}
    for node in list(module.graph.nodes):
        if node.target in REGION_ARGUMENT:
            renamed |= _inline_call(module, node, casts)
        elif casts & _list_devices(node):
            raise TraceError(
                f"autocast is on around {SourceLocation(node)}, and its casts are not in a traced graph; cast "
                "explicitly there, or trace the model with autocast off",
                name=SourceLocation(node),
            )
    return renamed


def _detach(graph: fx.Graph) -> dict[str, str]:
    """Detach the values that leave regions without gradients. Returns the names of the graph's outputs: old → new."""
    renamed = {}
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if not node.meta.get(OFF, False) or not (isinstance(value, Tensor) and value.is_floating_point()):
            continue
        # A user within the region needs no detach: it is made while gradients are off, too.
        later = [user for user in node.users if not user.meta.get(OFF, False)]
        if not later:
            continue
        with graph.inserting_after(node):
            free = graph.call_function(torch.ops.aten.detach.default, (node,))
        free.meta = dict(node.meta)
        for user in later:
            user.replace_input_with(node, free)
            if user.op == "output":
                renamed[node.name] = free.name
    for node in graph.nodes:
        node.meta.pop(OFF, None)
    return renamed


def _inline_call(module: fx.GraphModule, node: fx.Node, casts: frozenset[str]) -> dict[str, str]:
    """Replace ``node`` by the calls of its region. Returns the names of its results: old → new."""
    position = REGION_ARGUMENT[node.target]
    source = node.args[position]
    assert isinstance(source, fx.Node)
    place = str(source.target)
    region = module.get_submodule(place)
    assert isinstance(region, fx.GraphModule)
    if node.target is AUTOCAST:
        device, _, enabled = cast("tuple[str, object, bool]", node.args[:3])
        casts = casts | {device} if enabled else casts - {device}
    # Regions within this one first: the mode that they set on their calls stays (case 4).
    _inline(region, casts)
    if node.target is GRADIENTS and node.args[0] is False:
        for call in region.graph.nodes:
            if call.op == "call_function":
                call.meta.setdefault(OFF, True)
    elif node.target is GRADIENTS:
        for call in region.graph.nodes:
            call.meta.setdefault(OFF, False)
    # What the region holds (graphs of control flow) moves to the outer module, under a name that is free there.
    for nested in region.graph.find_nodes(op="get_attr"):
        name = f"{place}_{nested.target}"
        module.add_module(name, region.get_submodule(nested.target))
        nested.target = name
    # Copy the calls, then let the users of each result read it directly and not through ``getitem``.
    placeholders = region.graph.find_nodes(op="placeholder")
    values = dict(zip(placeholders, node.args[position + 1 :], strict=True))
    with module.graph.inserting_before(node):
        results = cast("Sequence[fx.Node]", module.graph.graph_copy(region.graph, values))
    renamed = {}
    for user in list(node.users):
        index = user.args[1]
        assert isinstance(index, int)
        result = results[index]
        user.replace_all_uses_with(result)
        renamed[user.name] = result.name
        module.graph.erase_node(user)
    module.graph.erase_node(node)
    module.graph.erase_node(source)
    module.delete_submodule(place)
    return renamed


def _list_devices(node: fx.Node) -> set[str]:
    """The devices of a call's results; none for the choice of one of several results."""
    if node.op != "call_function" or node.target is operator.getitem:
        return set()
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return {v.device.type for v in values if isinstance(v, Tensor)}
