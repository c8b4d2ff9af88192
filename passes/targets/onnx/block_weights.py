"""block_weights: round products with weights to MatMulNBits with ONNX Runtime's own quantiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from mptk.compat.onnxruntime import matmul_quantizer
from passes.targets.onnx.gptq import ACCURACY_LEVEL
from passes.targets.onnx.plain_products import logit_products, products

BLOCK = 32
"""Inputs that share a scale in 4 bits. More of them would be too coarse."""

WIDE, LEAST = 128, 16
"""Inputs that share a scale in 8 bits: ``WIDE``, the fastest block even if the last one is padded. Fewer inputs get the
least power of two that holds them, but at least ``LEAST``, the kernel's minimum."""

ZERO = 128
"""The zero point of 8-bit symmetric weights."""


@dataclass(frozen=True)
class BlockWeightsPass(ir.passes.FunctionalPass):
    """Round the weights of products to blocks of 8 or 4 bits. With 4, the output projection has 8."""

    bits: Literal[8, 4]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        ort = matmul_quantizer()
        formats, proto = self._formats(model), ir.to_proto(model)
        for bits, block in sorted(set(formats.values())):  # the quantiser takes one format a call
            config = ort.DefaultWeightOnlyQuantConfig(
                block_size=block, is_symmetric=bits == 8, accuracy_level=ACCURACY_LEVEL, bits=bits
            )
            others = [name for name, other in formats.items() if other != (bits, block)]
            quantizer = ort.MatMulNBitsQuantizer(proto, nodes_to_exclude=others, algo_config=config)
            quantizer.process()
            proto = quantizer.model.model
        return ir.passes.PassResult(ir.from_proto(proto), bool(formats))

    def ensures(self, model: ir.Model) -> None:
        """No product has a float weight."""
        left = sorted(products(model))
        if left:
            raise ir.passes.PostconditionError(f"{left[0]} has a float weight")

    def _formats(self, model: ir.Model) -> dict[str, tuple[int, int]]:
        """Bits and block size by product."""
        if self.bits == 4:
            head = logit_products(model)
            return {name: (8 if name in head else 4, BLOCK) for name in products(model)}
        inputs = {name: weight.shape[0] for name, weight in products(model).items()}
        return {name: (8, max(LEAST, min(WIDE, 1 << (count - 1).bit_length()))) for name, count in inputs.items()}
