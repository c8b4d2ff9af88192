"""check_quantized: compare a quantised ONNX graph with its float graph, weight by weight.

Channels are evened out before rounding (``equalize.py``), so the same is done to the float graph here.
Then each output of a product and each block of its inputs must satisfy:

1. 8 bits: every weight is within half a step of the float one, or within one step if its code is the last of the range;
2. 4 bits: the root mean square of errors is at most ``WEIGHT_STEPS`` steps in a weight and ``BLOCK_STEPS`` in a block.
   Calibration moves a weight by more than half a step to compensate other errors (SmolLM2-135M: at most 0.53 and 2.6);
3. float16: every number is the nearest one.

And the graph must be, node for node, what the scheme's passes make of the float graph. So whatever the float graph
computes right for a length, a batch or a cache, the quantised graph computes in the same way.

Channels of equal size may be sorted in another order on another processor, so columns that do not match are tried in
each other's place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common
from torch import Tensor

from mptk.errors import ProofError
from mptk.progress import step_through
from passes.targets.onnx.block_weights import BlockWeightsPass, LookUpInBlocksPass
from passes.targets.onnx.equalize import match_gated_product
from passes.targets.onnx.float16 import Float16Pass
from passes.targets.onnx.names import read_scheme
from passes.targets.onnx.plain_products import find_weight_products
from passes.targets.onnx.quantize import list_evening_passes, read_float
from passes.targets.onnx.structure import compare_constants, compare_structures
from passes.targets.onnx.tensors import (
    Array,
    Floats,
    get_constant_tensor,
    make_lazy_tensor,
    read_lazily,
    read_tensor_shape,
    slice_in_parts,
)

HALF_STEP = 0.505
"""Half a step, plus float32's own rounding."""
WEIGHT_STEPS, BLOCK_STEPS = 0.75, 3.5
"""For comparison: random codes are 5 to 6 steps away; a scale twice too large gives 1.8 in a weight."""
FLOAT16_ROUNDING, FLOAT16_LEAST, FLOAT16_LARGEST = 2.0**-11, 2.0**-23, 65504.0
"""float16: the relative rounding error, the absolute one near 0 (numbers start at 1e-7), the largest number."""

SHIFT = 1e-4
"""Allowed difference of float32 constants, relative to each number. A norm's scale depends on a run of the graph."""
DIVERGENCES = {"fp16": 1e-3, "int8": 0.1, "int4": 1.0}
"""Allowed divergence of the logits, in nats for each token. SmolLM2-135M on WikiText-2: 6e-6, 0.008 and 0.09."""


@dataclass(frozen=True)
class Rounded:
    """A weight in blocks as MatMulNBits has it. Its numbers are ``scales · (codes − zeros)``.

    ``packed``: codes, uint8 [outputs, blocks, bytes]. ``scales``: [outputs, blocks]. ``zeros``: the same shape; None:
    the middle code. ``inputs``: the last block may be longer.
    """

    packed: npt.NDArray[np.uint8]
    scales: Floats
    zeros: npt.NDArray[np.uint8] | None
    inputs: int
    bits: int
    block: int

    def select_part(self, outputs: slice | npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint8], Floats, Floats]:
        """Codes, values and the size of the step at each, of some outputs. All arrays are [inputs, outputs]."""
        # [outputs, blocks, block], then one row for each output, without the padding of the last block.
        codes, scales = _unpack_codes(self.packed[outputs], self.bits), self.scales[outputs, :, None]
        zeros = float(1 << (self.bits - 1)) if self.zeros is None else self.zeros[outputs, :, None]
        values = scales * (codes.astype(np.float32) - zeros)
        flat = (len(codes), codes.shape[1] * codes.shape[2])
        arrays = (codes, values, np.broadcast_to(scales, codes.shape))
        codes, values, steps = (array.reshape(flat)[:, : self.inputs].T for array in arrays)
        return codes, values, steps

    def measure_deviations(self, weight: Floats) -> Floats:
        """The deviation of each output from ``weight`` [inputs, outputs], as a share of the allowed one, [outputs]."""
        found = [self._measure_some(weight[:, outputs], outputs) for outputs in slice_in_parts(weight.shape, 1)]
        each, squares = zip(*found, strict=True)
        whole = np.sqrt(sum(squares) / weight.size) / WEIGHT_STEPS if self.bits == 4 else 0
        deviations: Floats = np.maximum(np.concatenate(each), whole)
        return deviations

    def _measure_some(self, weight: Floats, outputs: slice) -> tuple[Floats, float]:
        """The same of some outputs. For 4 bits: of blocks, and the sum of squares over all."""
        codes, values, steps = self.select_part(outputs)
        apart = _convert_to_steps(values - weight, steps)
        if self.bits == 8:
            # The range is symmetric and the codes are not: the end that has one code less cuts off a whole step.
            allowed = np.where((codes == 0) | (codes == 255), 2 * HALF_STEP, HALF_STEP)
            return np.asarray((apart / allowed).max(axis=0)), 0.0
        # GPTQ moves single weights far, so a whole block is measured.
        squares = np.square(apart)
        padded = np.pad(squares, ((0, -len(apart) % self.block), (0, 0))).reshape(-1, self.block, apart.shape[1])
        worst = np.sqrt(padded.mean(axis=1)).max(axis=0) / BLOCK_STEPS
        return np.asarray(worst, np.float32), float(squares.sum(dtype=np.float64))


