"""gptq: round the weights of an ONNX decoder's products to 4-bit blocks (MatMulNBits) with a calibration text.

GPTQ (Frantar et al. 2023, arXiv 2210.17323): a product's inputs are rounded one after another. Each rounding error is
compensated by the inputs not yet rounded, so that the result on the text changes least. A block's range is the one of
the ``SHRINKS`` ranges with the least error.

ONNX Runtime has GPTQ, too, but it runs the graph once for each value and each window.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from mptk.files import make_staging
from mptk.ort.sessions import CPU
from mptk.progress import step
from passes.targets.onnx.block_weights import set_blocks
from passes.targets.onnx.equalize import get_product_weight
from passes.targets.onnx.measure import Text, measure_onnx
from passes.targets.onnx.plain_products import find_logit_products, find_weight_products
from passes.targets.onnx.tensors import Floats, Spill

SHRINKS = np.linspace(1, 0.75, 11)
"""The ranges that are tried, as shares of the weights' own range. A narrower range clips the few largest weights and
rounds all others more finely."""
DAMPING = 0.01
"""Added to the diagonal of the second moments, as a share of its mean (the paper's value)."""
CODE_STEPS = 15
"""Steps in a range of 4 bits."""


@dataclass(frozen=True)
class Blocks:
    """A weight [inputs, outputs]: ``scale · (code − zero)``, codes of 4 bits.

    ``codes``: uint8 [inputs, outputs]; ``scales``, ``zeros``: [blocks, outputs]; a block has ``size`` inputs.
    """

    codes: npt.NDArray[np.uint8]
    scales: Floats
    zeros: npt.NDArray[np.uint8]
    size: int

    def to_float(self) -> Floats:
        """The weight in float32."""
        block = np.arange(len(self.codes)) // self.size
        return self.scales[block] * (self.codes - self.zeros[block].astype(np.float32))


@dataclass(frozen=True, eq=False)
class GPTQPass(ir.passes.InPlacePass):
    """Round products with weights to 4-bit blocks for a calibration text, except the output projection.

    Attributes:
        source: the file of the graph. A copy of the graph is written beside it and run on ``device``.
        text: token ids, [windows, length]. Random ids do not help: 512 of them did more harm than good.
        block: inputs that share a scale and a zero point.
    """

    source: Path
    text: Text
    block: int
    device: torch.device = CPU

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        # Products of one input (query, key and value) share its second moments, which are the expensive part.
        names = find_weight_products(model).keys() - find_logit_products(model)
        readers: dict[str, list[ir.Node]] = {}
        for node in model.graph:
            if node.name in names:
                readers.setdefault(str(node.inputs[0].name), []).append(node)  # type: ignore[union-attr]
        channels = {name: get_product_weight(nodes[0]).shape[0] for name, nodes in readers.items()}
        spill = Spill(self.source.parent)
        # The graph that runs is ``model``, not ``source``: passes have rescaled its channels before.
        with make_staging(self.source.parent) as staging:
            file = staging.folder / self.source.name
            ir.save(model, file, external_data=f"{file.name}.data")
            found = measure_onnx(file, channels, self.text, "products", self.device)
            for done, (name, moments) in enumerate(found):
                step(done, len(channels), "inputs of weights in 4-bit blocks")
                inverse = compute_inverse_root(moments)
                for node in readers[name]:
                    rounded = round_blocks(get_product_weight(node), moments.diagonal(), inverse, self.block)
                    set_blocks(model.graph, node, 4, self.block, _pack_blocks(rounded, spill))
        return ir.passes.PassResult(model, bool(readers))

    def ensures(self, model: ir.Model) -> None:
        """Only the output projection has a float weight."""
        left = sorted(find_weight_products(model).keys() - find_logit_products(model))
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} has a float weight")


