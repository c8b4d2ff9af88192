"""A trace that takes too long is stopped, and a plain module is then traced with its batch size open alone.

It reaches for passes.frontend.bound: a limit of a tenth of a second is too short for a model.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest
import torch
from inside import Inside
from torch import nn

import mptk
from passes.frontend.bound import Late, limit_processor_time


def busy(*, swallows: bool = False) -> None:
    """Computes without end; it may go on after whatever Exception it meets."""
    while True:
        try:
            sum(range(1000))
        except Exception:
            assert swallows


def test_what_computes_too_long_is_stopped_whatever_it_catches() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    with (
        pytest.raises(Late, match=r"the trace takes more than 0\.2 s of computing; trace it"),
        limit_processor_time(0.2, "the trace"),
    ):
        busy(swallows=True)
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_what_ends_in_time_is_left_alone_and_so_is_another_thread() -> None:
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


def test_a_module_whose_trace_takes_too_long_is_traced_for_one_size(inside: Inside) -> None:
    asked = list[Any]()

    def slow(trace: Any, module: nn.Module, inputs: Any = None, *, dynamic: Any = False) -> Any:
        asked.append(dynamic)
        return busy() if dynamic is True else trace(module, inputs, dynamic=dynamic)

    inside.around("passes.frontend.trace.trace_to_program", slow)
    inside.bound("mptk.compile.trace.TRACE_SECONDS", 0.2)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    pruned = mptk.prune(net, sparsity=0.5, example_inputs=torch.randn(2, 5, 8), progress=None)
    assert asked == [True, (0,)]
    assert pruned.model(torch.randn(3, 5, 8)).shape == (3, 5, 4)
