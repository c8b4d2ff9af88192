"""eager: compare a traced program with its module, run as Python.

Cases, each on a copy of the module, so that the user's stays as it is:

1. the example, and a second call of it, since a module may keep state;
2. other sizes of all inputs;
3. sizes of 1, which torch.export takes for more than 1 wherever ``forward`` asks. If the module itself refuses one,
   this says nothing: another input may have to be 1, too. So 1 is also tried in several, and refused if it never runs;
4. other strides; gradients on; inputs that require gradients;
5. the gradients of one sample.

What differs only in 3 to 5 is refused at the call, or noted. Apart from that, ``check_steady`` runs a program twice: if
it does not give the same each time, no cut can be compared with it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from mptk.compat.torch import FakeTensor, find_custom_function, find_schema, list_gradient_hooks, tree_leaves
from mptk.errors import TraceError, take_first_line
from mptk.ir import (
    Program,
    ProgramModule,
    SourceLocation,
    copy_module,
    describe_attributes,
    describe_outside_state,
    find_source_line,
    find_storage,
    find_written_arguments,
    get_argument,
    resolve_shape,
)

TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 2e-2, torch.float64: 1e-10, torch.complex128: 1e-10}
"""Largest difference relative to the largest number of an output; 5e-5 for other types: the proof's tolerance."""


@torch.no_grad()
def compare_to_module(
    program: Program, weights: Mapping[str, Tensor] | None = None, inputs: Sequence[Tensor] | None = None
) -> Program:
    """``program`` with limits that only a run of its module shows: which calls to refuse, and whether it trains alike.

    ``weights``: the module's, if it has none in memory. ``inputs``: an example; by default the trace's.

    Raises:
        GradientMode: the program was traced while gradients were on, and the module computes otherwise without them.
        MptkError: the module keeps state that the program does not, or the program computes something else.
    """
    assert program.source is not None
    if inputs is None:
        inputs = [t for t in tree_leaves(program.exported.example_inputs) if isinstance(t, Tensor)]
    pair = Pair(program, {**(weights or {}), **program.state.select_names({n: n for n in program.parameters})})
    # State outside of the module first: if a call changes it, no later comparison means anything.
    pair.check_outside(inputs)
    if pair.describe_difference(inputs) and not pair.describe_difference(inputs, on=True):
        raise GradientMode(
            f"{type(program.source.module).__name__} computes otherwise while gradients are on; trace it under "
            "torch.no_grad()",
            name=type(program.source.module).__name__,
        )
    pair.check_state(inputs)
    # Other sizes. ``several``: symbols that must not be 1. ``ran``, ``failed``: whether the module ran with them at 1.
    several, ran, failed = set[str](), set[str](), set[str]()
    for values in list_other_sizes(program):
        shapes = program.sizes.find_shapes(values)
        if shapes is None:
            continue
        given = [resize_tensor(x, s) for x, s in zip(inputs, shapes, strict=True)]
        ones = {str(symbol) for symbol, value in values.items() if value == 1}
        apart = pair.describe_difference(given)
        if ones and apart and not pair.can_run_module(given):
            # Ids may be too large for a table that now has one row: try zeros.
            given = [x if x.is_floating_point() else torch.zeros_like(x) for x in given]
            apart = pair.describe_difference(given)
            if apart and not pair.can_run_module(given):
                failed |= ones
                continue
        ran |= ones
        if not apart or (not ones and apart == BOTH_FAIL):
            continue
        if not ones:
            raise TraceError(
                f"the traced program is not the module: {apart}; {WITH_TENSORS}",
                name=type(program.source.module).__name__,
            )
        # A case with a symbol that is known to fail at 1 tells nothing new of the others.
        if several.isdisjoint(ones):
            several |= ones
    found = replace(program, limits=replace(program.limits, several=frozenset(several | (failed - ran))))
    return replace(found, limits=replace(found.limits, **find_call_limits(pair, inputs)))


def find_call_limits(pair: Pair, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """The fields of ``Limits`` on strides, gradients and training."""
    # The same numbers with the last two dimensions in the other order in memory.
    strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x for x in inputs]
    found: dict[str, Any] = {"contiguous": pair.describe_difference(strided) not in ("", BOTH_FAIL)}
    if pair.describe_difference(inputs, on=True):
        return {**found, "gradients": "off"}
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    if pair.describe_difference(leaves, on=True):
        return {**found, "gradients": "inputs"}
    return {**found, "trains": compare_gradients(pair, inputs)}


class GradientMode(TraceError):
    """A trace that was made while gradients were on does not hold without them."""


BOTH_FAIL = "module and program fail"
WITH_TENSORS = "write what depends on sizes or state with tensors (docs/tracing.md)"


