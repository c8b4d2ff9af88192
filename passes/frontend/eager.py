"""eager: compare a traced program with its module, run as Python, on sizes that the trace leaves open.

Cases: the example; a second call, as a module may keep state; other sizes of all inputs; a size of 1, which
torch.export takes for more than 1 wherever ``forward`` asks; other strides; gradients on, and inputs that require them.
What differs only at 1, for other strides or with gradients is refused at the call. A size of 1 that the module itself
refuses says nothing, as another input may have to be of that size, too: it is tried in all inputs at once, and only
refused if it never runs. At last the gradients of one sample are compared. Each case has a copy of the module, so that
the user's stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import sympy
import torch
from torch import Tensor

from mptk.compat.torch import FakeTensor, tree_leaves
from mptk.errors import MptkError, take_first_line
from mptk.ir.copies import copy_module, describe_attributes, describe_outside_state
from mptk.ir.ops import resolve_shape
from mptk.ir.program import Program, ProgramModule
from passes.frontend.gradients import compare_gradients

TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 2e-2, torch.float64: 1e-10, torch.complex128: 1e-10}
"""Largest difference relative to the largest number of an output; 5e-5 for other types."""


@torch.no_grad()
def compare_to_module(
    program: Program, weights: Mapping[str, Tensor] | None = None, inputs: Sequence[Tensor] | None = None
) -> Program:
    """``program`` with what running its module tells of it: which calls are refused, and whether it trains otherwise.

    ``weights``: of the module where it has none in memory. ``inputs``: an example; by default the trace's.

    Raises:
        GradientMode: the program was traced while gradients were on, and the module computes otherwise without them.
        MptkError: the module keeps state that the program does not, or the program computes something else.
    """
    assert program.source is not None
    if inputs is None:
        inputs = [t for t in tree_leaves(program.exported.example_inputs) if isinstance(t, Tensor)]
    pair = Pair(program, {**(weights or {}), **program.state.select_names({n: n for n in program.parameters})})
    pair.check_outside(inputs)
    if pair.apart(inputs) and not pair.apart(inputs, on=True):
        raise GradientMode(
            f"{type(program.source.module).__name__} computes otherwise while gradients are on; trace it under "
            "torch.no_grad()"
        )
    pair.check_state(inputs)
    several, ran, failed = set[str](), set[str](), set[str]()
    for values in list_other_sizes(program):
        shapes = program.sizes.shapes(values)
        if shapes is None:
            continue
        given = [resize_tensor(x, s) for x, s in zip(inputs, shapes, strict=True)]
        ones = {str(symbol) for symbol, value in values.items() if value == 1}
        apart = pair.apart(given)
        if ones and apart and not pair.can_run_module(given):
            given = [x if x.is_floating_point() else torch.zeros_like(x) for x in given]  # 0 is in a table of one row
            apart = pair.apart(given)
            if apart and not pair.can_run_module(given):
                failed |= ones
                continue
        ran |= ones
        if not apart or (not ones and apart == BOTH_FAIL):
            continue
        if not ones:
            raise MptkError(f"the traced program is not the module: {apart}; {WITH_TENSORS}")
        if several.isdisjoint(ones):
            several |= ones
    found = replace(program, limits=replace(program.limits, several=frozenset(several | (failed - ran))))
    return replace(found, limits=replace(found.limits, **find_call_limits(pair, inputs)))


def find_call_limits(pair: Pair, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """The fields of ``Limits`` on strides, gradients and training."""
    strided = [transpose_memory(x) for x in inputs]
    found: dict[str, Any] = {"contiguous": pair.apart(strided) not in ("", BOTH_FAIL)}
    if pair.apart(inputs, on=True):
        return {**found, "gradients": "off"}
    leaves = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    if pair.apart(leaves, on=True):
        return {**found, "gradients": "inputs"}
    return {**found, "trains": compare_gradients(pair, inputs)}


def transpose_memory(tensor: Tensor) -> Tensor:
    """The same numbers with the last two dimensions in the other order in memory."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.ndim > 1 else tensor


class GradientMode(MptkError):
    """A trace that was made while gradients were on does not hold without them."""


BOTH_FAIL = "module and program fail"
WITH_TENSORS = "write what depends on sizes or state with tensors (docs/tracing.md)"


def list_other_sizes(program: Program) -> Iterator[dict[sympy.Symbol, int]]:
    """Other sizes than the example's: each of them 1, each dimension of all inputs, all of them; and all larger."""
    sizes = program.sizes
    traced = find_example_sizes(program)
    symbols = [s for s in sizes.symbols() if s in traced]
    dimensions = zip_longest(*(own for _, own in sizes.inputs))
    together = [{size for size in each if size in traced} for each in dimensions]
    tried: list[set[sympy.Symbol]] = []
    for ones in (*({symbol} for symbol in symbols), *together, set(symbols)):
        if ones and ones not in tried:
            tried.append(ones)
            yield {**traced, **dict.fromkeys(ones, 1)}
    for more in range(1, 9):
        larger = {symbol: traced[symbol] + more for symbol in symbols}
        if symbols and sizes.shapes(larger) is not None:
            yield larger
            return


