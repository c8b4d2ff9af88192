"""sessions: ONNX Runtime sessions, in the execution provider of a device if this ONNX Runtime has it, else on the CPU.

Numbers are computed in float32: providers that round them by default (TensorFloat-32, float16) are told not to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import onnxruntime as ort
import torch
from torch import Tensor

from mptk.errors import FileError, take_first_line

CPU = torch.device("cpu")
HALF, DTYPE = "float16", "dtype"
"""A type, and the key in a graph's metadata of the type in which it computes."""
HOST = "CPUExecutionProvider"
"""The provider that every ONNX Runtime has, and that takes the nodes that another one lacks."""
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""The entry of a session's configuration that says where the weights of a graph given as bytes are."""

CACHE_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
"""ONNX Runtime's name of a cache's type → torch's."""

Provider = tuple[str, dict[str, str | int]]
"""Name and options, as ``InferenceSession`` takes them."""

OF_DEVICE: dict[str, Callable[[int], Provider]] = {
    "cuda": lambda index: ("CUDAExecutionProvider", {"device_id": index, "use_tf32": 0}),
    "mps": lambda _: ("CoreMLExecutionProvider", {"ModelFormat": "MLProgram", "MLComputeUnits": "CPUAndGPU"}),
    "xpu": lambda index: ("OpenVINOExecutionProvider", {"device_type": f"GPU.{index}", "precision": "FP32"}),
}
"""Type of a device → the execution provider of its n-th one, told to compute in float32."""


def list_providers(device: torch.device, available: Collection[str] | None = None) -> list[Provider]:
    """The execution providers for a session on ``device``: the device's own, if it is there, and the CPU's last.

    available: names of providers to choose from; default: the providers of this ONNX Runtime.
    """
    available = ort.get_available_providers() if available is None else available
    found = [OF_DEVICE[device.type](device.index or 0)] if device.type in OF_DEVICE else []
    return [own for own in found if own[0] in available] + [(HOST, {})]


def open_session(
    model: str | bytes,
    device: torch.device = CPU,
    *,
    threads: int = 0,
    entries: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """A session for ``model`` (a file, or a graph's bytes) on ``device``.

    ``threads``: of one operator; 0: one for each core. ``entries``: of the session's configuration. The session's
    ``get_providers`` says what was taken. Raises what ONNX Runtime raises.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # an error is raised, and printing it too would say it twice
    for name, value in (entries or {}).items():
        options.add_session_config_entry(name, value)
    return ort.InferenceSession(model, options, providers=list_providers(device))


def open_file(file: Path, device: torch.device, threads: int = 0) -> ort.InferenceSession:
    """``open_session`` for a graph of a folder. Raises MptkError if ONNX Runtime refuses it."""
    try:
        return open_session(str(file), device, threads=threads)
    except Exception as error:  # onnxruntime's errors have no base class
        raise FileError(
            f"ONNX Runtime cannot load {file}: {take_first_line(error)}; export the model again", name=file
        ) from error


def locate_memory(session: ort.InferenceSession, device: torch.device) -> tuple[str, int]:
    """Where the session's own values can stay from run to run: the device's type and index, or the CPU's."""
    there = device.type == "cuda" and "CUDAExecutionProvider" in session.get_providers()
    return ("cuda", device.index or 0) if there else ("cpu", 0)


class OrtGraph:
    """One graph.

    Raises:
        MptkError: there is no such file, or ONNX Runtime refuses it.
    """

    def __init__(self, file: Path, device: torch.device = CPU) -> None:
        if not file.is_file():
            raise FileError(f"there is no {file}; make one with `mptk export MODEL --out DIR`", name=file)
        self.session = open_file(file, device)

    @property
    def inputs(self) -> list[str]:
        """The names of the inputs."""
        return [value.name for value in self.session.get_inputs()]

    @property
    def several(self) -> bool:
        """Whether there is more than one output."""
        return len(self.session.get_outputs()) > 1

    @property
    def providers(self) -> list[str]:
        """The execution providers that run it, the one that is asked first coming first."""
        return list(self.session.get_providers())

    @property
    def half(self) -> bool:
        """Whether it computes in float16, by its metadata."""
        return self.metadata.get(DTYPE) == HALF

    @property
    def metadata(self) -> dict[str, str]:
        """The exporter's metadata (plan hash, versions)."""
        return dict(self.session.get_modelmeta().custom_metadata_map)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The first output. ``inputs`` that the graph does not have are ignored."""
        return self.run_all(inputs)[0]

    def make_empty(self, prefix: str, rows: int) -> dict[str, Tensor]:
        """An empty cache: the inputs with this prefix, each [rows, heads, 0, dim]."""
        return {
            value.name: torch.zeros(rows, value.shape[1], 0, value.shape[3], dtype=CACHE_TYPES[value.type])
            for value in self.session.get_inputs()
            if value.name.startswith(prefix)
        }

    def run_all(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Every output, in order."""
        feeds = {name: inputs[name].cpu().contiguous().numpy() for name in self.inputs}
        return [torch.from_numpy(output) for output in self.session.run(None, feeds)]
