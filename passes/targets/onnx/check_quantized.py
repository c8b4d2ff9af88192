"""check_quantized: compare a quantised ONNX decoder with its float graph, weight by weight.

Channels are evened out before rounding (``smooth.py``, ``balance.py``), so the same is done to the float graph here.
Then each output of a product and each block of its inputs must satisfy:

1. 8 bits: every weight is within half a step of the float one, or within one step if its code is the last of the range;
2. 4 bits: the root mean square of errors is at most ``WHOLE`` steps in a weight and ``PART`` in a block. Calibration
   moves a weight by more than half a step to compensate other errors (SmolLM2-135M: at most 0.53 and 2.6);
3. float16: every number is the nearest one.

Channels of equal size may be sorted in another order on another processor, so columns that do not match are tried in
each other's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch import Tensor

from mptk.errors import ProofError
from passes.targets.onnx.balance import gated, weight_of
from passes.targets.onnx.block_weights import ZERO
from passes.targets.onnx.plain_products import products
from passes.targets.onnx.quantize import even_channels, read_float

Floats = npt.NDArray[np.float32]

HALF = 0.505
"""Half a step, plus float32's own rounding."""
WHOLE, PART = 0.75, 3.5
"""For comparison: random codes are 5 to 6 steps away; a scale twice too large gives 1.8 in a weight."""
HALVES, LEAST, LARGEST = 2.0**-11, 2.0**-23, 65504.0
"""float16: the relative rounding error, the absolute one near 0 (numbers start at 1e-7), the largest number."""

SHIFT = 1e-4
"""Allowed difference of float32 constants, relative to the largest. A norm's scale depends on a run of the graph."""
DIVERGENCES = {"fp16": 1e-3, "int8": 0.1, "int4": 1.0}
"""Allowed divergence of the logits, in nats for each token. SmolLM2-135M on WikiText-2: 6e-6, 0.008 and 0.09."""


@dataclass(frozen=True)
class Rounded:
    """A quantised weight: codes, values, and the size of the step at each. All arrays are [inputs, outputs]."""

    codes: npt.NDArray[np.uint8]
    values: Floats
    steps: Floats
    bits: int
    block: int

    def deviations(self, weight: Floats) -> Floats:
        """The deviation of each output from ``weight``, as a share of the allowed one, [outputs]."""
        apart = _in_steps(self.values - weight, self.steps)
        if self.bits == 8:
            return np.asarray(_eight(self.codes, apart).max(axis=0))
        whole = np.sqrt(np.square(apart).mean()) / WHOLE
        padded = np.pad(apart, ((0, -len(apart) % self.block), (0, 0))).reshape(-1, self.block, apart.shape[1])
        blocks = np.sqrt(np.square(padded).mean(axis=1)).max(axis=0) / PART
        return np.asarray(np.maximum(blocks, whole))


def _in_steps(difference: Floats, steps: Floats) -> Floats:
    """A difference in steps. A block of zeros has difference 0, even if its step is 0. NaN is infinitely far away."""
    least = np.finfo(np.float32).tiny
    return np.asarray(np.nan_to_num(np.abs(difference) / np.maximum(np.abs(steps), least), nan=np.inf))


def _eight(codes: npt.NDArray[np.generic], apart: Floats) -> Floats:
    """Steps from the float weight, as a share of those allowed for 8-bit codes."""
    return np.asarray(apart / np.where((codes == 0) | (codes == 255), 2 * HALF, HALF))


def check_quantized(source: Path, file: Path, scheme: str) -> float:
    """Compare ``file``, a graph of ``quantize_onnx``, with ``source``, its ``model.onnx``.

    Returns the largest deviation as a share of the allowed one.

    Raises:
        ProofError: a weight is missing, or is further from the float one than rounding explains. The message names it.
    """
    quantized = ir.load(file)
    worst = _check_halves(ir.load(source), quantized) if scheme == "fp16" else _check_blocks(source, quantized, scheme)
    name = max(worst, key=worst.__getitem__)
    if not worst[name] <= 1:
        _fail(scheme, f"{name} is {worst[name]:.1f} times as far from the float weight as rounding explains")
    return worst[name]


def _fail(scheme: str, what: str) -> None:
    raise ProofError(f"the proof fails at '{scheme} weights': {what}; quantise the model again")


def _check_blocks(source: Path, quantized: ir.Model, scheme: str) -> dict[str, float]:
    """Constant → its largest deviation as a share of the allowed one, if the graph's products are in blocks."""
    rounded = {_name(node): read(node) for node in quantized.graph if node.op_type == "MatMulNBits"}
    model = read_float(source)
    ir.passes.Sequential(*even_channels(source))(model)
    even = products(model)
    weights = {_weight_name(node): weight_of(node) for node in model.graph if node.name in even}
    if missing := weights.keys() ^ rounded.keys():
        _fail(scheme, f"{min(missing)} is a weight of only one of the graphs")
    if not all(rounded[name].values.shape == weight.shape for name, weight in weights.items()):
        _fail(scheme, "a weight is of another size")
    _reorder(model, rounded, weights)
    worst = {name: float(rounded[name].deviations(weight).max()) for name, weight in weights.items()}
    return worst | _check_lookup(model, quantized) | _check_rest(model, quantized)