def _convert_to_steps(difference: Floats, steps: Floats) -> Floats:
    """A difference in steps. A block of zeros has difference 0, even if its step is 0. NaN is infinitely far away."""
    least = np.finfo(np.float32).tiny
    return np.asarray(np.nan_to_num(np.abs(difference) / np.maximum(np.abs(steps), least), nan=np.inf))


def check_quantized(source: Path, file: Path, scheme: str) -> float:
    """Compare ``file``, a graph of ``quantize_onnx``, with ``source``, its float graph.

    Returns the largest deviation as a share of the allowed one.

    Raises:
        ProofError: a weight is missing, or is further from the float one than rounding explains. The message names it.
    """
    # Numbers first: their message names the weight.
    check = _check_halves if scheme == "fp16" else _check_blocks
    quantized = read_lazily(file)
    worst, expected = check(source, quantized, scheme)
    name = max(worst, key=worst.__getitem__)
    if not worst[name] <= 1:
        _fail(scheme, f"{name} is {worst[name]:.1f} times as far from the float weight as rounding explains")
    # Constants that the scheme does not round must not move. ``_check_halves`` has compared all of them.
    if moved := compare_constants(quantized, read_float(source)) if scheme != "fp16" else "":
        _fail(scheme, moved)
    # Then the structure, with the float graph's own metadata.
    expected.metadata_props.update(read_float(source).metadata_props)
    # A main graph in float16 names its type itself. ``verify`` writes it again and compares all metadata.
    _check_structure(expected, quantized, scheme, () if read_scheme(file) else ("dtype", "quantization"))
    return worst[name]


def _check_structure(expected: ir.Model, quantized: ir.Model, scheme: str, unlike: Collection[str]) -> None:
    """``expected``: the float graph after the scheme's passes. ``unlike``: entries of the metadata that may differ."""
    expected.metadata_props["quantization"] = scheme
    for node in expected.graph:
        # ``gptq`` writes scales and zero points flat, ONNX Runtime's quantiser does not; the kernel reads either.
        for value in node.inputs[2:] if node.op_type == "MatMulNBits" else ():
            other = quantized.graph.initializers.get(str(value.name)) if value is not None else None
            if (
                value is not None
                and other is not None
                and get_constant_tensor(other).size == get_constant_tensor(value).size
            ):
                value.const_value = get_constant_tensor(other)
    if apart := compare_structures(quantized, expected, unlike):
        _fail(scheme, f"the graph is not what quantising makes of the float graph: {apart}")


def _fail(scheme: str, what: str) -> None:
    raise ProofError(
        f"the proof fails at '{scheme} weights': {what}; quantise the model again", name=f"{scheme} weights"
    )