def compute_inverse_root(moments: Floats) -> Floats:
    """The upper triangular U with Uᵀ U = (moments + damping)⁻¹. An input that is always 0 counts as 1."""
    # float64: the moments of a thousand inputs are nearly singular.
    damped = moments.astype(np.float64)
    damped[np.diag_indices_from(damped)] += DAMPING * damped.diagonal().mean() + (damped.diagonal() == 0)
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)


def round_blocks(weight: Floats, sizes: Floats, inverse: Floats, block: int) -> Blocks:
    """Round ``weight`` [inputs, outputs] to blocks of ``block`` inputs.

    ``sizes`` [inputs]: mean squares of the inputs, times any factor. ``inverse``: of ``compute_inverse_root``.
    """
    left, codes, grids = weight.copy(), np.empty_like(weight), []
    for start in range(0, len(weight), block):
        rows = slice(start, start + block)
        # The block's grid is fitted to the weights as the errors so far have left them.
        part, steps = left[rows].copy(), inverse[rows, rows]
        scale, zero = fit_grid(part, sizes[rows])
        errors = np.empty_like(part)
        # Within the block each error is passed on at once, to the later blocks only at the end, in one product.
        for i, row in enumerate(part):
            codes[start + i] = round_to_grid(row, scale, zero)
            errors[i] = (row - scale * (codes[start + i] - zero)) / steps[i, i]
            part[i + 1 :] -= steps[i, i + 1 :, None] * errors[i]
        left[start + block :] -= inverse[rows, start + block :].T @ errors
        grids.append((scale, zero))
    scales, zeros = (np.stack(arrays) for arrays in zip(*grids, strict=True))
    return Blocks(codes.astype(np.uint8), scales, zeros.astype(np.uint8), block)


def fit_grid(part: Floats, sizes: Floats) -> tuple[Floats, Floats]:
    """Scale and zero point of a block [inputs, outputs], each [outputs]: the ``SHRINKS`` range with the least error."""
    # The range must have 0, which the zero point stands for.
    low, high = np.minimum(part.min(axis=0), 0), np.maximum(part.max(axis=0), 0)
    best = np.full(part.shape[1], np.inf, dtype=np.float32)
    scale, zero = np.ones_like(best), np.zeros_like(best)
    for share in SHRINKS.astype(np.float32):
        tried = np.maximum(share * (high - low) / CODE_STEPS, np.finfo(np.float32).tiny)  # no 0 for a block of zeros
        origin = np.rint(-share * low / tried)
        # An error counts as much as its input is large.
        error = (sizes[:, None] * (tried * (round_to_grid(part, tried, origin) - origin) - part) ** 2).sum(axis=0)
        better = error < best
        best, scale, zero = (np.where(better, *pair) for pair in ((error, best), (tried, scale), (origin, zero)))
    return scale, zero


def round_to_grid(values: Floats, scale: Floats, zero: Floats) -> Floats:
    """The codes of ``values`` [..., outputs], 0 … ``CODE_STEPS``."""
    codes: Floats = np.clip(np.rint(values / scale) + zero, 0, CODE_STEPS)
    return codes


def _pack_blocks(blocks: Blocks, spill: Spill) -> dict[str, ir.TensorProtocol]:
    """The constants of MatMulNBits. A byte holds two neighbours of a block, the first in its lower half."""
    inputs, outputs = blocks.codes.shape
    count = len(blocks.scales)
    padded = np.pad(blocks.codes, ((0, count * blocks.size - inputs), (0, 0))).T.reshape(outputs, count, blocks.size)
    zeros = np.pad(blocks.zeros, ((0, count % 2), (0, 0))).T
    return {
        "Q4": spill.keep(_pack_pairs(padded)),
        "scales": spill.keep(blocks.scales.T.flatten()),
        "zero_points": spill.keep(_pack_pairs(zeros).flatten()),
    }


def _pack_pairs(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pack two neighbours of the last axis into a byte."""
    joined: npt.NDArray[np.uint8] = np.ascontiguousarray(codes[..., ::2] | codes[..., 1::2] << 4)
    return joined