def divergence(logits: Tensor, reference: Tensor) -> float:
    """Mean Kullback-Leibler divergence of next tokens from ``reference``, in nats. NaN counts as infinite."""
    expected, found = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    apart = (expected.exp() * (expected - found)).sum(-1).mean().item()
    return apart if apart == apart else float("inf")


def read(node: ir.Node) -> Rounded:
    """The weight of a ``MatMulNBits``: codes [outputs, blocks, bytes], scales and zero points by output and block."""
    inputs, outputs, bits, block = (node.attributes[n].as_int() for n in ("K", "N", "bits", "block_size"))
    codes = _codes(_array(node, 1), bits).reshape(outputs, -1, block)
    scales = _array(node, 2).reshape(outputs, -1, 1)
    zeros: npt.NDArray[np.uint8] | float = float(1 << (bits - 1))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        packed = _array(node, 3).reshape(outputs, -1)
        zeros = _codes(packed, bits)[:, : codes.shape[1], None]
    values = (scales * (codes.astype(np.float32) - zeros)).reshape(outputs, -1)
    steps: Floats = np.broadcast_to(scales, codes.shape).reshape(outputs, -1).astype(np.float32)
    flat = codes.reshape(outputs, -1)
    return Rounded(flat[:, :inputs].T, values[:, :inputs].T, steps[:, :inputs].T, bits, block)


def _codes(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Unpack codes. A byte holds two 4-bit codes, the first in its lower half."""
    return packed if bits == 8 else np.stack((packed & 15, packed >> 4), -1).reshape(*packed.shape[:-1], -1)


def _name(node: ir.Node) -> str:
    """The float weight's name, without the quantiser's suffix ``_Q8`` or ``_Q4``."""
    return _weight_name(node).rpartition("_Q")[0]


def _weight_name(node: ir.Node) -> str:
    return str(node.inputs[1].name)  # type: ignore[union-attr]


def _array(node: ir.Node, index: int) -> npt.NDArray[np.uint8]:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _reorder(model: ir.Model, rounded: dict[str, Rounded], weights: dict[str, Floats]) -> None:
    """Exchange channels of gated products that do not match, if they match in each other's place."""
    for node in model.graph:
        for gate, up, down in filter(None, [gated(node)]):
            names = [_weight_name(part) for part in (gate, up, down)]
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
    """The embedding in 8-bit blocks: table → its largest deviation as a share of the allowed one."""
    worst = {}
    constants = {name: v.const_value.numpy() for name, v in quantized.graph.initializers.items() if v.const_value}
    for name, value in model.graph.initializers.items():
        if value.const_value is None or f"{name}_row_scales" not in constants:
            continue
        exact, scales = value.const_value.numpy(), constants[f"{name}_row_scales"]
        blocks = constants[f"{name}_Q8" if f"{name}_Q8" in constants else f"{name}.T_Q8"].astype(np.float32)
        flat = (blocks, scales * (blocks - ZERO), np.broadcast_to(scales, blocks.shape))
        codes, values, steps = (array.reshape(len(exact), -1)[:, : exact.shape[1]] for array in flat)
        worst[name] = float(_eight(codes, _in_steps(values - exact, steps)).max())
    return worst


def _check_rest(model: ir.Model, quantized: ir.Model) -> dict[str, float]:
    """Constant that stays in float32 (norm, table) → its largest difference as a share of the allowed one."""
    worst = {}
    for name, value in model.graph.initializers.items():
        other = quantized.graph.initializers.get(name)
        if other is not None and value.const_value is not None and other.const_value is not None:
            exact, found = value.const_value.numpy(), other.const_value.numpy()
            if exact.dtype == np.float32 and exact.size:
                apart = np.nan_to_num(np.abs(found - exact), nan=np.inf).max() / max(np.abs(exact).max(), LEAST)
                worst[name] = float(apart / SHIFT)
    return worst


def _check_halves(source: ir.Model, quantized: ir.Model) -> dict[str, float]:
    """Float32 constant of the source → its largest difference, as a share of the rounding error of float16."""
    worst = {}
    for name, value in source.graph.initializers.items():
        assert value.const_value is not None
        if value.const_value.dtype is not ir.DataType.FLOAT:
            continue
        other = quantized.graph.initializers.get(name)
        if other is None or other.const_value is None:
            _fail("fp16", f"{name} is missing")
            break
        exact = value.const_value.numpy().clip(-LARGEST, LARGEST)
        apart = np.abs(other.const_value.numpy().astype(np.float32) - exact)
        worst[name] = float(np.nan_to_num(apart / np.maximum(np.abs(exact) * HALVES, LEAST), nan=np.inf).max())
    return worst
