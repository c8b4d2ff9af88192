"""fixed: seconds that stages of a run take however little they do. It imports nothing heavy.

They bound a run's time from below, so that too few minutes are refused before torch is imported.
"""

from __future__ import annotations

START_S = 6.0
"""Seconds of imports."""
TRACE_S = 0.3
"""Seconds of trace, analysis and legal widths for each layer."""
TRAINING_START_S = 0.7
"""Seconds for each layer to make and place the models that are trained, and to store their initial state."""
PROVE_S = 0.5
"""Seconds for each layer to load and trace what was written."""
ONNX_S = 0.9
"""Seconds for each layer to write ONNX, besides the disk's."""


def sum_fixed_seconds(layers: int, *, trains: bool, onnx: bool) -> float:
    """Seconds that a run on a model of ``layers`` layers takes even if computing took no time."""
    return START_S + layers * (TRACE_S + PROVE_S + TRAINING_START_S * trains + ONNX_S * onnx)
