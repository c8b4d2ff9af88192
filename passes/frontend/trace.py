"""trace: an ``nn.Module`` → a Program, through ``torch.export`` on fake tensors."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, TypeGuard

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from mptk.compat.torch import (
    FakeTensorMode,
    drop_tracked_inputs,
    find_size_origin,
    list_guards,
    record_locations,
    stop_operator_cache,
)
from mptk.errors import InputError, MptkError, TraceError, take_first_line
from mptk.ir import (
    STATE_COPY,
    Condition,
    Container,
    Limits,
    Program,
    ProgramModule,
    Weights,
    copy_module,
    find_source_line,
    find_storage,
    find_written_arguments,
    is_open,
    separate,
    take_apart,
)
from passes.frontend.inline import inline_regions

TRACED_BATCH, TRACED_LENGTH = 2, 7
"""Size of the default example. Neither is 1, which torch.export takes for a constant, and they differ."""

SEVERAL = frozenset(["start_logits", "end_logits", "pred_boxes"])
"""Names that transformers gives to the results of heads that have several."""


def pick_results(output: Tensor | Sequence[Tensor] | ModelOutput) -> Tensor | tuple[Tensor, ...]:
    """The results of a transformers model that count: the first (logits or last hidden state), or all of its head."""
    if isinstance(output, Tensor):
        return output
    names = output.keys() if isinstance(output, ModelOutput) else ()
    if SEVERAL.isdisjoint(names):
        first: Tensor = output[0]
        return first
    found = [output[name] for name in names if name in SEVERAL or name == "logits"]
    return tuple(value for value in found if isinstance(value, Tensor))


class Returned:
    """What ``forward`` returned its tensors in.

    A trace runs ``forward``, and torch.export then restores the module's attributes, but not those of this object.
    """

    container: Container | None = None


class Flat(nn.Module):
    """Calls a module with tensors and returns its tensors, flat; the tensor itself if there is only one.

    ``names``: the arguments of ``forward`` that the tensors are; by default the first ones, in order. Of a transformers
    model it returns only what ``pick_results`` says: the cache, as an output of the graph, would count as a use of the
    heads. ``returned``: what the last call returned the tensors in.
    """

    def __init__(self, module: nn.Module, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.module, self.names = module, tuple(names)
        self.keywords = find_cache_switch(module)
        self.returned = Returned()
        first = () if isinstance(module, PreTrainedModel) else list_forward_arguments(module)[: len(names)]
        self.named = bool(names) and self.names != first  # else by position: forward hooks see only these

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        named = dict(zip(self.names, inputs, strict=True)) if self.named else {}
        with write_assignments(self.module):
            output = self.module(*(() if named else inputs), **named, **self.keywords)
        if isinstance(self.module, PreTrainedModel) or isinstance(output, ModelOutput):
            return pick_results(output)
        tensors, container = take_apart(output)
        self.returned.container = container
        return tensors[0] if len(tensors) == 1 else tuple(tensors)


@contextlib.contextmanager
def write_assignments(module: nn.Module) -> Iterator[None]:
    """Run ``module`` inside. If it assigns a tensor to a buffer of the same shape, the buffer is written in place.

    A trace records a write, but takes an assignment for a value of this one call.
    """
    # A transformers model assigns only caches of constants, such as rotary tables.
    before = {} if isinstance(module, PreTrainedModel) else dict(module.named_buffers())
    yield
    for name, buffer in before.items():
        owner, _, leaf = name.rpartition(".")
        held = getattr(module.get_submodule(owner), leaf)
        if held is not buffer and isinstance(held, Tensor) and (held.shape, held.dtype) == (buffer.shape, buffer.dtype):
            buffer.copy_(held)
            setattr(module.get_submodule(owner), leaf, buffer)


def unwrap_module(module: nn.Module) -> Any:
    """The module inside the wrappers of distributed training and of adapters."""
    # Wrappers like DistributedDataParallel have no config; a model with a part named ``module`` may have one.
    while (inner := getattr(module, "module", None)) is not None and not hasattr(module, "config"):
        module = inner
    of_adapter = getattr(module, "get_base_model", None)
    return of_adapter() if callable(of_adapter) else module


def find_cache_switch(module: nn.Module) -> dict[str, bool]:
    """The keyword that keeps a cache out of a transformers module's outputs, if it takes one."""
    module = unwrap_module(module)
    accepted = _read_signature(module).parameters
    # Some models take ``use_cache`` among **kwargs. Then only the config says that they know it.
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    caches = "use_cache" in accepted or (takes_any and hasattr(getattr(module, "config", None), "use_cache"))
    return {"use_cache": False} if caches else {}


