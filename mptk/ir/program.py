"""program: a traced model. An FX graph over ATen ops, its weights by qualified name, and both as an ``nn.Module``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx.node import Argument, Target
from torch.nn import Parameter

from mptk.compat.torch import build_exported, express_size, tree_leaves, tree_map
from mptk.errors import DataError, InputError, ModelError, MptkError, TraceError, take_first_line
from mptk.ir.containers import Container
from mptk.ir.limits import CallSizes, Limits, SymbolicSize
from mptk.ir.ops import TYPE_CHECK, is_open, resolve_size
from mptk.ir.samples import is_tokens
from mptk.ir.weights import Lazy, Weights

TracedInputs = tuple[tuple[object, ...], dict[str, object]]
"""The inputs of the trace, by position and by name."""


@dataclass(frozen=True)
class Types:
    """``wide``: the floating type in which a program computes. ``own``: weight → its type in the traced module."""

    wide: torch.dtype
    own: Mapping[str, torch.dtype]


@dataclass(frozen=True)
class Program:
    """A model as data. Passes take and return it.

    Attributes:
        graph: the pre-dispatch ATen graph of ``torch.export`` (linear, scaled_dot_product_attention and layer_norm
            stay whole). Its placeholders are the lifted weights and then the user's inputs.
        signature: which placeholder is which weight or input.
        state: qualified name → tensor of each parameter, buffer and constant (fake tensors if traced without
            weights). With it the program runs without its module. A tensor may be read or computed at each request.
        aliases: other name of a tied weight → the name in ``state``.
        exported: the export from which the program was made.
        inputs: the arguments of the module's ``forward`` that the user's inputs are, if known.
        positional: how many of them ``forward`` takes by position in this order; None: all.
        limits: what the trace fixed.
        frozen: names of the parameters that require no gradient in the traced module.
        types: the floating types of the traced module, if the program computes in another.
        source: what was traced, to compare with (``passes/frontend/eager.py``); None if it is not known.
        outputs: what the module returned its tensors in; None if only tensors are known.
    """

    graph: fx.GraphModule
    signature: ExportGraphSignature
    state: Weights
    aliases: Mapping[str, str]
    exported: ExportedProgram = field(repr=False)
    inputs: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    frozen: frozenset[str] = frozenset()
    types: Types | None = None
    source: nn.Module | None = field(default=None, repr=False, compare=False)
    outputs: Container | None = field(default=None, compare=False)
    positional: int | None = None

    @cached_property
    def weights(self) -> dict[str, str]:
        """Placeholder name → name in ``state``, for every parameter, buffer and constant in the graph."""
        targets = ((spec.arg.name, spec.target) for spec in self.signature.input_specs if spec.target is not None)
        return {placeholder: self.aliases.get(target, target) for placeholder, target in targets}

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters in the graph's order; a tied parameter appears once."""
        specs = self.signature.input_specs
        targets = [s.target for s in specs if s.kind is InputKind.PARAMETER and s.target is not None]
        return [target for target in targets if target in self.state]

    @property
    def user_inputs(self) -> list[str]:
        """Placeholder names of the inputs that a caller passes, in order."""
        return [s.arg.name for s in self.signature.input_specs if s.kind is InputKind.USER_INPUT]

    @cached_property
    def length(self) -> int | None:
        """Tokens that each input of token ids must have; None if the graph holds for any number of them."""
        given = set(self.user_inputs)
        # The first input of token ids whose length is not open.
        values = [node.meta["val"] for node in self.list_placeholders() if node.name in given]
        sizes = [value.shape[1] for value in values if isinstance(value, Tensor) and is_tokens(value)]
        return next((resolve_size(size) for size in sizes if not is_open(size)), None)

    @cached_property
    def sizes(self) -> CallSizes:
        """The sizes that its inputs may have."""
        values = {node.name: node.meta["val"] for node in self.list_placeholders()}
        tensors = [(name, values[name]) for name in self.user_inputs if isinstance(values[name], Tensor)]
        found = tuple((name, list_symbolic_sizes(value)) for name, value in tensors)
        names = self.inputs if len(self.inputs) == len(found) else tuple(name for name, _ in found)
        return CallSizes(found, names, self.limits)

    @property
    def input_types(self) -> tuple[torch.dtype, ...]:
        """The types of the inputs in the trace."""
        values = {node.name: node.meta["val"] for node in self.list_placeholders()}
        return tuple(values[name].dtype for name in self.user_inputs if isinstance(values[name], Tensor))

    @property
    def keeps_state(self) -> bool:
        """Whether a call of its module changes what the next one gives."""
        return any(STATE_COPY in node.meta for node in self.graph.graph.nodes)

    @property
    def has_values(self) -> bool:
        """Whether the weights are real: neither fake tensors nor on the meta device."""
        return self.state.real

    def list_placeholders(self) -> Iterator[fx.Node]:
        """The graph's inputs in order: weights, then the user's."""
        return (n for n in self.graph.graph.nodes if n.op == "placeholder")

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the graph on ``inputs`` (the user's inputs in order), with all weights in memory at once.

        Returns one tensor, or a tuple if the traced module returned several. A language model's tensor is its logits,
        [batch, sequence, vocab].
        """
        outputs = self.graph(*self.list_arguments(*inputs))
        return outputs[0] if isinstance(outputs, (tuple, list)) and len(outputs) == 1 else outputs

    def list_arguments(self, *inputs: Tensor) -> list[Tensor]:
        """The graph's full argument list: weights by placeholder, then ``inputs``."""
        weights, user = self.weights, iter(inputs)
        return [self.state[weights[n.name]] if n.name in weights else next(user) for n in self.list_placeholders()]

    def with_state(self, state: Mapping[str, Tensor | Lazy]) -> Program:
        """The same graph with other tensors of the same shapes; a name missing in ``state`` keeps its tensor."""
        # Names that the graph does not have (an unused head's) are dropped, so that a whole checkpoint may be given.
        given = Weights(state)
        return replace(
            self, state=self.state.with_entries(given.select_names({n: n for n in given if n in self.state}))
        )

    def copy_graph(self) -> fx.GraphModule:
        """A copy of the graph that a pass may edit (node names, metadata and placeholders kept)."""
        return copy.deepcopy(self.graph)

    def with_graph(self, graph: fx.GraphModule) -> Program:
        """The same weights with a changed graph of as many outputs, whose names the signature gets."""
        specs = []
        for spec, value in zip(
            self.signature.output_specs, tree_leaves(graph.graph.output_node().args[0]), strict=True
        ):
            named = isinstance(value, fx.Node) and isinstance(spec.arg, TensorArgument)
            specs.append(replace(spec, arg=TensorArgument(name=value.name)) if named else spec)
        return replace(self, graph=graph, signature=replace(self.signature, output_specs=specs))

    def state_dict(self) -> Weights:
        """Parameters and persistent buffers by name, tied names included, as in a checkpoint of the module."""
        return self._select_weights(lambda spec: spec.kind is InputKind.PARAMETER or bool(spec.persistent))

    def collect_module_state(self) -> Weights:
        """``state_dict`` and the other buffers: what every trace of the module has.

        Constants are left out: another trace has other ones under the same names.
        """
        return self._select_weights(lambda spec: spec.kind in (InputKind.PARAMETER, InputKind.BUFFER))

    def _select_weights(self, wanted: Callable[[InputSpec], bool]) -> Weights:
        """The wanted weights, tied names included."""
        # A tied name that is not an input of the graph has no spec, so it is added with its owner.
        found = {
            spec.target: self.aliases.get(spec.target, spec.target)
            for spec in self.signature.input_specs
            if spec.target is not None and wanted(spec)
        }
        return self.state.select_names(found | {alias: name for alias, name in self.aliases.items() if name in found})

    def module(self) -> ProgramModule:
        """An ``nn.Module`` with these weights under the traced module's names, ready for training.

        Weights are copied, never shared with the traced module.

        Raises:
            MptkError: the program was traced without weights.
        """
        if not self.has_values:
            raise TraceError("this program was traced without weights; trace the model with its weights")
        return ProgramModule(self)

    def to_exported(self) -> ExportedProgram:
        """This graph and these weights as an ``ExportedProgram``, for ``torch.onnx.export``, ``torch.export.save``."""
        # torch's verifier wants Parameters for parameters, persistent buffers beside them, and all others as constants.
        parameters = {s.target for s in self.signature.input_specs if s.kind is InputKind.PARAMETER}
        state = {
            name: Parameter(t, requires_grad=False) if name in parameters and not isinstance(t, Parameter) else t
            for name, t in self.state_dict().items()
        }
        constants = {
            s.target: self.state[s.target]
            for s in self.signature.input_specs
            if s.target is not None and s.target not in state
        }
        return build_exported(
            self.exported,
            self.graph,
            self.signature,
            state=state,
            constants=constants,
            example_inputs=self._cut_example_inputs(),
        )

    def _cut_example_inputs(self) -> TracedInputs | None:
        """The inputs of the trace that are left. An input that has lost channels (a KV cache) is cut."""
        values = {n.name: n.meta["val"] for n in self.list_placeholders()}
        names = iter(self.exported.graph_signature.user_inputs)

        def fit(example: object) -> object:
            name = next(names)
            if not isinstance(example, Tensor) or name not in values:
                return example
            return example[tuple(slice(size if isinstance(size, int) else None) for size in values[name].shape)]

        # A removed block's cache is no longer an input. The nesting of the rest would not fit, so they go flat.
        fitted: TracedInputs | None = tree_map(fit, self.exported.example_inputs)
        traced = self.exported.graph_signature.user_inputs
        if fitted is None or len(self.user_inputs) == len(traced):
            return fitted
        left = zip(traced, tree_leaves(fitted), strict=True)
        return tuple(example for name, example in left if name in values), {}


def list_symbolic_sizes(value: Tensor) -> tuple[SymbolicSize, ...]:
    """The sizes of a traced input: an expression if the size may be another, else a number."""
    return tuple(
        express_size(size) if isinstance(size, torch.SymInt) and is_open(size) else resolve_size(size)
        for size in value.shape
    )


def compute_typical_size(program: Program) -> float:
    """The median of the root mean squares of a program's weight matrices; 1 if it has none."""
    likes = {
        name: like for name in program.parameters if (like := program.state.find_like(name)).ndim > 1 and like.numel()
    }
    return median([float(program.state[name].detach().float().square().mean().sqrt()) for name in likes] or [1.0])


def count_parameters(program: Program) -> int:
    """Number of parameters in the program; a tied weight counts once."""
    return sum(program.state.find_like(name).numel() for name in program.parameters)


class DeviceInterpreter(fx.Interpreter):
    """An interpreter whose calls make their tensors on ``device``, whatever device the graph names."""

    device: torch.device = torch.device("cpu")

    def call_function(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, object]) -> object:
        if self.device.type != "cpu":  # where the graph was traced
            args, kwargs = tree_map(lambda a: self.device if isinstance(a, torch.device) else a, (args, kwargs))
        return super().call_function(target, args, kwargs)

    def get_attr(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, object]) -> object:
        found = super().get_attr(target, args, kwargs)
        return found.to(self.device) if isinstance(found, Tensor) else found


