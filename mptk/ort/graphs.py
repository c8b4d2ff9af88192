"""graphs: an ONNX graph without a cache in ONNX Runtime, by the names of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mptk.errors import MptkError
from mptk.ort.sessions import CPU, open_session


class OrtGraph:
    """One graph.

    Raises:
        MptkError: there is no such file, or ONNX Runtime refuses it.
    """

    def __init__(self, file: Path, device: torch.device = CPU) -> None:
        if not file.is_file():
            raise MptkError(f"there is no {file}; make one with `mptk export MODEL --out DIR`")
        try:
            self.session = open_session(str(file), device)
        except Exception as error:  # onnxruntime's errors have no base class
            reason = str(error).strip().split("\n")[0]
            raise MptkError(f"ONNX Runtime cannot load {file}: {reason}; export the model again") from error

    @property
    def inputs(self) -> list[str]:
        """The names of the inputs."""
        return [value.name for value in self.session.get_inputs()]

    @property
    def provider(self) -> str:
        """The execution provider that is asked first."""
        return str(self.session.get_providers()[0])

    @property
    def metadata(self) -> dict[str, str]:
        """The exporter's metadata (plan hash, versions)."""
        return dict(self.session.get_modelmeta().custom_metadata_map)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The first output for those of ``inputs`` that the graph has."""
        feeds = {name: inputs[name].cpu().contiguous().numpy() for name in self.inputs}
        return torch.from_numpy(self.session.run(None, feeds)[0])
