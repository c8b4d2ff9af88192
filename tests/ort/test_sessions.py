"""ONNX Runtime runs in the execution provider of the device that is asked for, if it has one, and says which.

It reaches for mptk.ort.sessions and mptk.targets: no machine has all providers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import done

import mptk
from mptk import Samples
from mptk.errors import MachineError
from mptk.ort.sessions import HOST, list_providers, locate_memory, open_session
from mptk.protocols import Compiled, Proven, find_session_device
from mptk.targets import ONNX
from mptk.testing import expect_error

GPU = "CUDAExecutionProvider"
THERE = torch.device("cuda", 1)
Asked = list[list[tuple[str, dict[str, Any]]]]
EVERYTHING = ("TensorrtExecutionProvider", GPU, "CoreMLExecutionProvider", "OpenVINOExecutionProvider", HOST)


@pytest.mark.parametrize(
    ("device", "first", "options"),
    [
        ("cuda", GPU, {"device_id": 0, "use_tf32": 0}),
        ("cuda:3", GPU, {"device_id": 3, "use_tf32": 0}),
        ("mps", "CoreMLExecutionProvider", {"ModelFormat": "MLProgram", "MLComputeUnits": "CPUAndGPU"}),
        ("xpu:1", "OpenVINOExecutionProvider", {"device_type": "GPU.1", "precision": "FP32"}),
    ],
)
def test_a_device_has_its_provider_if_it_is_there(device, first, options):
    assert list_providers(torch.device(device), EVERYTHING) == [(first, options), (HOST, {})]
    assert list_providers(torch.device(device), ["AzureExecutionProvider", HOST]) == [(HOST, {})]
    assert list_providers(torch.device("cpu"), EVERYTHING) == [(HOST, {})]


class Told(tuple):
    """A session that says that it is on a GPU."""

    def get_providers(self) -> Sequence[str]:
        return self


def test_the_cache_stays_on_a_gpu_that_runs_the_graph():
    assert locate_memory(Told([GPU, HOST]), torch.device("cuda", 2)) == ("cuda", 2)
    assert locate_memory(Told([HOST]), torch.device("cuda", 2)) == ("cpu", 0)
    assert locate_memory(Told([HOST]), torch.device("cpu")) == ("cpu", 0)


@pytest.fixture
def providers(inside):
    """What ONNX Runtime says that it has."""
    there = [GPU, HOST]
    inside.gives("onnxruntime.get_available_providers", there)
    return there


@pytest.fixture
def asked(providers, inside):
    """A GPU that exists only for ONNX Runtime: what each session is asked for. The CPU runs it."""
    found: Asked = []

    def session(make: Any, model: object, options: object, providers: list[tuple[str, dict[str, Any]]]) -> Any:
        found.append(providers)
        return make(model, options, providers=[HOST])

    inside.around("onnxruntime.InferenceSession", session)
    return found


@pytest.fixture
def machine(asked, inside):
    """A GPU that is torch's first device, too."""
    inside.gives("mptk.protocols.execution.find_device", THERE)


@pytest.fixture(scope="module")
def folder(laboratory):
    return laboratory.open_pruned()


@pytest.mark.usefixtures("machine")
def test_a_device_without_a_provider_is_refused(providers):
    assert find_session_device("cuda") == find_session_device("auto") == THERE
    providers.remove(GPU)
    with expect_error(MachineError, name="device"):
        find_session_device("cuda")
    assert find_session_device("auto") == torch.device("cpu")


@pytest.mark.usefixtures("machine", "quick_bench")
def test_every_session_is_on_the_device(folder, laboratory, asked, inside):
    short = ("--length", "16", "--windows", "1")
    inside.around("mptk.ort.bench.Roofline", lambda real, threads, _: real(threads))
    for words in (
        ("generate", folder, "w1 w2", "--max-new-tokens", "2"),
        ("eval", folder, "--runtime", "onnx", "--data", laboratory.open_data(), *short),
    ):
        asked.clear()
        done(*words, "--device", "cuda:1")
        assert asked
        assert all(p == [(GPU, {"device_id": 1, "use_tf32": 0}), (HOST, {})] for p in asked)
    asked.clear()
    result = mptk.bench([folder], lengths=[8], rounds=2, sessions=1, device="cuda:1")
    assert asked.pop(0) == [(HOST, {})], "the peaks, here"
    assert all(p == [(GPU, {"device_id": 1, "use_tf32": 0}), (HOST, {})] for p in asked)
    assert result.providers == [HOST], "what the session says, not what it was asked for"


def test_the_proof_says_what_ran_it(laboratory, tmp_path, asked, inside):
    """Programs stay on the CPU here; the target is told that the run has a GPU."""
    proven: list[dict[str, object]] = []

    def checked(real: Any, compiled: Compiled, targets: Any, out: Path, windows: Samples, **how: bool) -> Proven:
        dense = compiled.prepared.dense
        dense = replace(dense, executor=replace(dense.executor, device=THERE))
        there = replace(compiled, prepared=replace(compiled.prepared, dense=dense))
        asked.clear()
        ONNX.make_checks(there, out, [])
        ONNX.compare_rounded(there, out, [windows[:1]])
        for extra in ONNX.list_extras(there, out, [windows[:1]]):
            extra.check()
        proven.extend(p[0] for p in asked)
        return real(compiled, targets, out, windows, **how)

    inside.around("mptk.run.prune.prove_folder", checked)
    out = laboratory.prune("decoder", tmp_path / "out", method="magnitude", onnx=True, quantize=("int8",))
    own, main, smoothing, int8, whole, used = proven
    assert own == int8 == whole == used == (GPU, {"device_id": 1, "use_tf32": 0})
    assert smoothing == (HOST, {}), "everywhere the same scales"
    assert main == (HOST, {}), "only its type is looked at"
    ran = {str(d["stage"]): d.get("ran") for d in mptk.Report.read(out).proof}
    assert {ran.pop(stage) for stage in list(ran) if stage.startswith("ONNX Runtime")} == {HOST}
    assert set(ran.values()) == {None}


def test_open_session_takes_threads_and_entries(folder):
    session = open_session(str(folder / "onnx" / "model.onnx"), threads=1, entries={"session.use_env_allocators": "0"})
    assert session.get_session_options().intra_op_num_threads == 1
    assert re.match(r"\w+ExecutionProvider", session.get_providers()[0])
