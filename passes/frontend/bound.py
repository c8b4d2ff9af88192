"""bound: an end for a trace with symbolic sizes, whose expressions take minutes to simplify for some modules."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from mptk.errors import MptkError

RESEND_SECONDS = 1.0
"""Seconds after which the signal comes again, if the code that it stopped went on."""


class Late(MptkError):
    """A trace takes too long."""


class _Stop(BaseException):
    """Goes through code that catches every Exception, as torch's does around its expressions."""


@contextlib.contextmanager
def limit_processor_time(seconds: float, what: str) -> Iterator[None]:
    """Within it no more than ``seconds`` of processor time are computed, so that a busy machine changes nothing.

    Only the main thread can be stopped; in others there is no bound.

    Raises:
        Late: it would take more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    late = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal late
        late = True
        raise _Stop

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, RESEND_SECONDS)
    try:
        yield
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except _Stop:
        pass
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    if late:
        raise Late(f"{what} takes more than {seconds:g} s of computing; trace it with fewer symbolic sizes")