def _read_signature(module: nn.Module) -> inspect.Signature:
    """The arguments of ``forward``. Raises MptkError for a TorchScript module, which hides them."""
    if isinstance(module, torch.jit.ScriptModule):
        raise TraceError(
            f"{module.original_name} is a TorchScript module, which torch.export cannot trace; give the nn.Module that "
            "it was made of",
            name=module.original_name,
        )
    if type(module).forward is nn.Module.forward:
        raise TraceError(
            f"{type(module).__name__} has no forward(); give the module that calls it", name=type(module).__name__
        )
    return inspect.signature(module.forward)


ExampleInputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""Tensors for ``forward``: one, several by position, or by the argument's name."""


OpenSizes = bool | tuple[int, ...] | Mapping[str, tuple[int, ...]]
"""Which sizes of the inputs are symbolic: all or none, some dimensions of each, or dimensions by the input's name."""


def trace_to_program(
    module: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    dynamic: OpenSizes = False,
    wrap: Callable[[nn.Module, Sequence[str]], Flat] = Flat,
) -> Program:
    """Trace ``module`` to a Program without running it on real numbers.

    Args:
        module: any module. Weights may be real (the program shares their storage) or on the meta device. For meta
            weights the program's weights are fake tensors, and no memory of the model's size is allocated.
        example_inputs: tensors for ``forward``, by position or by name. None: token ids [2, 7], for a language model.
        dynamic: make every size of the inputs symbolic if the model allows it. The program then runs on other batch
            sizes and sequence lengths; export takes 2-4 times as long. Or the dimensions whose sizes are symbolic.
        wrap: makes the wrapper that is traced, from the module and the names of the inputs.

    Raises:
        MptkError: torch.export refuses the module (data-dependent control flow, a construct it cannot trace).
    """
    # The inputs, by name and in order, and which of their sizes are open.
    if example_inputs is None:
        if not hasattr(module, "config"):
            raise InputError(
                "cannot trace: example inputs are missing; pass the tensors that forward() takes", name="example_inputs"
            )
        example_inputs = (torch.arange(TRACED_BATCH * TRACED_LENGTH).reshape(TRACED_BATCH, TRACED_LENGTH) % 11 + 1,)
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    names = tuple(example_inputs) if isinstance(example_inputs, Mapping) else ()
    given = tuple(example_inputs.values()) if isinstance(example_inputs, Mapping) else tuple(example_inputs)
    sizes: bool | tuple[int, ...] | dict[str, object]
    if isinstance(dynamic, Mapping):
        sizes = {"inputs": tuple(dict.fromkeys(dynamic.get(name, ()), Dim.AUTO) for name in names)}
    else:
        sizes = dynamic
    # Trace a copy: ``forward`` may change the module. The program keeps the user's own as its source.
    try:
        exported = export_program(wrap(copy_module(module), names), given, dynamic=sizes)
    except MptkError:
        if not torch.is_grad_enabled():
            raise
        with torch.no_grad():  # some writes in place run only without gradients
            exported = export_program(wrap(copy_module(module), names), given, dynamic=sizes)
    found = replace(exported, source=wrap(module, names))
    if found.has_values:  # export may have changed the copy's buffers
        found = found.with_state({name: buffer.detach().clone() for name, buffer in module.named_buffers()})
    # The names of the inputs, and how many of them are ``forward``'s first arguments in its own order.
    arguments = names or list_forward_arguments(module)[: len(given)]
    if len(arguments) != len(given):
        return replace(found, inputs=())
    pairs = zip(arguments, list_forward_arguments(module), strict=False)
    positional = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return replace(found, inputs=arguments, positional=positional)


def list_forward_arguments(module: nn.Module) -> tuple[str, ...]:
    """The arguments that ``forward`` takes by position."""
    if isinstance(module, ProgramModule):
        return module.input_names[: module.positional]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return tuple(name for name, p in _read_signature(module).parameters.items() if p.kind in kinds)