def list_other_sizes(program: Program) -> Iterator[dict[sympy.Symbol, int]]:
    """Other sizes than the example's: each of them 1, each dimension of all inputs, all of them; and all larger."""
    sizes = program.sizes
    traced = find_example_sizes(program)
    symbols = [s for s in sizes.list_symbols() if s in traced]
    # ``zip_longest`` pads with None, which is not a symbol.
    dimensions = zip_longest(*(own for _, own in sizes.inputs))
    together = [{size for size in each if size in traced} for each in dimensions]
    tried: list[set[sympy.Symbol]] = []
    for ones in (*({symbol} for symbol in symbols), *together, set(symbols)):
        if ones and ones not in tried:
            tried.append(ones)
            yield {**traced, **dict.fromkeys(ones, 1)}
    # The first larger sizes that meet the trace's conditions, which may want a multiple of up to 8.
    for more in range(1, 9):
        larger = {symbol: traced[symbol] + more for symbol in symbols}
        if symbols and sizes.find_shapes(larger) is not None:
            yield larger
            return


def find_example_sizes(program: Program) -> dict[sympy.Symbol, int]:
    """The values of the symbolic sizes in the example."""
    values = {node.name: node.meta["val"] for node in program.list_placeholders()}
    return program.sizes.find_values([resolve_shape(values[name]) for name, _ in program.sizes.inputs])


def resize_tensor(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of another shape that repeats its numbers, so that ids stay in the range of their table."""
    for d, size in enumerate(shape):
        tensor = tensor.index_select(d, torch.arange(size) % tensor.shape[d])
    return tensor


class Pair:
    """A program and its module. ``weights``: the module's, by name."""

    def __init__(self, program: Program, weights: Mapping[str, Tensor]) -> None:
        self.program, self.weights = program, weights
        self.names = program.aliases

    def make_module(self) -> Any:
        """A copy of the module, in evaluation mode, with the program's weights."""
        assert self.program.source is not None
        return copy_module(self.program.source, self._pick_weight).eval()

    def _pick_weight(self, name: str, tensor: Tensor) -> Tensor:
        public = name.removeprefix("module.")  # the tracing wrapper's prefix
        held = self.weights.get(self.names.get(public, public))
        return tensor if held is None else held.detach().to(tensor.dtype)

    def describe_difference(self, inputs: Sequence[Tensor], *, on: bool = False) -> str:
        """``compare_on_inputs`` with a fresh copy of the module. ``on``: while gradients are on."""
        with torch.set_grad_enabled(on):
            return compare_on_inputs(self.program, self.make_module(), inputs)

    def check_outside(self, inputs: Sequence[Tensor]) -> None:
        """Raise MptkError if a call of the module changes what its code keeps outside of it."""
        module = self.make_module()
        before = describe_outside_state(module.module)
        with contextlib.suppress(Exception):  # ``check_state`` and later cases tell whether it runs
            run_flat(module, inputs)
        after = describe_outside_state(module.module)
        if changed := sorted(name for name in after if after[name] != before.get(name)):
            raise TraceError(
                f"forward changes {', '.join(changed)} at each call, which a trace holds as one value; keep such state "
                "in a buffer, with tensors",
                name=changed[0],
            )

    def can_run_module(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the module itself takes these inputs."""
        try:
            run_flat(self.make_module(), inputs)
        except Exception:  # noqa: BLE001 (a module may raise anything)
            return False
        return True

    def check_state(self, inputs: Sequence[Tensor]) -> None:
        """Raise MptkError if two calls in a row differ; the message names what the module changes."""
        module, program = self.make_module(), self.make_stateful()
        states = [describe_attributes(module.module)]
        for call in ("first", "second"):
            apart = compare_on_inputs(program, module, inputs)
            states.append(describe_attributes(module.module))
            if apart and apart != BOTH_FAIL:
                changed = sorted(n for n in states[-1] if states[-1][n] != states[0].get(n))
                said = f"forward changes {', '.join(changed)}, which a trace holds as one value" if changed else apart
                raise TraceError(
                    f"the traced program is not the module at the {call} call: {said}; {WITH_TENSORS}",
                    name=next(iter(changed), ""),
                )
        # A first call may fill a cache. What a second one still changes is state, although outputs are equal so far.
        counted = sorted(n for n in states[2] if states[2][n] != states[1].get(n))
        if counted:
            raise TraceError(
                f"forward changes {', '.join(counted)} at each call, which a trace holds as one value; keep such state "
                "in a buffer, with tensors",
                name=counted[0],
            )

    def make_stateful(self) -> Callable[..., object]:
        """The program as it keeps its state: itself if it has none."""
        # A Program starts each call from the same state; its module keeps what it wrote.
        if not self.program.keeps_state:
            return self.program
        module = ProgramModule(self.program)
        return lambda *inputs: module.run(inputs)


def compare_on_inputs(program: Callable[..., object], module: Callable[..., object], inputs: Sequence[Tensor]) -> str:
    """How a program differs from a module on these inputs, ``BOTH_FAIL`` if neither runs; empty if they are equal."""
    try:
        expected = run_flat(module, inputs)
    except Exception as error:  # noqa: BLE001 (a module may raise anything)
        expected, why = None, take_first_line(error)
    try:
        found = run_flat(program, inputs)
    except Exception as error:  # noqa: BLE001
        return BOTH_FAIL if expected is None else f"it fails at {describe_shapes(inputs)} ({take_first_line(error)})"
    if expected is None:
        return f"the module fails at {describe_shapes(inputs)} ({why}), and the program does not"
    return describe_mismatch(found, expected, inputs)


def run_flat(module: Callable[..., object], inputs: Sequence[Tensor]) -> list[Tensor]:
    """All tensors of a result. The same random numbers are drawn each time, and the inputs stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        copies = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad) for x in inputs]
        found = [t for t in tree_leaves(module(*copies)) if isinstance(t, Tensor)]
    if any(isinstance(t, FakeTensor) for t in found):  # a constant of the trace that has no numbers
        raise TraceError("a value of forward() is lost in the trace")
    return found


