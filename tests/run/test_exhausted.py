"""Out of memory and a full disk are one line, whichever library says so and wherever it happens.

It reaches for mptk.errors and passes.verify: an error of each library is raised on purpose.
"""

from __future__ import annotations

import errno
import gc
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from inside import Inside
from onnx import TensorProto, helper
from test_cli import surroundings  # noqa: F401 (a fixture)

import mptk
from mptk import MptkError, trace
from mptk.errors import MachineError, explain_errors
from mptk.ir.samples import make_token_samples
from mptk.testing import SENTENCES, make_llama, save_model
from passes.verify import prove

TOO_MANY = 10**14


def no_memory_in_onnxruntime() -> None:
    shape, made = (
        helper.make_tensor_value_info("s", TensorProto.INT64, [1]),
        helper.make_tensor_value_info("y", 1, None),
    )
    graph = helper.make_graph([helper.make_node("ConstantOfShape", ["s"], ["y"])], "huge", [shape], [made])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    ort.InferenceSession(model.SerializeToString()).run(None, {"s": np.array([TOO_MANY])})


def failing(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("run", "amount"),
    [
        (lambda: torch.empty(TOO_MANY), " (4e+05 GB more were asked for)"),
        (lambda: np.empty(TOO_MANY), " (728 TiB more were asked for)"),
        (lambda: bytearray(10**16), ""),
        (no_memory_in_onnxruntime, " (4e+05 GB more were asked for)"),
        (failing(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))), ""),
        (failing(Exception("I/O error: Cannot allocate memory (os error 12)")), ""),
    ],
)
def test_out_of_memory(run: Callable[[], object], amount: str) -> None:
    with pytest.raises(MachineError) as raised, explain_errors():
        run()
    assert str(raised.value).startswith(f"out of memory{amount}; free some, or lower --length")
    assert "\n" not in str(raised.value)


def test_a_device_is_named() -> None:
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 79 GiB, of which 1 is free.\n"
    )
    with (
        pytest.raises(MachineError, match=r"^the CUDA device is out of memory \(2.5 GiB more were asked for\); "),
        explain_errors(),
    ):
        raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/somewhere/x"), r"^the disk is full \(/somewhere/x\); free"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "^the disk quota is used up; free"),
        (
            Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
            "^the disk is full; free",
        ),
    ],
)
def test_a_full_disk(error: Exception, said: str) -> None:
    with pytest.raises(MachineError, match=said), explain_errors():
        raise error


TOO_MANY_FILES = "too many open files; let the process open more, as with `ulimit -n 4096`, and try again"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/somewhere/x"),
        OSError(errno.ENFILE, os.strerror(errno.ENFILE)),
        RuntimeError("unable to open file <model.safetensors> in read-only mode: Too many open files (24)"),
        ImportError("libx.so: cannot open shared object file: Too many open files"),
        MptkError("cannot write out: Too many open files; check its folder, or give another place"),
    ],
)
def test_too_many_open_files(error: Exception) -> None:
    with pytest.raises(MachineError) as raised, explain_errors():
        raise error
    assert str(raised.value) == TOO_MANY_FILES


@contextmanager
def limited(kind: int, limit: int) -> Iterator[None]:
    """Within it the kernel gives this process no more than ``limit`` of something."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


@contextmanager
def free_descriptors(number: int) -> Iterator[None]:
    """Within it this process may open only ``number`` more files."""
    gc.collect()  # a file that garbage holds would be closed within, and leave more
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(number + 1)]
    for descriptor in taken:
        os.close(descriptor)
    with limited(resource.RLIMIT_NOFILE, taken[number]):
        yield


@pytest.mark.parametrize("number", [1, 2, 15])
def test_a_command_that_may_open_few_files_is_refused_before_it_writes_any(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], typed: Callable[..., int]
) -> None:
    save_model(make_llama(), tmp_path / "model")
    out, before, _ = tmp_path / "out", sorted(tmp_path.rglob("*")), capsys.readouterr()
    with free_descriptors(number):
        code = typed("prune", tmp_path / "model", "--method", "magnitude", "--sparsity", "0.1", "--out", out)
        with pytest.raises(MachineError, match=r"^too many open files"):
            mptk.prune(tmp_path / "model", method="magnitude", sparsity=0.1, out=out)
    assert (code, capsys.readouterr().err) == (1, f"error: {TOO_MANY_FILES}\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_other_errors_stay_as_they_are() -> None:
    for error in (
        RuntimeError("size mismatch"),
        OSError(errno.ENOENT, "No such file"),
        MptkError("no such model; see"),
    ):
        with pytest.raises(type(error)) as raised, explain_errors():
            raise error
        assert raised.value is error


def test_a_message_that_names_the_place_is_kept_and_one_that_hides_the_memory_is_not() -> None:
    def wrapped(cause: Exception) -> None:
        try:
            raise cause
        except Exception as error:
            raise MptkError("cannot load or write model; check the model") from error

    with pytest.raises(MptkError, match=r"^cannot load"), explain_errors():
        wrapped(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(MachineError, match=r"^out of memory"), explain_errors():
        wrapped(MemoryError())


def test_the_proof_does_not_take_it_for_a_wrong_result() -> None:
    batch = make_token_samples(torch.zeros(1, 3, dtype=torch.int64))
    masked = trace(torch.nn.Embedding(7, 5), batch.tensors)
    with pytest.raises(MachineError, match="out of memory"):
        prove(masked, {"stage": (lambda batch: torch.empty(TOO_MANY), 1e-3)}, batch)


def test_the_command_line_prints_one_line(
    capsys: pytest.CaptureFixture[str], inside: Inside, typed: Callable[..., int]
) -> None:
    inside.around("mptk.io.models.build_skeleton", lambda *_, **__: torch.empty(TOO_MANY))
    assert typed("show", "anything") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "0 s  " not in line]
    assert line.startswith("error: out of memory (4e+05 GB more were asked for); ")


def test_a_run_that_fills_the_disk_ends_with_one_line_and_keeps_its_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: Callable[..., int]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(make_llama(), tmp_path / "model")
    (tmp_path / "text").write_text(SENTENCES)
    short = "--samples 2 --length 32 --eval-windows 2 --eval-length 32 --align 8 --data text --no-onnx"
    with limited(resource.RLIMIT_FSIZE, 20_000):
        code = typed("prune", "model", "--method", "magnitude", "--out", "out", *short.split())
    said = capsys.readouterr().err
    assert code == 1, said
    (line,) = [line for line in said.splitlines() if " s  " not in line]
    assert (
        line
        == f"error: cannot write {tmp_path / 'out'}: File too large; free some space, or give a place on another disk"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.run", "text"]
