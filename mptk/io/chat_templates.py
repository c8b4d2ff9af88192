"""chat_templates: fill the chat templates of tokenizers and processors, which are programs of unknown origin.

jinja2's sandbox keeps a template from the machine, but bounds neither its time nor its memory. So templates are filled
in a fork of this process, which the system stops at its bounds. A fork has the tokenizer and its libraries: it starts
in a hundredth of a second, and writes what this process would write.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import signal
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from mptk.errors import DataError, FileError, MptkError, take_first_line
from mptk.files import format_json
from mptk.reading import parse_json, shorten_text

# Bytes of the longest chat as a template writes it: this process has to take it in.
LONGEST_CHAT = 1 << 26
# The signals that this process may handle, and SIGPROF, by which the system stops the fork.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPROF)
Owner = PreTrainedTokenizerBase | ProcessorMixin | None
Turns = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Bounds:
    """What a template may take.

    ``seconds``: processor time for a chat; the longest known templates take a hundredth of a second. ``waiting``: time
    after which it is stopped on a machine that is too busy to give it its processor time. ``memory``: bytes for filling
    templates, beside what this process has.
    """

    seconds: float = 5.0
    waiting: float = 60.0
    memory: int = 1 << 29


class ChatTemplate:
    """The chat template of ``owner``. Its process starts with the first chat, and ends with the ``with`` block."""

    def __init__(self, owner: Owner, bounds: Bounds = Bounds()) -> None:
        self._owner = owner
        self._bounds = bounds
        self._process: tuple[int, Connection] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end()

    def render(self, turns: Turns, where: str, remedy: str, **options: Any) -> str:
        """A chat as the template writes it. ``options``: of ``apply_chat_template``.

        Raises:
            MptkError: the template refuses the chat ``where``, or exceeds its time or memory; ends with ``remedy``.
        """
        return str(self._render(turns, where, remedy, {**options, "tokenize": False}))

    def encode(self, turns: Turns, where: str, remedy: str, **options: Any) -> list[int]:
        """The token ids of such a text; otherwise as ``render``."""
        return list(self._render(turns, where, remedy, {**options, "return_dict": True}))

    def _render(self, turns: Turns, where: str, remedy: str, options: Mapping[str, Any]) -> Any:
        pid, pipe = self._process = self._process or _start_process(self._owner, self._bounds)
        late = False
        try:
            # The timer counts only processor time, so waiting has a bound of its own.
            pipe.send((turns, options))
            if late := not pipe.poll(self._bounds.waiting):
                os.kill(pid, signal.SIGKILL)
            # JSON, not pickle: a template that broke out of the sandbox could send anything.
            found, refused = parse_json(pipe.recv_bytes(LONGEST_CHAT).decode(), FileError)
        except MptkError as error:
            found, refused = None, f"what it writes cannot be used: {error}"
        except (OSError, EOFError):
            # It was stopped, or its answer is too long. The next chat gets a new process.
            ended = self._end()
            late |= os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGPROF
            bound = f"{self._bounds.seconds:.0f} s" if late else f"{self._bounds.memory >> 20} MB"
            refused = f"it takes more than {bound}"
        if refused:
            raise DataError(f"the model's chat template refuses {where}: {refused}; {remedy}", name=where)
        return found

    def _end(self) -> int:
        """End the process; returns how it ended, 0 if that is not known."""
        if self._process is None:
            return 0
        pid, pipe = self._process
        self._process = None
        pipe.close()
        # ChildProcessError: the caller's program itself collects every process that ends.
        with contextlib.suppress(ChildProcessError):
            return os.waitpid(pid, 0)[1]
        return 0


def _start_process(owner: Owner, bounds: Bounds) -> tuple[int, Connection]:
    here, there = Pipe()
    # A signal whose handler raises in the fork before ``_answer`` would let the fork go on as a second command.
    waiting = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    # tokenizers else warns of a fork, and in it waits for threads that are not there.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with warnings.catch_warnings():
            # Python warns that a fork lacks the threads of its process; this one waits for none.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if not pid:
            _answer(owner, bounds, there)
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
        signal.pthread_sigmask(signal.SIG_SETMASK, waiting)
    there.close()
    return pid, here


def _answer(owner: Owner, bounds: Bounds, pipe: Connection) -> None:
    """What the fork does: fill the template for each chat that it is sent, until the pipe ends."""
    try:
        _isolate(pipe.fileno(), bounds.memory)
        while True:
            turns, options = pipe.recv()
            signal.setitimer(signal.ITIMER_PROF, bounds.seconds)
            pipe.send_bytes(format_json(_fill(owner, bounds, turns, options)).encode())
            signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        # However it ends, not a line of this process's program may run in the fork: no finalizer, no ``finally``.
        os.kill(os.getpid(), signal.SIGKILL)


def _fill(owner: Any, bounds: Bounds, turns: Turns, options: Mapping[str, Any]) -> tuple[object, str]:
    """What the template makes of a chat, and why it refuses it."""
    try:
        found = owner.apply_chat_template(turns, **options)
        return found if isinstance(found, str) else list(found["input_ids"]), ""
    except MemoryError:
        return None, f"it takes more than {bounds.memory >> 20} MB"
    except RecursionError:
        return None, "it calls itself too often"
    except Exception as error:  # noqa: BLE001  # a template of any content meets code of any class
        return None, shorten_text(take_first_line(error), 300).rstrip(".")


def _isolate(kept: int, memory: int) -> None:
    """Set the fork's bounds, and leave it nothing of this process but its memory and one descriptor.

    Locks of this process would else stay locked, and its signals be handled twice.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    # A library that runs out of memory writes to standard error, but mptk says it in one line.
    quiet = os.open(os.devnull, os.O_WRONLY)
    for written in {1, 2} - {kept}:
        os.dup2(quiet, written)
    os.closerange(3, kept)
    os.closerange(kept + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    # The system bounds the whole address space, of which this process has much already.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + memory
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (bound if hard == resource.RLIM_INFINITY else min(bound, hard), hard))
    logging.disable()
    gc.freeze()  # garbage of this process has finalizers, which are not the fork's to run
