"""A command in a fork of this process, which has imported everything, and the traps that kill it.

The traps are set here, in the fork: mptk's code knows nothing of them.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets  # noqa: F401 (what every fork would else import for itself)
import onnxruntime  # noqa: F401
import onnxscript  # noqa: F401
import peft  # noqa: F401
import torch.onnx  # noqa: F401

import mptk.api.compiler
import mptk.api.graphs
import mptk.api.pruned
import mptk.cli.console
import mptk.features.page.render
import mptk.proof.verification
import passes.frontend.trace
from mptk.cli.main import main
from mptk.files import replace
from mptk.progress import Progress

EVENTS, LOG = "events", "log"


@dataclass(frozen=True)
class Trap:
    """Where a run is killed: at its nth event (from 0), or after some seconds of work, or four times these.

    ``exchange``: whether the system can exchange two names at once.
    """

    signal: int = 0
    event: int | None = None
    seconds: float | None = None
    exchange: bool = True


@dataclass
class Ended:
    """How a run ended: exit code (negative: the signal), what it printed, its events in order, its seconds of work."""

    code: int
    said: str
    events: list[str] = field(default_factory=list)
    seconds: float = 0.0


def warm(command: list[str], place: Path) -> None:
    """Run a command in this process, so that its forks need not import, nor trace the same model without weights."""
    trace, known, here = passes.frontend.trace.trace_to_program, dict[Any, Any](), Path.cwd()

    def remembered(model: Any, *given: Any, **options: Any) -> Any:
        if not all(p.is_meta for p in model.parameters()):
            return trace(model, *given, **options)
        key = type(model), model.config.to_json_string(), str(options)
        if key not in known:
            known[key] = trace(model, *given, **options)
        return known[key]

    passes.frontend.trace.trace_to_program = remembered
    os.environ |= {"MPTK_CACHE": str(place / "cache")}
    os.chdir(place)
    sys.argv = ["mptk", *command, "--quiet"]
    try:
        main()
    finally:
        os.chdir(here)


def run(
    arguments: list[str], place: Path, aside: Path, trap: Trap, prepare: Callable[[], None] = lambda: None
) -> Ended:
    """Run ``mptk ARGUMENTS`` in the folder ``place``. ``aside``: a folder for what it prints and its events."""
    aside.mkdir(parents=True, exist_ok=True)
    (aside / EVENTS).write_text("")
    pid = os.fork()
    if pid == 0:
        _child(arguments, place, aside, trap, prepare)
    if trap.seconds is not None:
        _wait(pid, trap.seconds)
        os.kill(pid, trap.signal)
    _, status, used = os.wait4(pid, 0)
    code, events = os.waitstatus_to_exitcode(status), (aside / EVENTS).read_text().splitlines()
    return Ended(code, (aside / LOG).read_text(errors="replace"), events, used.ru_utime + used.ru_stime)


def _wait(pid: int, seconds: float) -> None:
    """Until the time is over or the process ended; it stays a zombie, so that its number is still its own."""
    end, times = time.monotonic() + 4 * seconds, Path(f"/proc/{pid}/stat")
    while time.monotonic() < end and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        ticks = times.read_text().rpartition(")")[2].split()[11:15]
        if sum(map(int, ticks)) >= seconds * os.sysconf("SC_CLK_TCK"):
            return
        time.sleep(0.002)


def _child(arguments: list[str], place: Path, aside: Path, trap: Trap, prepare: Callable[[], None]) -> None:
    code = 70
    try:
        log = os.open(aside / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(place)
        os.environ |= {"MPTK_CACHE": str(place / "cache"), "TMPDIR": str(place / "tmp")}
        tempfile.tempdir = None
        signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare()
        _set(trap, aside / EVENTS)
        sys.argv = ["mptk", *arguments]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _set(trap: Trap, events: Path) -> None:
    """Count the events of this process: every rename, before and after it, and every word on how far the run is."""
    file, count = open(events, "w"), 0  # noqa: SIM115 (open for as long as the process lives)

    def event(what: str) -> None:
        nonlocal count
        file.write(what + "\n")
        file.flush()
        count += 1
        if count - 1 == trap.event:
            os.kill(os.getpid(), trap.signal)

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(source: Any, target: Any, *more: Any, **options: Any) -> Any:
            what = f"{Path(os.fsdecode(target)).name}" if not str(target).isdigit() else "-"
            event(f"before {what} gets its name")
            found = call(source, target, *more, **options)
            event(f"after {what} got its name")
            return found

        return run

    os.rename, os.replace = watched(os.rename), watched(os.replace)
    replace._swap_names = watched(replace._swap_names) if trap.exchange else lambda *_: False
    lines = mptk.cli.console.show_lines

    @contextmanager
    def told(*given: Any) -> Iterator[Progress]:
        def say(stage: str, done: int, total: int, figures: str = "", /) -> None:
            event(f"at {stage}" + (f" {done} of {total}" if done else ""))
            report(stage, done, total, figures)

        with lines(*given) as report:
            yield say

    mptk.cli.console.show_lines = told
