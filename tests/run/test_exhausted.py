"""Out of memory and a full disk are one line, whichever library says so and wherever it happens.

It reaches for mptk.errors and passes.verify: an error of each library is raised on purpose.
"""

from __future__ import annotations

import errno
import gc
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

import mptk
from mptk import trace
from mptk.errors import FileError, InputError, MachineError, MptkError, OutputError, explain_errors
from mptk.ir import make_token_samples
from mptk.publish.manifest import check_manifest, hash_weight_files
from mptk.testing import expect_error
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


@pytest.mark.parametrize(
    "run",
    [lambda: torch.empty(TOO_MANY), lambda: np.empty(TOO_MANY), lambda: bytearray(10**16), no_memory_in_onnxruntime],
)
def test_out_of_memory(run):
    with expect_error(MachineError) as refused, explain_errors():
        run()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), ""),
        (Exception("I/O error: Cannot allocate memory (os error 12)"), ""),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 79 GiB.\n"), ""),
        (OSError(errno.ENOSPC, "No space left on device", "/somewhere/x"), "/somewhere/x"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ""),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), ""),
        (OSError(errno.EROFS, "Read-only file system", "/somewhere/x"), "/somewhere/x"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/somewhere/x"), ""),
        (OSError(errno.ENFILE, os.strerror(errno.ENFILE)), ""),
        (RuntimeError("unable to open file <x.safetensors> in read-only mode: Too many open files (24)"), ""),
        (ImportError("libx.so: cannot open shared object file: Too many open files"), ""),
        (OutputError("cannot write out: Too many open files; check its folder, or give another place"), ""),
    ],
)
def test_what_a_library_says_of_the_machine_is_known(error, name):
    with expect_error(MachineError, name=name), explain_errors():
        raise error


def test_other_errors_stay_as_they_are():
    others = RuntimeError("size mismatch"), OSError(errno.ENOENT, "No such file"), InputError("no such model; see")
    for error in others:
        with pytest.raises(type(error)) as raised, explain_errors():
            raise error
        assert raised.value is error


def test_a_message_that_names_the_place_is_kept_and_one_that_hides_the_memory_is_not():
    def wrap(cause: Exception) -> None:
        try:
            raise cause
        except Exception as error:
            raise FileError("cannot load or write model; check the model", name="model") from error

    with expect_error(FileError, name="model"), explain_errors():
        wrap(OSError(errno.ENOSPC, "No space left on device"))
    with expect_error(MachineError), explain_errors():
        wrap(MemoryError())


def test_the_proof_does_not_take_it_for_a_wrong_result():
    batch = make_token_samples(torch.zeros(1, 3, dtype=torch.int64))
    masked = trace(torch.nn.Embedding(7, 5), batch.tensors)
    with expect_error(MachineError):
        prove(masked, {"stage": (lambda batch: torch.empty(TOO_MANY), 1e-3)}, batch)


# ---- what the kernel really refuses ----


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


@pytest.mark.parametrize("number", [1, 15])
def test_a_command_that_may_open_few_files_is_refused_before_it_writes_any(number, laboratory, tmp_path, run_words):
    model, out = laboratory.open_model(), tmp_path / "out"
    with free_descriptors(number):
        code = run_words("prune", model, "--method", "magnitude", "--sparsity", "0.1", "--out", out)
        with expect_error(MachineError):
            mptk.prune(model, method="magnitude", sparsity=0.1, out=out)
    assert code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [100, 20_000])
def test_a_run_that_fills_the_disk_keeps_its_stages_and_the_earlier_output(limit, laboratory, tmp_path):
    """At its first file, and at the result's weights. With more room it goes on."""
    model, out = str(laboratory.open_model()), laboratory.copy(laboratory.open_recovered(), tmp_path / "out")
    settings, earlier = laboratory.make_settings(method="magnitude", resume=True), hash_weight_files(out)
    ran: list[str] = []
    with limited(resource.RLIMIT_FSIZE, limit), pytest.raises(MptkError) as refused:
        mptk.prune(model, out, settings)
    assert isinstance(refused.value, MachineError | OutputError)
    assert hash_weight_files(out) == earlier
    check_manifest(out)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.run"}
    if limit > 100:
        mptk.prune(model, out, settings, on_stage=lambda record: ran.append(record.name))
        assert "choose widths" not in ran
        assert hash_weight_files(out) != earlier
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