def find_example_sizes(program: Program) -> dict[sympy.Symbol, int]:
    """The values of the symbolic sizes in the example."""
    values = {node.name: node.meta["val"] for node in program.list_placeholders()}
    return program.sizes.values([resolve_shape(values[name]) for name, _ in program.sizes.inputs])


def resize_tensor(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of another shape with its numbers, again and again."""
    for d, size in enumerate(shape):
        tensor = tensor.index_select(d, torch.arange(size) % tensor.shape[d])
    return tensor


class Pair:
    """A program and its module. ``weights``: the module's, by name."""

    def __init__(self, program: Program, weights: Mapping[str, Tensor]) -> None:
        self.program, self.weights = program, weights
        self.names = program.aliases

    def module(self) -> Any:
        """A copy of the module, in evaluation mode, with the program's weights."""
        assert self.program.source is not None
        return copy_module(self.program.source, self._pick_weight).eval()

    def _pick_weight(self, name: str, tensor: Tensor) -> Tensor:
        public = name.removeprefix("module.")
        held = self.weights.get(self.names.get(public, public))
        return tensor if held is None else held.detach().to(tensor.dtype)

    def apart(self, inputs: Sequence[Tensor], *, on: bool = False) -> str:
        """How the program differs from the module on these inputs; as ``compare_on_inputs``. ``on``: with gradients."""
        with torch.set_grad_enabled(on):
            return compare_on_inputs(self.program, self.module(), inputs)

    def check_outside(self, inputs: Sequence[Tensor]) -> None:
        """Raise MptkError if a call of the module changes what its code keeps outside of it."""
        module = self.module()
        before = describe_outside_state(module.module)
        with contextlib.suppress(Exception):  # whether it runs is told later
            run_flat(module, inputs)
        after = describe_outside_state(module.module)
        if changed := sorted(name for name in after if after[name] != before.get(name)):
            raise MptkError(
                f"forward changes {', '.join(changed)} at each call, which a trace holds as one value; keep such state "
                "in a buffer, with tensors"
            )

    def can_run_module(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the module itself takes these inputs."""
        try:
            run_flat(self.module(), inputs)
        except Exception:  # noqa: BLE001 (a module may raise anything)
            return False
        return True

    def check_state(self, inputs: Sequence[Tensor]) -> None:
        """Call the module and the program twice.

        Raises:
            MptkError: they differ; the message names the buffers and attributes that the module changes.
        """
        module, program = self.module(), self.kept()
        states = [describe_attributes(module.module)]
        for call in ("first", "second"):
            apart = compare_on_inputs(program, module, inputs)
            states.append(describe_attributes(module.module))
            if apart and apart != BOTH_FAIL:
                changed = ", ".join(sorted(n for n in states[-1] if states[-1][n] != states[0].get(n)))
                said = f"forward changes {changed}, which a trace holds as one value" if changed else apart
                raise MptkError(f"the traced program is not the module at the {call} call: {said}; {WITH_TENSORS}")
        counted = sorted(n for n in states[2] if states[2][n] != states[1].get(n))
        if counted:
            raise MptkError(
                f"forward changes {', '.join(counted)} at each call, which a trace holds as one value; keep such state "
                "in a buffer, with tensors"
            )

    def kept(self) -> Callable[..., object]:
        """The program as it keeps its state: itself if it has none."""
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
    if any(isinstance(t, FakeTensor) for t in found):
        raise MptkError("a value of forward() is lost in the trace")
    return found


def describe_mismatch(found: list[Tensor], expected: list[Tensor], inputs: Sequence[Tensor]) -> str:
    """Where outputs differ by more than rounding; empty if they do not."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return f"at {describe_shapes(inputs)} it gives {describe_shapes(found)} and not {describe_shapes(expected)}"
    if (types := [t.dtype for t in found]) != (wanted := [t.dtype for t in expected]):
        return f"it gives {types} and not {wanted}"
    for one, other in zip(found, expected, strict=True):
        worst = compute_relative_error(one.detach(), other.detach())
        if not worst <= TOLERANCES.get(other.dtype, 5e-5):
            return f"at {describe_shapes(inputs)} outputs differ by {worst:.1e} of the largest"
    return ""


def compute_relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest finite number. Others must be at the same places."""
    wide = torch.complex128 if expected.is_complex() else torch.float64
    one, other = found.to(wide), expected.to(wide)
    finite = torch.isfinite(other)
    if not torch.equal(torch.isfinite(one), finite) or str(one[~finite].tolist()) != str(other[~finite].tolist()):
        return float("inf")
    if not finite.any():
        return 0.0
    scale, apart = other[finite].abs().max().item(), (one - other)[finite].abs().max().item()
    return apart / scale if scale else apart


def describe_shapes(tensors: Sequence[Tensor]) -> str:
    """Shapes for a message."""
    return ", ".join(str(list(t.shape)) for t in tensors)
