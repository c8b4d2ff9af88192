"""Damage to a constant of an ONNX graph on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from passes.targets.onnx.names import data_file

Damage = Callable[[np.ndarray], np.ndarray]


def damaged(file: Path, ending: str, damage: Damage) -> Path:
    """The graph with one constant, whose name has ``ending``, damaged."""
    model = ir.load(file)
    ir.external_data.load_to_model(model)
    name = next(n for n in model.graph.initializers if n.endswith(ending))
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array = damage(value.const_value.numpy())
    assert array.shape == tuple(value.const_value.shape.numpy())
    value.const_value = ir.Tensor(np.ascontiguousarray(array), name=name)
    ir.save(model, file, external_data=data_file(file.name))
    return file


def garbage_block(codes: np.ndarray) -> np.ndarray:
    """The first block of one output holds noise."""
    codes = codes.copy()
    codes[3, 0] = np.random.default_rng(0).integers(0, 256, codes[3, 0].shape)
    return codes


def one_code(codes: np.ndarray) -> np.ndarray:
    """One code is one off: one byte of a file."""
    codes = codes.copy()
    codes[3, 0, 5] ^= 1
    return codes