def _check_blocks(source: Path, quantized: ir.Model, scheme: str) -> tuple[dict[str, float], ir.Model]:
    """Constant → its largest deviation as a share of the allowed one, if the graph's products are in blocks.

    And the graph that the scheme's passes make, without numbers: how a weight is rounded changes no node.
    """
    # The float graph with channels evened out, and the products of both graphs by the name of their float weight.
    rounded = {_name(node): node for node in quantized.graph if node.op_type == "MatMulNBits"}
    model = read_float(source)
    ir.passes.Sequential(*list_evening_passes(source))(model)
    even = find_weight_products(model)
    weights = {_name_weight(node): even[node.name] for node in model.graph if node.name in even}
    if missing := weights.keys() ^ rounded.keys():
        _fail(scheme, f"{min(missing)} is a weight of only one of the graphs")
    sizes = {name: tuple(node.attributes[each].as_int() for each in ("K", "N")) for name, node in rounded.items()}
    if not all(sizes[name] == read_tensor_shape(weight) for name, weight in weights.items()):
        _fail(scheme, "a weight is of another size")
    _reorder(model, rounded, weights)
    # One weight at a time: products, the embedding, and what stays float32.
    worst = {
        name: float(read(rounded[name]).measure_deviations(weight.numpy()).max())
        for name, weight in step_through(weights.items(), f"{scheme} weights")
    }
    worst |= _check_lookup(model, quantized) | _check_rest(model, quantized)
    bits: Literal[8, 4] = 8 if scheme == "int8" else 4
    blocks = BlockWeightsPass(bits, source, numbers=False), LookUpInBlocksPass(source, numbers=False)
    return worst, ir.passes.Sequential(*blocks, common.RemoveUnusedNodesPass())(model).model


def compute_token_divergence(logits: Tensor, reference: Tensor) -> float:
    """Mean Kullback-Leibler divergence of next tokens from ``reference``, in nats. NaN counts as infinite."""
    # float64: in float32, sums over the vocabulary round by about as much as float16 moves the logits.
    expected, found = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    apart = (expected.exp() * (expected - found)).sum(-1).mean().item()
    return apart if apart == apart else float("inf")


