"""A trace that takes too long is stopped, and a plain module is then traced with only its batch size open."""

from __future__ import annotations

import signal
import threading

import pytest
import torch
from torch import Tensor, nn

from mptk.compile.trace import trace_module
from mptk.errors import DataError
from mptk.io import open_live
from mptk.ir import Samples
from mptk.testing import expect_error
from passes.frontend.bound import Late, limit_processor_time


def busy(*, swallows: bool = False) -> None:
    """Computes without end; it may go on after whatever Exception it meets."""
    while True:
        try:
            sum(range(1000))
        except Exception:
            assert swallows


def test_what_computes_too_long_is_stopped_whatever_it_catches():
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(Late), limit_processor_time(0.1, "the trace"):
        busy(swallows=True)
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_what_ends_in_time_is_left_alone_and_so_is_another_thread():
    with limit_processor_time(60, "the trace"):
        found = [1]
    with pytest.raises(ValueError, match="its own"), limit_processor_time(60, "the trace"):
        raise ValueError("its own")

    def inside() -> None:
        with limit_processor_time(60, "the trace"):
            found.append(2)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [1, 2]
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


class Endless(nn.Sequential):
    """Does not come to an end while the length of its input is symbolic."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x.shape[1], int):
            busy()
        return super().forward(x)


def test_a_module_whose_trace_takes_too_long_is_traced_for_one_size():
    loaded = open_live(Endless(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)))
    program = trace_module(loaded, Samples({"x": torch.randn(2, 5, 8)}), seconds=0.2)
    assert "0.2 s" in program.limits.note
    assert program(torch.randn(3, 5, 8)).shape == (3, 5, 4)
    with expect_error(DataError, name="x.shape[1]"):
        program.module()(torch.randn(3, 6, 8))
