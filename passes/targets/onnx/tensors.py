"""tensors: constants of an ONNX graph that are read or computed on demand and not kept in memory.

A graph may have more weights than memory holds. So a pass describes a new weight by a function of the old one. The
numbers are computed when the file is written, one tensor at a time. A ``Spill`` stores results of long computations.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from mptk.errors import TargetError, take_first_line
from mptk.files import write_together
from passes.targets.onnx.names import name_data_file

Array = npt.NDArray[Any]
"""Any: a graph's constants are of many types."""
Floats = npt.NDArray[np.float32]

PART = 1 << 22
"""Numbers processed at once if a step does not need the whole weight: 16 MiB of float32."""


def make_lazy_tensor(
    like: ir.TensorProtocol, make: Callable[[], Array], shape: Sequence[int] | None = None
) -> ir.LazyTensor:
    """A tensor that ``make`` computes at each request, of ``like``'s type and of its shape or ``shape``."""
    sizes = read_tensor_shape(like) if shape is None else shape
    return ir.LazyTensor(lambda: ir.Tensor(np.ascontiguousarray(make())), like.dtype, ir.Shape(sizes), name=like.name)


def read_tensor_shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape as numbers."""
    return tuple(int(size) for size in tensor.shape)  # type: ignore[arg-type]


def get_constant_tensor(value: ir.Value | None) -> ir.TensorProtocol:
    """The constant of ``value``, which has one."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value


def change_tensor(value: ir.Value | None, change: Callable[[Array], Array]) -> None:
    """Give ``value`` the changed constant, of the same shape and type."""
    old = get_constant_tensor(value)
    assert value is not None
    value.const_value = make_lazy_tensor(old, lambda: change(old.numpy()))


def save_graph(model: ir.Model, file: Path) -> Path:
    """Write a graph and its weights. It gets its name only when it is complete and ``onnx.checker`` accepts it."""
    data = name_data_file(file.name)
    with write_together(file.parent, data, file.name) as temporary:
        ir.save(model, temporary / file.name, external_data=data)
        # The checker's refusal is the user's to read: the exporter mixes types in arithmetic on sizes of some models.
        try:
            onnx.checker.check_model(temporary / file.name, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise TargetError(
                f"torch.onnx writes a graph that ONNX does not accept ({take_first_line(error)}); leave out ONNX",
                name="onnx",
            ) from error
    return file


def read_lazily(file: Path) -> ir.Model:
    """A model whose external weights are read at each request. onnx_ir maps files, and mapped pages stay in memory."""
    model = ir.load(file)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _from_file(value.const_value)
    return model


def name_nodes(model: ir.Model) -> None:
    """Give every node a name of its own. Passes that quantise, and onnxruntime's converter, know nodes by name."""
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{index}"


def _from_file(tensor: ir.ExternalTensor) -> ir.LazyTensor:
    kind, shape = tensor.dtype.numpy(), read_tensor_shape(tensor)
    return make_lazy_tensor(tensor, lambda: _read(Path(tensor.path), tensor.offset or 0, shape, kind))


def _read(file: Path, offset: int, shape: tuple[int, ...], kind: np.dtype[Any]) -> Array:
    return np.fromfile(file, kind, math.prod(shape), offset=offset).reshape(shape)


def slice_in_parts(shape: Sequence[int], axis: int = 0) -> Iterator[slice]:
    """Slices of an axis of an array of this shape, of about ``PART`` numbers each."""
    # At least one row. An array without numbers must not be a divisor.
    count = shape[axis]
    step = max(1, PART * count // max(1, math.prod(shape)))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


class Spill:
    """A temporary file for computed tensors. It is deleted when nothing refers to them."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".onnx-")  # noqa: SIM115 (closed with the last tensor)

    def keep(self, array: Array) -> ir.LazyTensor:
        """Write ``array``. Returns a tensor that reads it at each request."""
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(np.ascontiguousarray(array).data)
        shape, kind = array.shape, array.dtype
        return ir.LazyTensor(
            lambda: ir.Tensor(self._read(offset, shape, kind)), ir.DataType.from_numpy(kind), ir.Shape(shape)
        )

    def _read(self, offset: int, shape: tuple[int, ...], kind: np.dtype[Any]) -> Array:
        found = np.empty(shape, kind)
        self._file.seek(offset)
        self._file.readinto(found.data)
        return found
