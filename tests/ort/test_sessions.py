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
from inside import Inside
from toy_checkpoints import SETTINGS, llama_config
from transformers import LlamaForCausalLM

import mptk
from mptk import MptkError, Samples, prune
from mptk.files.outputs import check_file
from mptk.ort.sessions import HOST, list_providers, locate_memory, open_session
from mptk.protocols.chain import Compiled, Proven, Target
from mptk.protocols.execution import find_session_device
from mptk.targets import ONNX
from mptk.testing import WORDS, save_word_model

GPU = "CUDAExecutionProvider"
Asked = list[list[tuple[str, dict[str, Any]]]]


@pytest.fixture
def everything(inside: Inside) -> None:
    """An ONNX Runtime with every provider."""
    names = ["TensorrtExecutionProvider", GPU, "CoreMLExecutionProvider", "OpenVINOExecutionProvider", HOST]
    inside.gives("onnxruntime.get_available_providers", names)


@pytest.mark.parametrize(
    ("device", "first", "options"),
    [
        ("cuda", GPU, {"device_id": 0, "use_tf32": 0}),
        ("cuda:3", GPU, {"device_id": 3, "use_tf32": 0}),
        ("mps", "CoreMLExecutionProvider", {"ModelFormat": "MLProgram", "MLComputeUnits": "CPUAndGPU"}),
        ("xpu:1", "OpenVINOExecutionProvider", {"device_type": "GPU.1", "precision": "FP32"}),
    ],
)
def test_a_device_has_its_provider_and_the_cpu_is_last(
    everything: None, device: str, first: str, options: dict[str, object]
) -> None:
    assert list_providers(torch.device(device)) == [(first, options), (HOST, {})]


def test_the_cpu_has_its_own_alone(everything: None) -> None:
    assert list_providers(torch.device("cpu")) == [(HOST, {})]


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_a_provider_that_is_not_there_is_not_asked_for(inside: Inside, device: str) -> None:
    inside.gives("onnxruntime.get_available_providers", ["AzureExecutionProvider", HOST])
    assert list_providers(torch.device(device)) == [(HOST, {})]


def test_a_command_of_onnx_runtime_alone_refuses_a_device_that_it_lacks(inside: Inside) -> None:
    there = torch.device("cuda", 0)
    inside.gives("mptk.protocols.execution.find_device", there)
    inside.gives("onnxruntime.get_available_providers", [HOST])
    with pytest.raises(MptkError, match=r"no execution provider for cuda; install .* or choose --device cpu"):
        find_session_device("cuda")
    assert find_session_device("auto") == torch.device("cpu")
    inside.gives("onnxruntime.get_available_providers", [GPU, HOST])
    assert find_session_device("cuda") == find_session_device("auto") == there


class Told:
    """A session that says that it is on a GPU."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def get_providers(self) -> Sequence[str]:
        return self.names


def test_the_cache_stays_on_a_gpu_that_runs_the_graph() -> None:
    assert locate_memory(Told(GPU, HOST), torch.device("cuda", 2)) == ("cuda", 2)  # type: ignore[arg-type]
    assert locate_memory(Told(HOST), torch.device("cuda", 2)) == ("cpu", 0)  # type: ignore[arg-type]
    assert locate_memory(Told(HOST), torch.device("cpu")) == ("cpu", 0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("runs")
    dense = save_word_model(LlamaForCausalLM(llama_config()), base / "dense")
    prune(dense, base / "out", SETTINGS)
    return base / "out"


@pytest.fixture
def asked(inside: Inside) -> Asked:
    """A GPU that exists for ONNX Runtime alone: what each session is asked for. The CPU runs it."""
    found: Asked = []
    inside.gives("onnxruntime.get_available_providers", [GPU, HOST])

    def session(make: Any, model: object, options: object, providers: list[tuple[str, dict[str, Any]]]) -> Any:
        found.append(providers)
        return make(model, options, providers=[HOST])

    inside.around("onnxruntime.InferenceSession", session)
    return found


def test_every_session_of_a_command_is_on_the_device(
    folder: Path, tmp_path: Path, asked: Asked, inside: Inside
) -> None:
    inside.gives("mptk.protocols.execution.find_device", torch.device("cuda", 1))
    inside.around("mptk.ort.roofline.torch.ones", lambda ones, n, device: torch.zeros(n))
    inside.gives("mptk.ort.bench.measure_peak_memory", 1)
    inside.bound("mptk.ort.bench.ROUND_S", 0.0)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS))
    table = tmp_path / "bench.md"
    for command in (
        ["generate", str(folder), "w1 w2", "--max-new-tokens", "2"],
        ["eval", str(folder), "--runtime", "onnx", "--data", str(text), "--length", "16", "--windows", "1"],
        ["bench", str(folder), "--lengths", "8", "--rounds", "2", "--markdown", str(table)],
    ):
        asked.clear()
        done(*command, "--device", "cuda:1")
        assert asked
        assert all(p == [(GPU, {"device_id": 1, "use_tf32": 0}), (HOST, {})] for p in asked)
    check_file(table, "table")
    assert HOST in table.read_text()  # what the session says, not what it was asked for


def test_the_proof_is_run_on_the_device_and_says_what_ran_it(
    folder: Path, tmp_path: Path, asked: Asked, inside: Inside
) -> None:
    """Programs stay on the CPU here; the target is told that the run has a GPU."""
    proven: list[dict[str, object]] = []

    def checked(
        real: Any, compiled: Compiled, targets: Sequence[Target], out: Path, windows: Samples, **how: bool
    ) -> Proven:
        dense = compiled.prepared.dense
        dense = replace(dense, executor=replace(dense.executor, device=torch.device("cuda", 1)))
        there = replace(compiled, prepared=replace(compiled.prepared, dense=dense))
        asked.clear()
        ONNX.make_checks(there, out, [])
        ONNX.compare_rounded(there, out, [windows[:1]])
        for extra in ONNX.list_extras(there, out, [windows[:1]]):
            extra.check()
        proven.extend(p[0] for p in asked)  # type: ignore[arg-type]
        return real(compiled, targets, out, windows, **how)

    inside.around("mptk.run.prune.prove_folder", checked)
    report = prune(str(folder.parent / "dense"), tmp_path / "out", replace(SETTINGS, quantize=("int8",))).report
    own, main, smoothing, int8, whole, used = proven
    assert own == int8 == whole == used == (GPU, {"device_id": 1, "use_tf32": 0})
    assert smoothing == (HOST, {}), "everywhere the same scales"
    assert main == (HOST, {}), "only its type is looked at"
    ran = {str(d["stage"]): d.get("ran") for d in report.proof}
    assert {ran.pop(stage) for stage in list(ran) if stage.startswith("ONNX Runtime")} == {HOST}
    assert set(ran.values()) == {None}
    assert [d.ran for d in mptk.verify(tmp_path / "out")].count(HOST) == 5


def test_open_session_takes_threads_and_entries(folder: Path) -> None:
    session = open_session(str(folder / "onnx" / "model.onnx"), threads=1, entries={"session.use_env_allocators": "0"})
    assert session.get_session_options().intra_op_num_threads == 1
    assert re.match(r"\w+ExecutionProvider", session.get_providers()[0])
