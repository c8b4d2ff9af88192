"""What tests ask for again is made once in a process: traces, sizes of cut graphs, readings of classes, ONNX graphs.

Tests prune the same tiny models over and over, and torch.export takes most of such a run. A trace depends on the model's
class, config, shapes and code, and not on the numbers in its weights, so a later one of the same gets a copy of the
graph and the weights of its own module. Whatever could make two traces differ is part of the key (``_key``); a module
of which not everything is known is traced anew. A translation to ONNX depends on the lowered graph alone, and the sizes
in a cut graph on its calls, its weights' shapes and the sizes before (``_graph``). A stock class is read with its config.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import BuiltinFunctionType, ModuleType
from typing import Any

import onnx_ir as ir
import torch
from inside import changed
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from transformers import PreTrainedConfig, PreTrainedModel

import mptk.tasks.onnx_export
import passes.frontend.trace
import passes.frontend.trace_decoder
from mptk.compat.torch import FakeTensor
from mptk.ir.program import Program
from mptk.ir.weights import Weights
from passes.targets.onnx import emit
from passes.targets.stock import learn
from passes.transforms import rewrite

LIBRARIES = ("torch", "transformers", "timm", "passes", "mptk")
PLAIN = (int, float, str, bool, type(None), torch.dtype, torch.device, type)
LEFT_OUT = (
    *("_parameters", "_buffers", "training"),  # told by ``_tensors``; a trace is made in evaluation mode
    *("_forward_hooks", "_forward_pre_hooks"),  # told by ``_plain``
    *("_backward", "_state_dict", "_load_state_dict"),  # hooks: there are none
    *("generation_config", "name_or_path", "_weight_conversions"),  # of no effect on a forward pass
    "returned",  # what the last call returned: a trace tells it anew
)
SAID_OF_A_FILE = ("_name_or_path", "architectures", "transformers_version")
"""Entries of a config that say where it comes from, and have no effect on a forward pass either."""
EXPORT, TRANSLATE = passes.frontend.trace.export_program, emit._export_model
PROPAGATE, READ = rewrite.propagate_shapes, learn.Reading


class Unknown(Exception):
    """A part of a module that may be anything."""


@contextmanager
def remembered() -> Iterator[None]:
    """Within it ``export_program``, ``propagate_shapes``, ``Reading`` and the translation to ONNX work once for the same."""
    programs: dict[Hashable, Program] = {}
    translations: dict[str, ir.Model] = {}
    sizes: dict[Hashable, list[object]] = {}
    readings: dict[Hashable, learn.Reading] = {}

    def export(wrapper: nn.Module, inputs: tuple[Tensor, ...], *, dynamic: Any = False) -> Program:
        try:
            key = _key(wrapper, inputs, dynamic)
        except Unknown:
            return EXPORT(wrapper, inputs, dynamic=dynamic)
        if key not in programs:
            programs[key] = EXPORT(wrapper, inputs, dynamic=dynamic)
        return _copied(programs[key], wrapper)

    def translate(program: ExportedProgram) -> ir.Model:
        if not all(isinstance(t, FakeTensor) for t in (*program.state_dict.values(), *program.constants.values())):
            return TRANSLATE(program)  # its weights go into the result
        key = _text(program)
        if key not in translations:
            translations[key] = TRANSLATE(program)
        return translations[key].clone()

    def propagate(program: Program, *names: Collection[str]) -> None:
        nodes = list(program.graph.graph.nodes)
        if any(node.op == "get_attr" for node in nodes):  # a graph in the graph
            PROPAGATE(program, *names)
            return
        key = (_graph(program), tuple(map(frozenset, names)))
        if key not in sizes:
            PROPAGATE(program, *names)
            sizes[key] = [node.meta.get("val") for node in nodes]
        for node, value in zip(nodes, sizes[key], strict=True):
            node.meta["val"] = value

    def read(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> learn.Reading:
        try:
            key = model_class, model_class.__init__, type(config), _entries(config)
        except Unknown:
            return READ(model_class, config)
        if key not in readings:
            readings[key] = READ(model_class, config)
        return readings[key]

    with changed() as inside:
        for module in (passes.frontend.trace, passes.frontend.trace_decoder, mptk.tasks.onnx_export):
            inside.bound(f"{module.__name__}.export_program", export)
        inside.bound("passes.targets.onnx.emit._export_model", translate)
        inside.bound("passes.transforms.rewrite.propagate_shapes", propagate)
        inside.bound("passes.targets.stock.learn.Reading", read)
        yield


def _copied(program: Program, wrapper: nn.Module) -> Program:
    """The program with a graph of its own and the weights of ``wrapper``; constants of the trace are its own already."""
    named = dict([*wrapper.named_parameters(remove_duplicate=False), *wrapper.named_buffers(remove_duplicate=False)])
    own = {name.removeprefix("module."): tensor for name, tensor in named.items()}
    fake = any(tensor.is_meta for tensor in named.values())
    constants = {name: like for name, like in program.state.items() if "lifted_tensor" in name}
    state = program.state if fake else Weights({name: (own | constants)[name] for name in program.state})
    return replace(program, graph=program.copy_graph(), state=state)


# ---- what a trace depends on ----


def _key(wrapper: nn.Module, inputs: tuple[Tensor, ...], dynamic: object) -> Hashable:
    """Everything that a trace of ``wrapper(*inputs)`` may depend on.

    Raises:
        Unknown: of a part of it that cannot be said.
    """
    modules = tuple(
        (name, type(module), type(module).forward, _plain(module)) for name, module in wrapper.named_modules()
    )
    given = tuple((tuple(t.shape), t.stride(), t.dtype, str(t.device), tuple(t.flatten().tolist())) for t in inputs)
    return modules, _tensors(wrapper), given, str(dynamic), torch.get_default_dtype()


def _plain(module: nn.Module) -> Hashable:
    """The attributes of a module itself."""
    if not type(module).__module__.startswith(LIBRARIES) or module._forward_pre_hooks:
        raise Unknown
    values = tuple((name, _value(value)) for name, value in vars(module).items() if not name.startswith(LEFT_OUT))
    return values, tuple(map(_hook, module._forward_hooks.values()))


def _hook(hook: Any) -> Hashable:
    """One that transformers installs to return hidden states: what it looks for. There is none of another kind."""
    if hook.__module__ != "transformers.utils.output_capturing":
        raise Unknown
    known = [cell.cell_contents for cell in hook.__closure__]
    return hook.__qualname__, tuple(_value(value) for value in known if not callable(value))


def _value(value: object) -> Hashable:
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, BuiltinFunctionType) and isinstance(value.__self__, (ModuleType, type(None))):
        return value
    if isinstance(value, partial):
        return partial, _value(value.func), _value(value.args), _value(value.keywords)
    if isinstance(value, PreTrainedConfig):
        return (
            type(value),
            _entries(value),
            value._attn_implementation,
            getattr(value, "_experts_implementation", None),
        )
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value), tuple(map(_value, value))
    if isinstance(value, dict):
        return tuple((str(key), _value(each)) for key, each in value.items())
    if isinstance(value, nn.Module):
        return type(value)
    raise Unknown


def _entries(config: PreTrainedConfig) -> str:
    try:
        entries = config.to_dict()
    except AttributeError as error:  # an entry is tried with a value of another type
        raise Unknown from error
    return json.dumps({n: e for n, e in entries.items() if n not in SAID_OF_A_FILE}, sort_keys=True, default=str)


def _tensors(wrapper: nn.Module) -> Hashable:
    """Names, shapes and types of the weights, and which of them are one."""
    named = [*wrapper.named_parameters(remove_duplicate=False), *wrapper.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    return tuple(
        (
            name,
            first.setdefault(id(t), name),
            type(t),
            tuple(t.shape),
            t.stride(),
            t.dtype,
            str(t.device),
            t.requires_grad,
        )
        for name, t in named
    )


def _text(program: ExportedProgram) -> str:
    """The graph with the shapes of all values, and what its placeholders are."""
    graphs = [module for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)]
    nodes = [
        f"{node.format_node()} {node.args} {node.kwargs} {node.meta.get('val')}"
        for graph in graphs
        for node in graph.graph.nodes
    ]
    said = (program.graph_signature, program.range_constraints, program.example_inputs, type(program))
    return "\n".join([*nodes, *map(str, said)])


def _graph(program: Program) -> Hashable:
    """The cut graph with its weights' shapes and the sizes that it had; a symbol is one of the trace's (its mode)."""
    nodes = program.graph.graph.nodes
    modes = {value.fake_mode for node in nodes if hasattr(value := node.meta.get("val"), "fake_mode")}
    weights = tuple((name, tuple(like.shape)) for name, like in program.state.likes.items())
    return (
        frozenset(modes),
        weights,
        tuple((n.op, n.name, n.target, str(n.args), str(n.kwargs), _size(n.meta.get("val"))) for n in nodes),
    )


def _size(value: object) -> Hashable:
    if isinstance(value, Tensor):
        return str(value.shape), str(value.stride()), value.dtype
    return tuple(map(_size, value)) if isinstance(value, (list, tuple)) else str(value)