def export_program(
    wrapper: nn.Module, inputs: tuple[Tensor, ...], *, dynamic: bool | tuple[int, ...] | dict[str, object] = False
) -> Program:
    """Export ``wrapper(*inputs)``; ``wrapper.module`` is the user's module and gives the weights their names.

    Code under ``torch.no_grad`` stays without gradients if they are on at the call; a transformers model is traced
    without any.

    ``dynamic`` is False, True (every dimension of every input ``Dim.AUTO``, except sizes of 1, which a trace takes
    for constants), some of these dimensions, or the ``dynamic_shapes`` of torch.export.
    """
    # The open dimensions of each input.
    if dynamic is True or isinstance(dynamic, tuple):
        dims = range(max((t.ndim for t in inputs), default=0)) if dynamic is True else dynamic
        dynamic = {"inputs": tuple({d: Dim.AUTO for d in dims if d < t.ndim and t.shape[d] != 1} for t in inputs)}
    try:
        with (
            stop_operator_cache(),
            record_locations(),
            hold_evaluation_mode(wrapper),
            place_fake_weights(wrapper, inputs) as fake_inputs,
            torch.set_grad_enabled(
                torch.is_grad_enabled() and not isinstance(_find_user_module(wrapper), PreTrainedModel)
            ),
        ):
            exported = torch.export.export(wrapper, separate(fake_inputs), dynamic_shapes=dynamic or None, strict=False)
    except MptkError:
        raise
    except Exception as error:
        raise TraceError(
            f"torch.export cannot trace {type(wrapper.module).__name__}: {type(error).__name__}: "
            f"{take_first_line(error)}; "
            "see docs/tracing.md for the usual causes",
            name=type(wrapper.module).__name__,
        ) from error
    drop_tracked_inputs(exported)  # otherwise the fake inputs stay in memory for ever
    return build_program(exported, wrapper)


def _find_user_module(wrapper: nn.Module) -> Any:
    module = wrapper.module
    assert isinstance(module, nn.Module)
    return unwrap_module(module)


