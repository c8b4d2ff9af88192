"""module: a Program as an ``nn.Module`` that can be trained, saved and moved like the one that was traced."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from mptk.ir.placed import Placed

if TYPE_CHECKING:
    from mptk.ir.program import Program


STATE = "state"
"""In the ``meta`` of a call that copies a buffer before the graph writes to it."""


class Names(nn.Module):
    """Holds what lies under a part of dotted names; ``module.layers[0]`` is ``layers.0``."""

    def __getitem__(self, index: int | str) -> Any:
        return getattr(self, str(index))


class ProgramModule(nn.Module):
    """Parameters and buffers under the traced module's names, and its traced ``forward``.

    Its parameters are its own: they share no memory with the program, and require gradients as the traced module's do.
    Tied weights are one parameter. ``state_dict()`` has the names of the traced module's. Buffers that ``forward``
    writes keep what it wrote.

    ``forward`` takes the tensors of the trace, by position or by the argument's name, and gives one tensor, or a tuple
    if there were several. The graph was traced in evaluation mode: ``train()`` adds no dropout, and batch norms keep
    their statistics.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._graph = (_stateful(program.graph),)  # in a tuple, as a submodule would add its names to state_dict()
        self._placeholders = [(n.name, program.weights.get(n.name)) for n in program.placeholders()]
        self.input_names = program.inputs
        self._sizes, self._met = program.sizes, set[tuple[torch.Size, ...]]()
        kinds = {program.weights[s.arg.name]: s for s in program.signature.input_specs if s.target is not None}
        others: dict[str, list[str]] = {}
        for alias, name in program.aliases.items():
            others.setdefault(name, []).append(alias)
        for name in program.state:
            spec, tensor = kinds[name], program.state[name].detach().clone()
            made: Tensor = tensor
            if spec.kind is InputKind.PARAMETER:
                made = nn.Parameter(tensor, requires_grad=name not in program.frozen)
            for each in (name, *others.get(name, ())):
                self._place(each, made, persistent=spec.kind is InputKind.BUFFER and bool(spec.persistent))

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Run the graph.

        Raises:
            TypeError: inputs are missing or unknown.
            MptkError: they have sizes for which the trace does not hold.
        """
        tensors = self._in_order(inputs, named)
        shapes = tuple(tensor.shape for tensor in tensors)
        if torch.compiler.is_exporting() or shapes not in self._met:
            self._sizes.check(shapes)
            self._met |= set() if torch.compiler.is_exporting() else {shapes}
        given = iter(tensors)
        weights: dict[str, Tensor] = dict(self.named_parameters(remove_duplicate=False))
        weights |= dict(self.named_buffers(remove_duplicate=False))
        arguments = [next(given) if name is None else weights[name] for _, name in self._placeholders]
        device = next((tensor.device for tensor in weights.values()), None)
        graph: fx.GraphModule = self._graph[0]
        if device is None or device.type == "cpu":
            outputs = graph(*arguments)
        else:
            runner = Placed(graph)
            runner.device = device
            outputs = runner.run(*arguments)
        return outputs[0] if isinstance(outputs, (tuple, list)) and len(outputs) == 1 else tuple(outputs)

    def _in_order(self, inputs: Sequence[Tensor], named: dict[str, Tensor]) -> list[Tensor]:
        count = sum(name is None for _, name in self._placeholders)
        names = self.input_names[len(inputs) : count]
        if len(inputs) + len(named) != count or set(names) != set(named):
            said = ", ".join(self.input_names) or f"{count} tensors"
            raise TypeError(f"forward() takes {said}; it was given {len(inputs)} by position and {sorted(named)}")
        return [*inputs, *(named[name] for name in names)]

    def _place(self, name: str, tensor: Tensor, *, persistent: bool) -> None:
        """Register a parameter or a buffer under a dotted name."""
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, Names())
            owner = owner.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor, persistent=persistent)


def _stateful(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph without copies of the buffers that it writes to; itself if there are none."""
    if not any(STATE in node.meta for node in graph.graph.nodes):
        return graph
    found = copy.deepcopy(graph)
    for node in [node for node in found.graph.nodes if STATE in node.meta]:
        node.replace_all_uses_with(node.args[0])
        found.graph.erase_node(node)
    found.recompile()
    return found