def describe_mismatch(found: list[Tensor], expected: list[Tensor], inputs: Sequence[Tensor]) -> str:
    """Where outputs differ by more than rounding; empty if they do not."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return f"at {describe_shapes(inputs)} it gives {describe_shapes(found)} and not {describe_shapes(expected)}"
    if (types := [t.dtype for t in found]) != (wanted := [t.dtype for t in expected]):
        return f"it gives {types} and not {wanted}"
    for one, other in zip(found, expected, strict=True):
        worst = compute_relative_error(one.detach(), other.detach())
        if not worst <= TOLERANCES.get(other.dtype, 5e-5):  # so written, NaN fails
            return f"at {describe_shapes(inputs)} outputs differ by {worst:.1e} of the largest"
    return ""


def compute_relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest finite number. Others must be at the same places."""
    wide = torch.complex128 if expected.is_complex() else torch.float64
    one, other = found.to(wide), expected.to(wide)
    finite = torch.isfinite(other)
    # Infinities and NaN are compared as text, in which NaN equals NaN.
    if not torch.equal(torch.isfinite(one), finite) or str(one[~finite].tolist()) != str(other[~finite].tolist()):
        return float("inf")
    if not finite.any():
        return 0.0
    scale, apart = other[finite].abs().max().item(), (one - other)[finite].abs().max().item()
    return apart / scale if scale else apart


def describe_shapes(tensors: Sequence[Tensor]) -> str:
    """Shapes for a message."""
    return ", ".join(str(list(t.shape)) for t in tensors)


# ---- gradients ----

# A graph has no backward of its own: a custom ``autograd.Function`` and a hook on a gradient are lost in a trace.

GRADIENTS_APART = 1e-3
"""Largest difference of a gradient, relative to the largest of its tensor: sums in another order differ by less."""


def compare_gradients(pair: Pair, inputs: Sequence[Tensor]) -> str:
    """Why the program trains otherwise than its module; empty if it does not.

    Compares the gradients of a random projection of all outputs, with respect to weights and floating inputs.
    """
    # A hook counts even if it changes nothing on this sample.
    source = pair.program.source
    names = [] if source is None else [name.removeprefix("module.") for name in list_gradient_hooks(source)]
    hooks = [f"{name or 'the module'} has a hook on its gradient" for name in names]
    wrapper = pair.make_module()
    try:
        with WatchedGradients() as watched:
            expected = compute_seeded_gradients(wrapper, wrapper.module, inputs)
    except Exception as error:  # noqa: BLE001 (a module may raise anything)
        return f"the module itself cannot be trained ({take_first_line(error)})"
    module = ProgramModule(pair.program)
    # The program lacks weights that the graph does not use, so only common names are compared.
    found = compute_seeded_gradients(lambda *copies: module.run(copies), module, inputs)
    apart = sorted(name for name in expected.keys() & found.keys() if _is_different(found[name], expected[name]))
    if not apart and not hooks:
        return ""
    causes = [*watched.causes, *hooks] or ["part of its forward works on gradients"]
    where = f"the gradient of {apart[0]} differs" if apart else "gradients differ"
    return f"{where}: {'; '.join(dict.fromkeys(causes))}, which a graph does not hold"