STATE_COPY = "state"
"""In the ``meta`` of a call that copies a buffer before the graph writes to it."""


class Names(nn.Module):
    """Holds what is below a part of dotted names; ``module.layers[0]`` is ``layers.0``."""

    def __getitem__(self, index: int | str) -> Any:
        return getattr(self, str(index))


class ProgramModule(nn.Module):
    """Parameters and buffers under the traced module's names, and its traced ``forward``.

    Its parameters are its own: they share no memory with the program. They require gradients if the traced module's do.
    Tied weights are one parameter. ``state_dict()`` has the traced module's names. Buffers that ``forward`` writes keep
    what it wrote.

    ``forward`` takes the tensors of the trace, by position or by the argument's name, and gives what the traced module
    gave: a tensor, or several in the same dicts, tuples and classes. The graph was traced in evaluation mode:
    ``train()`` adds no dropout, and batch norms keep their statistics.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        # The graph is in a tuple: as a submodule it would add its own names to state_dict().
        self._graph = (remove_type_checks(remove_state_copies(program.graph)),)
        self._placeholders = [(n.name, program.weights.get(n.name)) for n in program.list_placeholders()]
        self.input_names, self.positional = program.inputs, program.positional
        self._sizes, self._met = program.sizes, set[tuple[torch.Size, ...]]()
        self._outputs, self._input_types = program.outputs, program.input_types
        # Register each weight under its own name and under the names that are tied to it.
        kinds = {program.weights[s.arg.name]: s for s in program.signature.input_specs if s.target is not None}
        self._types = {name: tensor.dtype for name, tensor in program.state.likes.items()}
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
            MptkError: they have sizes, types or strides for which the trace does not hold, or it does not hold while
                gradients are on.
        """
        return self.run(self._order_inputs(inputs, named))

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """Run the graph on inputs in the order of the trace. Raises MptkError as ``forward``."""
        # Sizes that were checked once are not checked again. In an export they always are: the new trace must get the
        # conditions of this one, and its symbolic shapes must not stay in ``_met``.
        self._check_call(tensors)
        shapes = tuple(tensor.shape for tensor in tensors)
        if torch.compiler.is_exporting() or shapes not in self._met:
            self._sizes.check(shapes)
            self._met |= set() if torch.compiler.is_exporting() else {shapes}
        # The weights are looked up at each call, since ``to()`` and users may replace them.
        given = iter(tensors)
        weights: dict[str, Tensor] = dict(self.named_parameters(remove_duplicate=False))
        weights |= dict(self.named_buffers(remove_duplicate=False))
        arguments = [next(given) if name is None else weights[name] for _, name in self._placeholders]
        device = next((tensor.device for tensor in weights.values()), None)
        graph: fx.GraphModule = self._graph[0]
        # Compiled code is the fast way. On other devices each call that names the CPU must be redirected.
        try:
            if device is None or device.type == "cpu":
                outputs = graph(*arguments)
            else:
                runner = DeviceInterpreter(graph)
                runner.device = device
                outputs = runner.run(*arguments)
        except RuntimeError as error:
            raise self._explain_conversion(error) or error from None
        if self._outputs is not None:
            return self._outputs.build([each for each in outputs if isinstance(each, Tensor)])
        return outputs[0] if isinstance(outputs, (tuple, list)) and len(outputs) == 1 else tuple(outputs)

    def _check_call(self, tensors: Sequence[Tensor]) -> None:
        """Raise MptkError for types, strides or a gradient mode for which the trace does not hold."""
        limits = self._sizes.limits
        # In an autocast and after a conversion, the module takes the floating types that it now computes in.
        for name, tensor, traced in zip(self._sizes.names, tensors, self._input_types, strict=False):
            if tensor.dtype != traced and not (traced.is_floating_point and self._takes(tensor.dtype)):
                raise DataError(
                    f"{name} must be {traced}, as it was traced, and it is {tensor.dtype}; convert it", name=name
                )
            if limits.contiguous and not tensor.is_contiguous():
                raise DataError(
                    f"{name} must be contiguous, as it was traced: the module asks for strides; call .contiguous()",
                    name=name,
                )
        if not limits.gradients or not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return
        if limits.gradients == "off" or any(tensor.requires_grad for tensor in tensors):
            what = "gradients are on" if limits.gradients == "off" else "an input requires gradients"
            raise InputError(
                f"the module computes otherwise while {what}, and was traced without; call it under torch.no_grad()"
            )

    def _takes(self, dtype: torch.dtype) -> bool:
        """Whether inputs may have another floating type than in the trace: the module's own now, or in an autocast."""
        if not dtype.is_floating_point:
            return False
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled():
            return True
        return self._converted is not None and dtype in {p.dtype for p in self.parameters()}

    @property
    def _converted(self) -> str | None:
        """The name of a parameter that has another type than in the trace; None if all have theirs."""
        now = self.named_parameters(remove_duplicate=False)
        return next((name for name, p in now if p.dtype != self._types.get(name, p.dtype)), None)

    @property
    def fewest(self) -> int:
        """The fewest samples that it takes: 2 if the trace does not hold for a single one."""
        firsts = {str(sizes[0]) for _, sizes in self._sizes.inputs if sizes}
        return 1 if firsts.isdisjoint(self._sizes.limits.several) else 2

    @property
    def tables(self) -> list[nn.Parameter]:
        """The weights of embeddings."""
        held, graph = dict(self._placeholders), self._graph[0].graph
        read = [n.args[0] for n in graph.nodes if n.target is torch.ops.aten.embedding.default]
        names = [held.get(n.name) for n in read if isinstance(n, fx.Node)]
        return [self.get_parameter(name) for name in names if name is not None]

    def _explain_conversion(self, error: RuntimeError) -> MptkError | None:
        """The error for a call after ``double()`` or the like; None if the weights have their types."""
        if (name := self._converted) is None:
            return None
        old, new = self._types[name], self.get_parameter(name).dtype
        return ModelError(
            f"this module was converted from {old} to {new}, and its graph names types of the trace "
            f"({take_first_line(error)}); convert it back, or convert the module before it is pruned",
        )

    def _order_inputs(self, inputs: Sequence[Tensor], named: dict[str, Tensor]) -> list[Tensor]:
        count = sum(name is None for _, name in self._placeholders)
        if self.positional is not None and self.positional < len(inputs) <= len(self.input_names):
            said = ", ".join(self.input_names[self.positional :])
            raise TypeError(f"forward() takes {said} by name: in the traced module another argument stands there")
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


def remove_type_checks(graph: fx.GraphModule) -> fx.GraphModule:
    """The same calls without checks of types, which an autocast changes, in a graph that can be pickled.

    torch.export's graph holds a tracer that no process can make again.
    """
    # Copied into a new graph, which has a plain tracer.
    made = fx.Graph()
    made.output(made.graph_copy(graph.graph, {}))
    for check in made.find_nodes(op="call_function", target=TYPE_CHECK):
        made.erase_node(check)
    return fx.GraphModule(graph, made)


def remove_state_copies(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph without copies of the buffers that it writes to; the graph itself without such copies."""
    if not any(STATE_COPY in node.meta for node in graph.graph.nodes):
        return graph
    found = copy.deepcopy(graph)
    for node in [node for node in found.graph.nodes if STATE_COPY in node.meta]:
        node.replace_all_uses_with(node.args[0])
        found.graph.erase_node(node)
    found.recompile()
    return found
