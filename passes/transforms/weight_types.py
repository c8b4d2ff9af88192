"""weight_types: passes that change the type, or the precision, of a program's weights.

- ``Retype`` computes in one floating type, and ``restore_types`` goes back;
- ``Store`` rounds to the checkpoint's type: the program computes as before, with numbers that the checkpoint can hold;
- ``RoundWeights`` adds a rounding error, to measure how far rounding alone moves the outputs.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from mptk.compat.torch import tree_leaves
from mptk.errors import InputError
from mptk.ir import TYPE_CHECK, Pass, PassResult, Program, Types, list_state_shapes

OWN_TYPES = "own types"
"""In the ``meta`` of a call: the floating types among its arguments before ``Retype``, in order."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Retype(Pass):
    """Use one floating type throughout the program. Float inputs must have that type, too."""

    dtype: torch.dtype
    name: ClassVar[str] = "retype"

    def run(self, program: Program) -> PassResult:
        graph = program.copy_graph()
        # Checks of types would fail. ``setdefault``: if a program is retyped twice, the first types are its own.
        for node in list(graph.graph.nodes):
            if node.target is TYPE_CHECK:
                graph.graph.erase_node(node)
            else:
                given = (node.args, node.kwargs)
                node.meta.setdefault(OWN_TYPES, [a for a in tree_leaves(given) if _is_type(a)])
                node.args, node.kwargs = fx.node.map_aggregate(given, lambda a: self.dtype if _is_type(a) else a)
        graph.recompile()
        floats = [n for n, like in program.state.likes.items() if like.is_floating_point()]
        state = program.state.with_edits(dict.fromkeys(floats, lambda t: t.to(self.dtype)))
        types = program.types or Types(self.dtype, {n: program.state.find_like(n).dtype for n in floats})
        made = replace(program, graph=graph, state=state, types=replace(types, wide=self.dtype))
        return PassResult(made, _list_float_types(program) != {self.dtype})

    def ensures(self, before: Program, after: Program) -> None:
        """No other floating type is left in the weights or the graph's calls."""
        assert _list_float_types(after) <= {self.dtype}, "another floating type is left"


def _list_float_types(program: Program) -> set[torch.dtype]:
    """The floating types of the weights and of the calls' arguments."""
    found = {like.dtype for like in program.state.likes.values()}
    for node in program.graph.graph.nodes:
        for given in tree_leaves((node.args, node.kwargs)):
            if isinstance(given, torch.dtype):
                found.add(given)
    return found & set(FLOATS)


def _is_type(value: Argument) -> bool:
    return isinstance(value, torch.dtype) and value in FLOATS


def restore_types(program: Program) -> Program:
    """The program in its module's types: weights and casts have their types from before ``Retype``."""
    if program.types is None:
        return program
    graph = program.copy_graph()
    for node in graph.graph.nodes:
        own = iter(node.meta.pop(OWN_TYPES, ()))
        given = (node.args, node.kwargs)
        node.args, node.kwargs = fx.node.map_aggregate(given, partial(_restore_type, own=own))
    graph.recompile()
    own_types = program.types.own
    casts = {n: partial(Tensor.to, dtype=dtype) for n, dtype in own_types.items() if n in program.state}
    return replace(program, graph=graph, state=program.state.with_edits(casts), types=None)


def _restore_type(value: Argument, own: Iterator[torch.dtype]) -> Argument:
    return next(own, value) if _is_type(value) else value


@dataclass(frozen=True)
class Store(Pass):
    """Round the weights to the type that they are stored in."""

    dtype: torch.dtype
    name: ClassVar[str] = "store"

    def run(self, program: Program) -> PassResult:
        # Constants, like rotary frequencies, are not in a checkpoint. Weights that were read from a file of this type
        # are exact already.
        held = program.state_dict().likes
        wider = [
            name
            for name, like in held.items()
            if name in program.state
            and is_wider(like, self.dtype)
            and getattr(program.state.get_entry(name), "held", None) != self.dtype
        ]
        if not wider:
            return PassResult(program, False)
        state = program.state.with_edits(dict.fromkeys(wider, partial(round_to_type, dtype=self.dtype)))
        return PassResult(replace(program, state=state), True, (f"{len(wider)} weights rounded",))

    def ensures(self, before: Program, after: Program) -> None:
        """The weights have the same names, shapes and types."""
        assert list_state_shapes(after) == list_state_shapes(before), "a weight has another shape"
        for name, like in after.state.likes.items():
            assert like.dtype == before.state.find_like(name).dtype, f"{name} has another type"


def round_to_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` with every number as ``dtype`` holds it; the tensor itself if that changes nothing.

    Raises:
        MptkError: a finite number is too large for ``dtype``.
    """
    if tensor.is_meta or not is_wider(tensor, dtype):
        return tensor
    rounded = tensor.detach().to(dtype).to(tensor.dtype)
    if not rounded.isfinite().all() and tensor.isfinite().all():
        raise InputError(f"a weight is larger than {dtype} can hold; use --dtype bfloat16 or float32", name="dtype")
    return tensor if torch.equal(rounded, tensor) else rounded


def is_wider(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor's floating type has more bits than ``dtype``."""
    return tensor.is_floating_point() and torch.finfo(tensor.dtype).bits > torch.finfo(dtype).bits


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Change every weight at random by the relative rounding error of its type."""

    # The seed is the name's checksum, so that a weight gets the same noise in each program and process.

    name: ClassVar[str] = "round weights"

    def run(self, program: Program) -> PassResult:
        floats = [name for name, like in program.state.likes.items() if like.is_floating_point()]
        moved = program.state.with_edits(
            {name: partial(_add_jitter, seed=zlib.crc32(name.encode())) for name in floats}
        )
        return PassResult(replace(program, state=moved), bool(floats))

    def ensures(self, before: Program, after: Program) -> None:
        """The weights have the same names, shapes and types."""
        kinds = [{n: (like.shape, like.dtype) for n, like in p.state.likes.items()} for p in (before, after)]
        assert kinds[0] == kinds[1], "a weight has another shape or type"


def _add_jitter(weight: Tensor, seed: int) -> Tensor:
    if weight.is_meta:
        return weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight)
    return weight * (1 + torch.finfo(weight.dtype).eps * noise)
