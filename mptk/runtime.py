"""runtime: a decoder in ONNX Runtime, its KV cache bound in place from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from mptk.errors import MptkError

FILE = "model.onnx"
Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Cache:
    """What a step leaves for the next: each layer's keys and values in the runtime's own memory.

    ``length``: positions held. ``mask``: [batch, length], 1 for a token and 0 for padding.
    """

    values: Mapping[str, ort.OrtValue]
    mask: Ids

    @property
    def length(self) -> int:
        return int(self.mask.shape[1])


class OrtDecoder:
    """An ONNX decoder with the inputs and outputs of ``passes/emit_onnx.py``, on the CPU.

    Args:
        path: a folder with ``model.onnx``, or the file.
        threads: threads of one operator; 0: as many as there are cores.

    Raises:
        MptkError: there is no such file, or it is not a decoder with a KV cache.
    """

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        file = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise MptkError(f"there is no {file}; export the model to ONNX first")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.past = [name for name in self.inputs if name.startswith("past_key_values.")]
        if not self.past or "input_ids" not in self.inputs:
            raise MptkError(f"{file} is no decoder with a KV cache: its inputs are {', '.join(self.inputs)}")
        self.presents = [name.replace("past_key_values", "present") for name in self.past]

    def prefill(self, ids: Ids, mask: Ids | None = None) -> tuple[Logits, Cache]:
        """Run a prompt. ``ids`` [batch, sequence]; ``mask`` the same shape, 0 for padding on either side.

        Returns the logits, [batch, sequence or 1, vocab], and the cache.
        """
        mask = np.ones_like(ids) if mask is None else mask
        return self._run(ids, mask, self.empty(len(ids)))

    def decode(self, ids: Ids, cache: Cache) -> tuple[Logits, Cache]:
        """Run the next tokens, [batch, n], after what is in ``cache``."""
        mask = np.concatenate([cache.mask, np.ones_like(ids)], axis=1)
        return self._run(ids, mask, cache)

    def logits(self, ids: Ids) -> Logits:
        """Logits of whole sequences without padding: [batch, sequence or 1, vocab]."""
        return self.prefill(ids)[0]

    def empty(self, batch: int) -> Cache:
        """A cache of no positions."""
        values = {name: _zeros(self._past_shape(name, batch, 0)) for name in self.past}
        return Cache(values, np.ones((batch, 0), dtype=np.int64))

    def filled(self, batch: int, length: int, seed: int = 0) -> Cache:
        """A cache of ``length`` random positions: a decoding step costs the same whatever it holds."""
        rng = np.random.default_rng(seed)
        values = {}
        for name in self.past:
            shape = self._past_shape(name, batch, length)
            values[name] = ort.OrtValue.ortvalue_from_numpy(rng.standard_normal(shape, dtype=np.float32))
        return Cache(values, np.ones((batch, length), dtype=np.int64))

    def binding(self, ids: Ids, mask: Ids, cache: Cache) -> Any:
        """Inputs and outputs bound for one step: the cache without a copy, the results in the runtime's memory."""
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        binding.bind_cpu_input("attention_mask", np.ascontiguousarray(mask))
        if "position_ids" in self.inputs:
            positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -ids.shape[1] :]
            binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        for name, value in cache.values.items():
            binding.bind_ortvalue_input(name, value)
        for name in ("logits", *self.presents):
            binding.bind_output(name, "cpu")
        return binding

    def _run(self, ids: Ids, mask: Ids, cache: Cache) -> tuple[Logits, Cache]:
        binding = self.binding(ids, mask, cache)
        self.session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        return logits.numpy(), Cache(dict(zip(self.past, present, strict=True)), mask)

    def _past_shape(self, name: str, batch: int, length: int) -> tuple[int, int, int, int]:
        _, heads, _, dim = self.inputs[name].shape
        return batch, int(heads), length, int(dim)


def _zeros(shape: tuple[int, ...]) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=np.float32))
