"""ONNX Runtime runs in the execution provider of the device that is asked for, if it has one, and says which."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from toy_checkpoints import SETTINGS, WORDS, llama_config, save
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import mptk
from mptk import prune
from mptk.cli.main import app
from mptk.errors import MptkError
from mptk.ir.samples import Samples
from mptk.ort import sessions
from mptk.ort.sessions import HOST, memory_of, open_session, providers
from mptk.proof.proof import prove_folder
from mptk.protocols.chain import Compiled, Proven, Target
from mptk.protocols.execution import session_device
from mptk.targets import ONNX

GPU = "CUDAExecutionProvider"
Asked = list[list[tuple[str, dict[str, Any]]]]


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ONNX Runtime with every provider."""
    names = ["TensorrtExecutionProvider", GPU, "CoreMLExecutionProvider", "OpenVINOExecutionProvider", HOST]
    monkeypatch.setattr(ort, "get_available_providers", lambda: names)


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
    assert providers(torch.device(device)) == [(first, options), (HOST, {})]


def test_the_cpu_has_its_own_alone(everything: None) -> None:
    assert providers(torch.device("cpu")) == [(HOST, {})]


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu"])
def test_a_provider_that_is_not_there_is_not_asked_for(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["AzureExecutionProvider", HOST])
    assert providers(torch.device(device)) == [(HOST, {})]


def test_a_command_of_onnx_runtime_alone_refuses_a_device_that_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.device("cuda", 0)
    monkeypatch.setattr("mptk.protocols.execution.find_device", lambda _: there)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [HOST])
    with pytest.raises(MptkError, match=r"no execution provider for cuda; install .* or choose --device cpu"):
        session_device("cuda")
    assert session_device("auto") == torch.device("cpu")
    monkeypatch.setattr(ort, "get_available_providers", lambda: [GPU, HOST])
    assert session_device("cuda") == session_device("auto") == there


class Told:
    """A session that says that it is on a GPU."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def get_providers(self) -> Sequence[str]:
        return self.names


def test_the_cache_stays_on_a_gpu_that_runs_the_graph() -> None:
    assert memory_of(Told(GPU, HOST), torch.device("cuda", 2)) == ("cuda", 2)  # type: ignore[arg-type]
    assert memory_of(Told(HOST), torch.device("cuda", 2)) == ("cpu", 0)  # type: ignore[arg-type]
    assert memory_of(Told(HOST), torch.device("cpu")) == ("cpu", 0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("runs")
    dense = save(LlamaForCausalLM(llama_config()), base / "dense")
    prune(dense, base / "out", SETTINGS)
    return base / "out"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """A GPU that exists for ONNX Runtime alone: what each session is asked for. The CPU runs it."""
    found: Asked = []
    monkeypatch.setattr(ort, "get_available_providers", lambda: [GPU, HOST])
    make = ort.InferenceSession

    def session(model: object, options: object, providers: list[tuple[str, dict[str, Any]]]) -> ort.InferenceSession:
        found.append(providers)
        return make(model, options, providers=[HOST])

    monkeypatch.setattr(sessions.ort, "InferenceSession", session)
    return found


def test_every_session_of_a_command_is_on_the_device(
    folder: Path, tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mptk.protocols.execution.find_device", lambda _: torch.device("cuda", 1))
    monkeypatch.setattr("mptk.ort.roofline.torch.ones", lambda n, device: torch.zeros(n))
    monkeypatch.setattr("mptk.ort.bench.peak_memory", lambda *_: 1)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(WORDS))
    table = tmp_path / "bench.md"
    for command in (
        ["generate", str(folder), "w1 w2", "--max-new-tokens", "2"],
        ["eval", str(folder), "--runtime", "onnx", "--data", str(text), "--length", "16", "--windows", "1"],
        ["bench", str(folder), "--lengths", "8", "--rounds", "2", "--markdown", str(table)],
    ):
        asked.clear()
        result = CliRunner().invoke(app, [*command, "--device", "cuda:1"])
        assert result.exit_code == 0, result.output
        assert asked
        assert all(p == [(GPU, {"device_id": 1, "use_tf32": 0}), (HOST, {})] for p in asked)
    assert f"- ran in {HOST}" in table.read_text()  # what the session says, not what it was asked for


def test_the_proof_is_run_on_the_device_and_says_what_ran_it(
    folder: Path, tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs stay on the CPU here; the target is told that the run has a GPU."""
    proven: list[dict[str, object]] = []

    def checked(compiled: Compiled, targets: Sequence[Target], out: Path, windows: Samples, **how: bool) -> Proven:
        executor = replace(compiled.prepared.executor, device=torch.device("cuda", 1))
        there = replace(compiled, prepared=replace(compiled.prepared, executor=executor))
        asked.clear()
        ONNX.checks(there, out, [])
        ONNX.rounded(there, out, [windows[:1]])
        for extra in ONNX.extras(there, out, [windows[:1]]):
            extra.check()
        proven.extend(p[0] for p in asked)  # type: ignore[arg-type]
        return prove_folder(compiled, targets, out, windows, **how)

    monkeypatch.setattr("mptk.chain.prune.prove_folder", checked)
    report = prune(str(folder.parent / "dense"), tmp_path / "out", replace(SETTINGS, quantize=("int8",))).report
    own, main, smoothing, int8, whole = proven
    assert own == int8 == whole == (GPU, {"device_id": 1, "use_tf32": 0})
    assert smoothing == (HOST, {}), "everywhere the same scales"
    assert main == (HOST, {}), "only its type is looked at"
    assert report is not None
    ran = {str(d["stage"]): d.get("ran") for d in report.proof}
    assert {ran.pop(stage) for stage in list(ran) if stage.startswith("ONNX Runtime")} == {HOST}
    assert set(ran.values()) == {None}
    assert [d.ran for d in mptk.verify(tmp_path / "out")].count(HOST) == 4


def test_open_session_takes_threads_and_entries(folder: Path) -> None:
    session = open_session(str(folder / "onnx" / "model.onnx"), threads=1, entries={"session.use_env_allocators": "0"})
    assert session.get_session_options().intra_op_num_threads == 1
    assert re.match(r"\w+ExecutionProvider", session.get_providers()[0])
