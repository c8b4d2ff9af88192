"""roofline: measure the machine's peaks (Williams et al. 2009): of a matrix product, and of reading memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto, helper

from mptk.ort.decoder import OrtDecoder
from mptk.ort.sessions import CPU, open_session

SIDE = 1024
"""Side of the matrices. Three of them take 12 MB, which a cache holds."""
READ_BYTES = 512 << 20
"""Bytes of one read: far more than a cache holds."""


@dataclass(frozen=True)
class Peaks:
    """``flops``: operations a second of a float32 matrix product. ``bandwidth``: bytes read from memory a second."""

    flops: float
    bandwidth: float


class Roofline:
    """The highest peaks of all calls of ``measure``, with ``threads`` threads (0: one for each core), on ``device``.

    ONNX Runtime computes the product, since it runs the graphs; torch sums over the memory.
    """

    def __init__(self, threads: int, device: torch.device = CPU) -> None:
        self.threads = threads
        session = open_session(_product(), device, threads=threads)
        feeds = dict.fromkeys(("left", "right"), np.ones((SIDE, SIDE), dtype=np.float32))
        self._multiply = lambda: session.run(None, feeds)
        self._memory = torch.ones(READ_BYTES // 4, device=device)
        self.peaks = Peaks(0.0, 0.0)
        self.measure()

    def measure(self) -> None:
        """Measure once more; takes a fraction of a second."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            bandwidth = READ_BYTES / _seconds(lambda: self._memory.sum().item())
        finally:
            torch.set_num_threads(before)
        flops = 2 * SIDE**3 / _seconds(self._multiply)
        self.peaks = Peaks(max(self.peaks.flops, flops), max(self.peaks.bandwidth, bandwidth))


def peak_memory(file: Path, length: int, device: torch.device = CPU) -> int:
    """Peak growth in bytes of a new process that loads ``file`` and runs a prompt of ``length`` tokens on ``device``.

    A device's own memory is not counted.

    Unlike ``multiprocessing``, it does not import the caller's script again.
    """
    code = "import sys; from pathlib import Path; from {} import grown; print(grown(Path(sys.argv[1]), {}, {!r}))"
    command = [sys.executable, "-c", code.format(__name__, length, str(device)), str(file.resolve())]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def grown(file: Path, length: int, device: str) -> int:
    """What ``peak_memory`` says of a new process, of this one."""
    before = _resident("VmRSS")
    OrtDecoder(file, threads=1, device=torch.device(device)).prefill(np.zeros((1, length), dtype=np.int64))
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """Resident memory of this process in bytes, now (``VmRSS``) or at its peak (``VmHWM``). Linux only, else 0."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _product() -> bytes:
    names = ("left", "right", "product")
    left, right, product = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIDE, SIDE]) for name in names)
    graph = helper.make_graph([helper.make_node("MatMul", names[:2], names[2:])], "product", [left, right], [product])
    opset = [helper.make_opsetid("", 21)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString())