@contextlib.contextmanager
def hold_evaluation_mode(wrapper: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; then each module is in its own mode again."""
    training = {module: module.training for module in wrapper.modules()}
    wrapper.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextlib.contextmanager
def place_fake_weights(wrapper: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """If the weights are on meta, give the module fake CPU weights during the export.

    Meta tensors would lose the values of index constants that the forward makes. Fake tensors keep the values and take
    the CPU's code paths.
    """
    tensors = [
        *wrapper.named_parameters(remove_duplicate=False),
        *wrapper.named_buffers(remove_duplicate=False),
    ]
    if not any(t.is_meta for _, t in tensors):
        yield inputs
        return
    originals = dict(tensors)
    # Tied weights must stay one object, by which ``build_program`` knows them.
    fakes: dict[int, Tensor] = {}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for name, tensor in tensors:
            if id(tensor) not in fakes:
                if tensor.is_meta:
                    fake: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
                else:
                    fake = mode.from_tensor(tensor)
                is_parameter = isinstance(tensor, nn.Parameter)
                fakes[id(tensor)] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
            _set_tensor(wrapper, name, fakes[id(tensor)])
    try:
        yield tuple(mode.from_tensor(t) for t in inputs)
    finally:
        for name, tensor in originals.items():
            _set_tensor(wrapper, name, tensor)


def _set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    *path, leaf = name.split(".")
    owner = module.get_submodule(".".join(path))
    setattr(owner, leaf, tensor)


def build_program(exported: ExportedProgram, wrapper: nn.Module) -> Program:
    """The Program of an export of ``wrapper``: graph, weights under the user module's own names, tied names.

    Tied weights are found by object identity (a fake tensor has no address). Calls without users are dropped, so a
    weight that does not reach the output does not count as used. Regions that only set a mode are inlined.
    """
    # Clean the graph. ``torch.vmap`` opens levels with calls that nothing reads, and which must stay.
    _check_constants(exported, wrapper)
    inline_regions(exported)
    graph = exported.graph_module
    graph.graph.eliminate_dead_code(is_impure_node=lambda n: n.is_impure() or _is_vmap_level(n))
    # Of the names of a tied weight, the one with the most uses in the graph owns it. Export may make inputs of the
    # others, too.
    users = {n.name: len(n.users) for n in graph.graph.nodes if n.op == "placeholder"}
    weights = {**exported.state_dict, **exported.constants}
    specs = [spec for spec in exported.graph_signature.input_specs if spec.target is not None]
    named = dict([*wrapper.named_parameters(remove_duplicate=False), *wrapper.named_buffers(remove_duplicate=False)])
    used = {spec.target: users[spec.arg.name] for spec in specs}
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name in sorted(named, key=lambda name: -used.get(name, -1)):
        owner = first.setdefault(id(named[name]), name)
        if owner != name:
            aliases[_strip_wrapper(name)] = _strip_wrapper(owner)
    copy_written_state(graph.graph, {spec.arg.name for spec in specs})
    graph.recompile()
    # Weights and signature under the user's names.
    state = Weights(
        {_strip_wrapper(s.target): weights[s.target] for s in specs if _strip_wrapper(s.target) not in aliases}
    )
    names = tuple(getattr(wrapper, "names", ()))
    frozen = frozenset(_strip_wrapper(name) for name, p in wrapper.named_parameters() if not p.requires_grad)
    signature = exported.graph_signature
    renamed = [s if s.target is None else replace(s, target=_strip_wrapper(s.target)) for s in signature.input_specs]
    container = wrapper.returned.container if isinstance(wrapper, Flat) else None
    return Program(
        graph,
        replace(signature, input_specs=renamed),
        state,
        aliases,
        exported,
        names,
        find_size_limits(graph.graph),
        frozen,
        outputs=container,
    )


def _check_constants(exported: ExportedProgram, wrapper: nn.Module) -> None:
    """Raise MptkError if the trace took a value of its example for a constant: then the constant's size is symbolic."""
    for constant in exported.constants.values():
        if isinstance(constant, Tensor) and any(isinstance(size, torch.SymInt) for size in constant.shape):
            raise TraceError(
                f"torch.export cannot trace {type(wrapper.module).__name__}: a value of forward() is lost, as the "
                "result of torch.autograd.grad is; see docs/tracing.md for the usual causes",
                name=type(wrapper.module).__name__,
            )


def _is_vmap_level(node: fx.Node) -> bool:
    """Whether a call opens or closes a level of ``torch.vmap`` (masks are made under it): it counts without users."""
    return str(getattr(node.target, "__name__", "")).endswith("crement_nesting")


def _strip_wrapper(name: str) -> str:
    """The user's name of a weight: without the tracing wrapper's ``module.``."""
    return name.removeprefix("module.")


# For mypy, a tensor's sizes are ints even after ``isinstance``; a TypeGuard overrides that.
def _is_symbolic(size: object) -> TypeGuard[torch.SymInt]:
    return isinstance(size, torch.SymInt)


def find_size_limits(graph: fx.Graph) -> Limits:
    """The conditions on the sizes of the inputs that Python asked for, and where a size became a number."""
    # The symbolic sizes of all inputs. If one became a number, the line that made it one.
    values = [(node.name, node.meta.get("val")) for node in graph.nodes if node.op == "placeholder"]
    tensors = [(name, value) for name, value in values if isinstance(value, Tensor)]
    places = (((name, d), size) for name, value in tensors for d, size in enumerate(value.shape))
    sizes = {place: size for place, size in places if _is_symbolic(size)}
    lines = {
        place: line for place, s in sizes.items() if not is_open(s) and (line := find_source_line(find_size_origin(s)))
    }
    # The guards of Python code, each once. What a kernel asked does not matter: the graph holds the same call anyway.
    conditions = {
        guard.holds: Condition(guard.holds, find_source_line(guard.stack))
        for guard in list_guards(sizes.values())
        if not guard.kernel and guard.holds not in (sympy.true, sympy.false)
    }
    return Limits(tuple(conditions.values()), lines)


def copy_written_state(graph: fx.Graph, weights: Collection[str]) -> None:
    """Insert a clone of each of the placeholders ``weights`` to which a call of the graph writes, in place.

    So each run starts from the state that the program holds, and changes neither the program nor the user's module.
    ``ProgramModule`` has its own buffers, so it drops the clones and keeps its state.
    """
    targets = {
        find_storage(target)
        for node in graph.nodes
        if node.op == "call_function"
        for target in find_written_arguments(node)
    }
    state = [node for node in graph.nodes if node.op == "placeholder" and node in targets and node.name in weights]
    for node in state:
        # The copy comes first of all calls. For messages, it has the place in the source of the weight's first use.
        first = min(node.users)
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            copy = graph.call_function(torch.ops.aten.clone.default, (node,))
        copy.meta = {**first.meta, "val": node.meta["val"], STATE_COPY: True}
        node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
