"""translate: ONNX code for operators that torch.onnx lacks, for its ``custom_translation_table``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnxscript
import torch

op: Any = onnxscript.opset23
"""Any: its methods are typed for tensors, but here they take and return the values of a graph."""


def grouped_mm(x: object, weight: object, offs: object) -> object:
    """Multiply the rows of each expert by its weight.

    Rows ``offs[e - 1]`` to ``offs[e]`` of x [rows, in] times weight[e] of [experts, in, out]; ``offs[-1]`` = rows.
    Each expert has a MatMul of its own, so its weights are not copied for each row. In one step, many experts have no
    row.
    """
    assert isinstance(weight, ir.Value)
    assert weight.shape is not None
    experts = weight.shape[0]
    assert isinstance(experts, int)
    ends = op.Cast(offs, to=7)
    starts = op.Concat(op.Constant(value_ints=[0]), ends, axis=0)
    axis = op.Constant(value_ints=[0])
    parts = []
    for expert in range(experts):
        index, following = (op.Constant(value_ints=[i]) for i in (expert, expert + 1))
        rows = op.Slice(x, op.Gather(starts, index), op.Gather(starts, following), axis)
        parts.append(op.MatMul(rows, op.Gather(weight, op.Constant(value_int=expert), axis=0)))
    return op.Concat(*parts, axis=0)


def diff(x: object, n: int = 1, dim: int = -1, prepend: object = None, append: object = None) -> object:
    """Each number minus the one before it along ``dim``, ``n`` times over, with ``prepend`` and ``append`` around x."""
    parts = [part for part in (prepend, x, append) if part is not None]
    whole = op.Concat(*parts, axis=dim) if len(parts) > 1 else x
    axis, first, end = (op.Constant(value_ints=[i]) for i in (dim, 0, torch.iinfo(torch.int64).max))
    for _ in range(n):
        later = op.Slice(whole, op.Constant(value_ints=[1]), end, axis)
        whole = op.Sub(later, op.Slice(whole, first, op.Constant(value_ints=[-1]), axis))
    return whole


def translations() -> dict[Callable[..., object], Callable[..., object]]:
    """Op → the function that writes it. A library's op is included if the library is loaded."""
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    own: dict[Callable[..., object], Callable[..., object]] = {torch.ops.aten.diff.default: diff}
    return own if fallback is None else {**own, fallback.default: grouped_mm}
