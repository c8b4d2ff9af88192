"""run: a list of onnx_ir's passes in order, with a record of what each changed."""

from __future__ import annotations

import time
from collections.abc import Sequence

import onnx_ir as ir

from mptk.ir.passes import Log, PassRecord
from mptk.progress import step_through


def run_onnx(model: ir.Model, passes: Sequence[ir.passes.PassBase], log: Log) -> ir.Model:
    """Apply ``passes``, each with its conditions. ``log`` is given a record of every pass that changed the graph.

    Raises:
        onnx_ir.passes.PassError: a condition of a pass does not hold.
    """
    for step in step_through(passes, _name):
        before, start = (len(model.graph), _count_weights(model)), time.perf_counter()
        result = step(model)
        model = result.model
        if result.modified:
            seconds = round(time.perf_counter() - start, 2)
            ops, parameters = zip(before, (len(model.graph), _count_weights(model)), strict=True)
            log.add(PassRecord(f"onnx: {_name(step)}", seconds, ops, parameters, changed=True))
    return model


def _name(step: ir.passes.PassBase) -> str:
    return str(getattr(step, "name", type(step).__name__))


def _count_weights(model: ir.Model) -> int:
    """Numbers in the graph's initialisers."""
    return sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value is not None)
