"""quantize: write a quantised copy of a float32 ONNX graph beside it.

| scheme | weights of products | kernel |
|---|---|---|
| ``int8`` | 8 bits, a scale for each block of 128 inputs | MatMulNBits, activations in blocks, too |
| ``int4`` | 4 bits, a scale and a zero point for each block of 32; the output projection as in ``int8`` | the same |
| ``fp16`` | float16, and the KV cache, too | float16 if there is one; rotary angles stay float32 |

The weights are rounded by ONNX Runtime's own quantiser (``block_weights.py``), or by ``gptq.py`` for ``int4`` with a
calibration text. That quantiser leaves the embedding in float32, and also an output projection that is the transposed
embedding. They are the larger part of a small model, so both are quantised here. If both are one table, it is stored
once: tokens are looked up in the output projection's blocks.

ONNX Runtime's dynamic int8 (one scale for a whole tensor of activations) is not offered: padding changes its logits.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from mptk.ir import Log
from passes.targets.onnx.block_weights import BLOCK
from passes.targets.onnx.emit import run_onnx
from passes.targets.onnx.equalize import BalancePass, SmoothPass
from passes.targets.onnx.names import name_quantized_file
from passes.targets.onnx.plain_products import PlainProductsPass
from passes.targets.onnx.tensors import name_nodes, read_lazily, save_graph

BLOCKS = {"int8": 32, "int4": BLOCK}
"""Scheme → the number whose multiples a product's inputs should be. For ``int8`` it is less than the block, whose last
one is padded: 928 channels still take less time than 1024, and steps of 128 would leave most budgets without legal
widths."""


def write_quantized(source: Path, scheme: str, steps: Sequence[ir.passes.PassBase], log: Log) -> Path:
    """Write the scheme's graph (``name_quantized_file``) and its weights beside ``source``. Returns the new file.

    Inputs and outputs keep their names and shapes.

    Args:
        source: the float graph, a file of ``write_onnx``.
        scheme: its name, for the file and its metadata.
        steps: the passes that quantise.
        log: is given a record of each pass.
    """
    model = read_float(source)
    metadata = {**model.metadata_props, "quantization": scheme}
    with _hide_log():
        quantized = run_onnx(model, steps, log)
    quantized.graph.sort()
    quantized.metadata_props.update(metadata)
    return save_graph(quantized, name_quantized_file(source, scheme))


def list_evening_passes(source: Path) -> list[ir.passes.PassBase]:
    """The passes that make channels equally large before rounding. Their input is ``read_float(source)``."""
    return [
        PlainProductsPass(),
        common.RemoveUnusedNodesPass(),  # and the weights whose transposes replace them
        SmoothPass(source),
        BalancePass(),
        common.RemoveUnusedNodesPass(),
    ]


def read_float(source: Path) -> ir.Model:
    """The model in ``source``, whose weights are read when they are asked for, with a name for every node."""
    model = common.ClearMetadataAndDocStringPass()(read_lazily(source)).model
    name_nodes(model)
    return model


@contextlib.contextmanager
def _hide_log() -> Iterator[None]:
    """Disable the log of ONNX Runtime's quantisers, which has a line for every node."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
