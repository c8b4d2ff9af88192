"""stopping: the signals that end a command. Each raises an exception, so that the command cleans up after itself."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = 0.01
"""Seconds after which an exception that Python dropped is raised again: then the destructor that lost it is over."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: it ends a command as Ctrl-C does."""


class HungUp(Terminated):
    """SIGHUP: the terminal is gone."""


KINDS: dict[int, type[KeyboardInterrupt]] = {
    signal.SIGINT: KeyboardInterrupt,
    signal.SIGTERM: Terminated,
    signal.SIGHUP: HungUp,
}


class _Stopped:
    """The signal that asked this process to stop. A library may drop its exception or replace it."""

    def __init__(self) -> None:
        self.by: KeyboardInterrupt | None = None

    def note(self, stop: KeyboardInterrupt) -> KeyboardInterrupt:
        """Remember ``stop`` before it is raised, and return it."""
        self.by = stop
        return stop

    def find_stop(self, error: BaseException) -> KeyboardInterrupt | None:
        """The signal that stopped the command that ended with ``error``; None if there was none."""
        return error if isinstance(error, KeyboardInterrupt) else self.by

    def look(self, said: str = "") -> None:
        """If a signal came, raise its exception with these words, even if a library dropped it."""
        if self.by is not None:
            raise type(self.by)(said)


STOPPED = _Stopped()


@contextmanager
def catch_signals() -> Iterator[None]:
    """Raise an exception for each signal of ``KINDS``, unless the process was started with that signal ignored.

    Python drops exceptions in destructors and in callbacks of weak references. Such an exception is raised again.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        # A library may take the exception for an error of its own, and would log it.
        logging.disable()
        raise STOPPED.note(KINDS[number]())

    # Python hands such an exception to ``sys.unraisablehook`` and goes on. A timer raises it again from other code.
    def note_dropped(unraisable: sys.UnraisableHookArgs) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt) and STOPPED.by is not None:
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
        else:
            hook(unraisable)

    # Ignored from the start (``nohup``): it stays ignored.
    handlers = {number: stop for number in KINDS if signal.getsignal(number) != signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, lambda number, frame: STOPPED.look())
    hook, sys.unraisablehook = sys.unraisablehook, note_dropped
    try:
        yield
    finally:
        STOPPED.by = None
        logging.disable(logging.NOTSET)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """Ignore further signals: the command is over, and a signal would only disturb the libraries' cleanup."""
    for number in KINDS:
        signal.signal(number, signal.SIG_IGN)
