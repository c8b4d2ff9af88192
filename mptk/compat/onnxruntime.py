"""onnxruntime: run a session on its own tensors, and import a quantiser that sets up logging."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType

import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import OrtValueVector

ACCURACY_LEVEL = 4
"""MatMulNBits multiplies in int8. Level 0 would unpack the weights to float32 first, which is 40 times slower in
decode."""


def run_on_values(
    session: ort.InferenceSession,
    feeds: Mapping[str, ort.OrtValue],
    outputs: Sequence[str],
    places: Sequence[tuple[str, int]] | None = None,
) -> list[ort.OrtValue]:
    """Run ``session`` on ``feeds`` (input name → tensor); returns the tensors of ``outputs``, in order.

    ``places``: the device of each output, as (type, index); by default the CPU.
    """
    # The public ``run_with_ort_values``, which takes a dict, is 0.2 ms slower for a cache of 60 tensors. A decoder pays
    # that at each token.
    given, made = OrtValueVector(), OrtValueVector()
    for value in feeds.values():
        given.push_back(value._get_c_value())
    made_at = {place: ort.OrtDevice.make(*place)._get_c_device() for place in {("cpu", 0), *(places or ())}}
    devices = [made_at[place] for place in places or [("cpu", 0)] * len(outputs)]
    session.run_with_ortvaluevector(ort.RunOptions(), list(feeds), given, list(outputs), made, devices)
    return [ort.OrtValue(value) for value in made]


def import_matmul_quantizer() -> ModuleType:
    """The module ``onnxruntime.quantization.matmul_nbits_quantizer``, imported without its change of logging."""
    # Its import calls ``logging.basicConfig``, which adds a handler to the process and changes the level. If it stops
    # that, a plain import will do.
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        return importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
