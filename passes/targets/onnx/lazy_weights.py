"""lazy_weights: export a program without its weights, and let the ONNX graph read each weight when it is written."""

from __future__ import annotations

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from mptk.ir.program import Program

SMALL = 1 << 12
"""Constants of at most so many numbers are read at once, since passes look at their values."""


def without_weights(program: Program) -> Program:
    """``program`` with the fake tensors of its trace in the place of its weights."""
    values = {node.name: node.meta["val"] for node in program.placeholders()}
    return program.with_state({name: values[node] for node, name in program.weights.items()})


def with_weights(model: ir.Model, program: Program) -> ir.Model:
    """Give ``model``, the export of ``without_weights(program)``, the weights of ``program``, in the graph's types."""
    held = set(program.state)
    for name, value in model.graph.initializers.items():
        source = program.aliases.get(name, name)
        if source in held:
            value.const_value = _lazy(value, program, source)
    return model


def _lazy(value: ir.Value, program: Program, name: str) -> ir.TensorProtocol:
    like = value.const_value
    assert isinstance(like, ir.Tensor)
    kind = like.raw.dtype

    def read() -> TorchTensor:
        tensor = program.state[name].detach()
        return TorchTensor(torch.view_as_real(tensor) if tensor.is_complex() else tensor.to(kind), name=value.name)

    return read() if like.size <= SMALL else ir.LazyTensor(read, like.dtype, like.shape, name=value.name)
