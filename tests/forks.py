"""Forks of this process, for tests of locks, kills and shared work. A fork has all imports already."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mptk.files import claim_place
from mptk.publish.folder import publish


def start_fork(run: Callable[[], object]) -> int:
    """A fork of this process that does something with files, and ends."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def wait_for_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_fork_after(run: Callable[[], object]) -> None:
    """What a process leaves that is killed after ``run``."""

    def whole() -> None:
        kept = run()
        os.kill(os.getpid(), signal.SIGKILL)
        del kept

    assert wait_for_code(start_fork(whole)) == -signal.SIGKILL


@contextmanager
def keep_fork(run: Callable[[], object]) -> Iterator[int]:
    """Another process that has done ``run`` and lives; its number."""
    reads, writes = os.pipe()

    def living() -> None:
        kept = run()
        os.write(writes, b".")
        signal.pause()
        del kept

    pid = start_fork(living)
    os.read(reads, 1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reads)
        os.close(writes)


def hold(folder: Path) -> object:
    held = claim_place(folder)
    held.__enter__()
    return held


def write(folder: Path, content: str) -> None:
    with publish(folder) as new:
        (new / "file").write_text(content)


def run_with_hook(hook: Callable[[str, tuple[Any, ...]], object], run: Callable[[], object]) -> int:
    """The exit code of a fork in which ``hook`` sees the interpreter's audit events, such as each rename, before it."""

    def listening() -> None:
        sys.addaudithook(hook)
        run()

    return wait_for_code(start_fork(listening))


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