def read(node: ir.Node) -> Rounded:
    """The weight of a ``MatMulNBits``."""
    inputs, outputs, bits, block = (node.attributes[n].as_int() for n in ("K", "N", "bits", "block_size"))
    packed, scales = (
        get_constant_tensor(value).numpy().reshape(outputs, -(-inputs // block), -1) for value in node.inputs[1:3]
    )
    # An odd number of 4-bit zero points is padded to whole bytes.
    zeros = None
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        zeros = _unpack_codes(get_constant_tensor(node.inputs[3]).numpy().reshape(outputs, -1), bits)[
            :, : packed.shape[1]
        ]
    return Rounded(packed, scales[..., 0], zeros, inputs, bits, block)


def _unpack_codes(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Unpack codes. A byte holds two 4-bit codes, the first in its lower half."""
    return packed if bits == 8 else np.stack((packed & 15, packed >> 4), -1).reshape(*packed.shape[:-1], -1)


def _name(node: ir.Node) -> str:
    """The float weight's name, without the quantiser's suffix ``_Q8`` or ``_Q4``."""
    return _name_weight(node).rpartition("_Q")[0]


def _name_weight(node: ir.Node) -> str:
    return str(node.inputs[1].name)  # type: ignore[union-attr]


def _reorder(model: ir.Model, rounded: dict[str, ir.Node], weights: dict[str, ir.TensorProtocol]) -> None:
    """Exchange channels of gated products that do not match, if they match in each other's place.

    Sizes of channels are computed by a processor, and channels of equal size may be sorted in another order.
    """
    for node in model.graph:
        for gate_up_down in filter(None, [match_gated_product(node)]):
            names = list(map(_name_weight, gate_up_down))
            order = _order(read(rounded[names[0]]), weights[names[0]].numpy())
            if order is not None:
                for name, axis in zip(names, (1, 1, 0), strict=True):
                    weights[name] = _take_along(weights[name], order, axis)


def _order(found: Rounded, exact: Floats) -> npt.NDArray[np.int64] | None:
    """The channels of ``exact`` [hidden, channels] in the order of ``found``; None if all match."""
    wrong = np.flatnonzero(found.measure_deviations(exact) > 1)
    if not len(wrong):
        return None
    order = np.arange(exact.shape[1])
    _, values, _ = found.select_part(wrong)
    # The nearest of the float columns that do not match either. If none is right, the comparison fails afterwards.
    for column, channel in enumerate(wrong):
        apart = np.linalg.norm(exact[:, wrong] - values[:, [column]], axis=0)
        order[channel] = wrong[apart.argmin()]
    return order


def _take_along(tensor: ir.TensorProtocol, order: npt.NDArray[np.int64], axis: int) -> ir.TensorProtocol:
    return make_lazy_tensor(tensor, lambda: np.take(tensor.numpy(), order, axis))


def _check_lookup(model: ir.Model, quantized: ir.Model) -> dict[str, float]:
    """The embedding in 8-bit blocks: table → its largest deviation as a share of the allowed one."""
    worst = {}
    constants = quantized.graph.initializers
    for name, value in model.graph.initializers.items():
        if value.const_value is None or f"{name}_row_scales" not in constants:
            continue
        exact = value.const_value.numpy()
        # Blocks of its own, or those of the output projection.
        codes = get_constant_tensor(constants.get(f"{name}_Q8") or constants[f"{name}.T_Q8"]).numpy()
        scales = get_constant_tensor(constants[f"{name}_row_scales"]).numpy()[..., 0]
        table = Rounded(codes, scales, None, exact.shape[1], 8, codes.shape[2])
        worst[name] = float(table.measure_deviations(exact.T).max())
    return worst


def _check_rest(model: ir.Model, quantized: ir.Model) -> dict[str, float]:
    """Constant that stays in float32 (norm, table) → its largest difference as a share of the allowed one.

    Scales come from a run of the graph, so only those may move at all.
    """
    worst = {}
    for name, value in model.graph.initializers.items():
        other = quantized.graph.initializers.get(name)
        if other is None or value.const_value is None or other.const_value is None:
            continue
        if value.const_value.dtype is ir.DataType.FLOAT and value.const_value.size:
            pairs = list(_split_in_parts(value.const_value, other.const_value))
            worst[name] = max(_measure_shift(exact, found) for exact, found in pairs)
    return worst


def _measure_shift(exact: Floats, found: Floats) -> float:
    # Numbers near 0 count as the least that float16 resolves.
    apart = np.abs(found - exact) / np.maximum(np.abs(exact), FLOAT16_LEAST)
    return float(np.nan_to_num(apart, nan=np.inf).max()) / SHIFT


def _check_halves(source: Path, quantized: ir.Model, scheme: str) -> tuple[dict[str, float], ir.Model]:
    """Float32 constant of the source → its largest difference, as a share of the rounding error of float16.

    And the source in float16.
    """
    worst = {}
    for name, value in read_lazily(source).graph.initializers.items():
        if get_constant_tensor(value).dtype is not ir.DataType.FLOAT or not get_constant_tensor(value).size:
            continue
        other = quantized.graph.initializers.get(name)
        if other is None or other.const_value is None:
            _fail(scheme, f"{name} is missing")
            break
        worst[name] = max(
            _measure_half_error(*pair) for pair in _split_in_parts(get_constant_tensor(value), other.const_value)
        )
    return worst, Float16Pass()(read_float(source)).model


def _measure_half_error(exact: Floats, found: npt.NDArray[np.floating[npt.NBitBase]]) -> float:
    # onnxruntime's converter clips what float16 cannot hold.
    exact = exact.clip(-FLOAT16_LARGEST, FLOAT16_LARGEST)
    apart = np.abs(found.astype(np.float32) - exact)
    return float(np.nan_to_num(apart / np.maximum(np.abs(exact) * FLOAT16_ROUNDING, FLOAT16_LEAST), nan=np.inf).max())


def _split_in_parts(exact: ir.TensorProtocol, found: ir.TensorProtocol) -> Iterator[tuple[Array, Array]]:
    """Two tensors of one shape, part by part."""
    flat = exact.numpy().reshape(-1), found.numpy().reshape(-1)
    return ((flat[0][part], flat[1][part]) for part in slice_in_parts(flat[0].shape))
