"""check_quantized: a quantised ONNX decoder, weight by weight, against the float graph that it was made of.

Channels are evened out before they are rounded (``smooth_onnx``, ``balance_onnx``), so the float graph is evened out
again here. What is then compared, for each output of a product and each block of its inputs:

1. 8 bits: every weight is within half a step of the float one;
2. 4 bits: the root mean square of a block's errors is at most ``STEPS`` steps. Rounding for a text moves a weight by
   more than half a step, to make up for others;
3. float16: every number is the nearest one.

Channels that balancing finds equally large may come in another order on another processor, so columns that do not fit
are tried in each other's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mptk.errors import ProofError
from passes.balance_onnx import gated, weight_of
from passes.quantize_onnx import ZERO, evened, read_float

Floats = npt.NDArray[np.float32]

HALF = 0.505
"""Half a step, and what float32 rounds of it."""
STEPS = 1.0
"""Of 4 bits; SmolLM2-135M rounded for a text has no block above 0.7."""
HALVES = 2.0**-11
"""Relative error of the nearest float16."""
LEAST = 2.0**-23
"""Absolute error of the nearest float16: the converter keeps numbers from 1e-7 on."""


@dataclass(frozen=True)
class Rounded:
    """A quantised weight: its values and the size of a step at each, [inputs, outputs], in blocks of ``block`` inputs."""

    values: Floats
    steps: Floats
    bits: int
    block: int

    def deviations(self, weight: Floats) -> Floats:
        """How far each output's worst block is from ``weight``, as a share of what is allowed, [outputs]."""
        apart = np.abs(self.values - weight) / self.steps
        if self.bits == 8:
            return np.nan_to_num(apart.max(axis=0), nan=np.inf) / HALF
        padded = np.pad(apart, ((0, -len(apart) % self.block), (0, 0))).reshape(-1, self.block, apart.shape[1])
        return np.nan_to_num(np.sqrt(np.square(padded).mean(axis=1)).max(axis=0), nan=np.inf) / STEPS


def check_quantized(source: Path, file: Path) -> float:
    """Compare ``file``, a ``model_SCHEME.onnx``, with ``source``, its ``model.onnx``.

    Returns the largest deviation as a share of what is allowed, at most 1.

    Raises:
        ProofError: a weight is missing or further from the float one; the message names it.
    """
    quantized = ir.load(file)
    if quantized.metadata_props.get("quantization") == "fp16":
        return _check_halves(ir.load(source), quantized)
    rounded = {_name(node): read(node) for node in quantized.graph if node.op_type == "MatMulNBits"}
    model = read_float(source)
    products, _ = evened(model, source)
    weights = {str(node.inputs[1].name): weight_of(node) for node in model.graph if node.name in products}
    if missing := weights.keys() ^ rounded.keys():
        raise ProofError(f"{file.name}: {min(missing)} is a product of one graph alone; quantise the model again")
    _reorder(model, rounded, weights)
    worst = {name: float(rounded[name].deviations(weight).max()) for name, weight in weights.items()}
    worst |= _check_lookup(model, quantized)
    name = max(worst, key=worst.__getitem__)
    if not worst[name] <= 1:
        raise ProofError(
            f"{file.name}: a block of {name} is {worst[name]:.1f} times as far from the float weight as rounding could "
            "bring it; quantise the model again"
        )
    return worst[name]


def read(node: ir.Node) -> Rounded:
    """The weight of a ``MatMulNBits``: codes [outputs, blocks, bytes], scales and zero points by output and block."""
    inputs, outputs, bits, block = (node.attributes[n].as_int() for n in ("K", "N", "bits", "block_size"))
    codes = _codes(_array(node, 1), bits).reshape(outputs, -1, block)
    scales = _array(node, 2).reshape(outputs, -1, 1)
    zeros: npt.NDArray[np.uint8] | float = float(1 << (bits - 1))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        packed = _array(node, 3).reshape(outputs, -1)
        zeros = _codes(packed, bits)[:, : codes.shape[1], None]
    values = scales * (codes.astype(np.float32) - zeros)
    steps = np.broadcast_to(np.abs(scales), codes.shape)
    return Rounded(*(a.reshape(outputs, -1)[:, :inputs].T for a in (values, steps)), bits, block)


def _codes(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes of 4 bits are two to a byte, the first in its lower half."""
    return packed if bits == 8 else np.stack((packed & 15, packed >> 4), -1).reshape(*packed.shape[:-1], -1)


def _name(node: ir.Node) -> str:
    """The float weight's name, to which quantisers add ``_Q8`` or ``_Q4``."""
    return str(node.inputs[1].name).rpartition("_Q")[0]  # type: ignore[union-attr]


def _array(node: ir.Node, index: int) -> npt.NDArray[np.uint8]:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _reorder(model: ir.Model, rounded: dict[str, Rounded], weights: dict[str, Floats]) -> None:
    """Put channels of gated products that do not fit in each other's place, if they fit there."""
    for node in model.graph:
        for gate, up, down in filter(None, [gated(node)]):
            names = [str(part.inputs[1].name) for part in (gate, up, down)]  # type: ignore[union-attr]
            found = rounded[names[0]]
            wrong = np.flatnonzero(found.deviations(weights[names[0]]) > 1)
            order = np.arange(found.values.shape[1])
            for channel in wrong:
                apart = np.linalg.norm(weights[names[0]][:, wrong] - found.values[:, [channel]], axis=0)
                order[channel] = wrong[apart.argmin()]
            for name in names[:2]:
                weights[name] = weights[name][:, order]
            weights[names[2]] = weights[names[2]][order]


def _check_lookup(model: ir.Model, quantized: ir.Model) -> dict[str, float]:
    """The embedding's rows in 8-bit blocks: table → the largest deviation, as a share of what is allowed."""
    worst = {}
    constants = {name: v.const_value.numpy() for name, v in quantized.graph.initializers.items() if v.const_value}
    for node in model.graph:
        table = node.inputs[0].const_value if node.op_type == "Gather" and node.inputs[0] is not None else None
        name = f"{node.inputs[0].name}" if table is not None else ""  # type: ignore[union-attr]
        if table is None or f"{name}_row_scales" not in constants:
            continue
        exact, scales = table.numpy(), constants[f"{name}_row_scales"]
        blocks = constants.get(f"{name}_Q8", constants.get(f"{name}.T_Q8")).astype(np.float32)
        values, steps = (
            a.reshape(len(exact), -1) for a in (scales * (blocks - ZERO), np.broadcast_to(scales, blocks.shape))
        )
        width = exact.shape[1]
        apart = np.abs(values[:, :width] - exact) / steps[:, :width]
        worst[name] = float(np.nan_to_num(apart, nan=np.inf).max() / HALF)
    return worst


def _check_halves(source: ir.Model, quantized: ir.Model) -> float:
    """Every float32 constant of the source is there as the nearest float16, or as it was."""
    worst = {}
    halves = quantized.graph.initializers
    for name, value in source.graph.initializers.items():
        assert value.const_value is not None
        if value.const_value.dtype is not ir.DataType.FLOAT:
            continue
        found = halves[name].const_value if name in halves else None
        if found is None:
            raise ProofError(f"the float16 graph has no {name}; quantise the model again")
        exact = value.const_value.numpy()
        allowed = np.maximum(np.abs(exact) * HALVES, LEAST)
        worst[name] = float(np.nan_to_num(np.abs(found.numpy().astype(np.float32) - exact) / allowed, nan=np.inf).max())
    return max(worst.values())