def compute_seeded_gradients(
    run: Callable[..., Any], module: nn.Module, inputs: Sequence[Tensor]
) -> dict[str, Tensor | None]:
    """The gradients by each weight and each floating input, by name; None if there is none."""
    copies = [x.clone().requires_grad_() if x.is_floating_point() else x.clone() for x in inputs]
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = [t for t in tree_leaves(run(*copies)) if isinstance(t, Tensor) and t.requires_grad]
        # A generator of its own, so that the projection is the same however many numbers ``run`` draws.
        generator = torch.Generator().manual_seed(0)
        losses = [(t * torch.randn(t.shape, generator=generator).to(t)).real.sum() for t in outputs]
        if losses:
            torch.stack([loss.double() for loss in losses]).sum().backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    return found | {f"input {i}": x.grad for i, x in enumerate(copies) if x.requires_grad}


def _is_different(found: Tensor | None, expected: Tensor | None) -> bool:
    """Whether gradients differ by more than rounding. None is a gradient of zeros."""
    if found is None or expected is None:
        there = found if expected is None else expected
        return there is not None and bool(there.any())
    largest = expected.abs().max().item() if expected.numel() else 0.0
    return not (found - expected).abs().max().item() <= GRADIENTS_APART * largest if expected.numel() else False


class WatchedGradients(TorchFunctionMode):
    """Notes, while a module runs, what its gradients depend on besides its calls (``causes``, in words)."""

    def __init__(self) -> None:
        super().__init__()
        self.causes = list[str]()

    def __torch_function__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        if func in (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad):
            self.causes.append(f"a hook on the gradient of a tensor{_place()}")
        found = func(*args, **(kwargs or {}))
        for tensor in (t for t in tree_leaves((args, found)) if isinstance(t, Tensor)):
            if (function := find_custom_function(tensor)) is not None:
                self.causes.append(f"{function.__name__}{_locate_class(function)} has a backward of its own")
        return found


def _locate_class(function: type) -> str:
    """The file and line of a class, in brackets; empty if it has none."""
    try:
        file, line = inspect.getsourcefile(function), inspect.getsourcelines(function)[1]
    except (OSError, TypeError):
        return ""
    return f" ({Path(file).name}:{line})" if file else ""


def _place() -> str:
    """The line of the module's code that is running, in brackets."""
    frames = inspect.stack()
    lines = "\n".join(f'  File "{f.filename}", line {f.lineno}, in {f.function}' for f in reversed(frames))
    found = find_source_line(lines)
    return f" ({found})" if found else ""


# ---- whether a program gives the same each time ----

STEADY = 5e-5
"""Smallest difference of two runs that counts, relative to the largest number: the tolerance of a proof."""
_OFF = ("p", "dropout_p", "train", "training")
"""Arguments that switch a call's random numbers off if they are 0 or False."""


def check_steady(program: Program, run: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor], name: str) -> None:
    """Raise MptkError if two runs of the program on the same tensors differ.

    ``run``: inputs → outputs. ``name``: the model's.
    """
    # The graph tells which calls could make them differ. Without such a call nothing is run.
    nodes = [node for node in program.graph.graph.nodes if node.op == "call_function"]
    user = {n for n in program.list_placeholders() if n.name in program.user_inputs}
    changing = [node for node in nodes if any(find_storage(target) in user for target in find_written_arguments(node))]
    drawing = [node for node in nodes if is_random_call(node)]
    if not changing and not drawing:
        return
    # Both runs get the same tensors. No seed is set between them, so random numbers differ.
    given = [tensor.clone() for tensor in inputs]
    with torch.random.fork_rng(devices=[]):
        first, second = ([t.clone() for t in tree_leaves(run(given)) if isinstance(t, Tensor)] for _ in range(2))
    apart = max((compute_relative_error(a, b) for a, b in zip(first, second, strict=True)), default=0.0)
    if apart <= STEADY:
        return
    # A call may write to an input and yet leave its numbers as they were. Only a change of them is a cause.
    if changing and not all(torch.equal(a, b) for a, b in zip(given, inputs, strict=True)):
        raise TraceError(
            f"forward of {name} changes its input in place ({SourceLocation(changing[0])}), so a second run on the "
            "same tensor gives something else; change a copy, as of x = x.clone()",
            name=name,
        )
    if drawing:
        raise TraceError(
            f"forward of {name} draws random numbers ({SourceLocation(drawing[0])}): two runs on the same inputs "
            f"differ by {apart:.1e} of the largest, so no cut can be compared with it; draw none in evaluation mode, "
            "as by dropout(x, training=self.training), or make them an input",
            name=name,
        )


def is_random_call(node: fx.Node) -> bool:
    """Whether a call draws random numbers."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    # A dropout in evaluation mode has the tag, too, and draws nothing.
    signature = find_schema(node.target)
    given = {} if signature is None else {a.name: a.default_value for a in signature.arguments if a.name in _OFF}
    return all(get_argument(node, name, default) for name, default in given.items())
