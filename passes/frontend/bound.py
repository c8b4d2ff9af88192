"""bound: a time limit for a trace with symbolic sizes, whose expressions take minutes to simplify for some modules."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from mptk.errors import TraceError

RESEND_SECONDS = 1.0
"""Seconds after which the signal comes again, since a destructor or a bare ``except`` may have swallowed the stop."""


class Late(TraceError):
    """A trace takes too long."""


class _Stop(BaseException):
    """Not an Exception: torch catches every Exception around its expressions, and would go on."""


@contextlib.contextmanager
def limit_processor_time(seconds: float, what: str) -> Iterator[None]:
    """Stop the code inside after ``seconds`` of processor time, so that a busy machine makes no difference.

    Python runs signal handlers only in the main thread. In other threads there is no limit.

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
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)  # inside, so that a signal at the last moment is caught, too
    except _Stop:
        pass
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    if late:  # also if the code inside swallowed the stop and went on to its end
        raise Late(f"{what} takes more than {seconds:g} s of computing; trace it with fewer symbolic sizes", name=what)
