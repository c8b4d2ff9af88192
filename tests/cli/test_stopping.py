"""A signal stops a command whoever drops its exception; streams that are closed or full do not."""

from __future__ import annotations

import gc
import io
import logging
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

import mptk.cli.main  # noqa: F401  # it registers the commands, before these tests register their own
from mptk import MptkError
from mptk.cli.app import COMMANDS, app, build_command, register_command
from mptk.cli.console import err, show_stages

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


@pytest.fixture(autouse=True)
def _not_ignored():
    """A shell that starts something with & lets it ignore SIGINT."""
    before = {name: signal.signal(getattr(signal, name), signal.SIG_DFL) for name in NUMBERS}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.fixture
def run_work(run_words):
    """The exit code of a command that does what is given."""
    known = list(app.registered_commands)

    def run(work: Callable[[], None]) -> int:
        register_command("work")(work)
        build_command(COMMANDS.pop("work"), [], None)
        try:
            return run_words("work")
        finally:
            app.registered_commands[:] = known

    yield run
    app.registered_commands[:] = known


class Thing:
    """Something that a weak reference can hold."""


def in_a_callback(number: int) -> None:
    """A signal comes while Python calls back for a weak reference, where it drops all exceptions."""
    thing = Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), number))
    del thing
    gc.collect()
    assert reference() is None


def in_a_destructor(number: int) -> None:
    class Last:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)

    Last()


def in_a_library(number: int) -> None:
    """It catches everything."""
    try:
        os.kill(os.getpid(), number)
    except BaseException:
        return


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("drop", [in_a_callback, in_a_destructor])
def test_a_signal_whose_exception_python_drops_stops_the_command(
    run_work,
    drop,
    name,
    capfd,
):
    went_on = []

    def work() -> None:
        drop(getattr(signal, name))
        for _ in range(200):
            time.sleep(0.05)
        went_on.append(True)

    assert (run_work(work), went_on) == (NUMBERS[name], [])
    said = capfd.readouterr().err
    assert said == ("interrupted" if name == "SIGINT" else "terminated") + "; nothing was published\n"


def test_a_signal_that_a_library_drops_is_seen_at_the_next_word(run_work, capfd):
    went_on = []

    def work() -> None:
        with show_stages(err) as progress:
            in_a_library(signal.SIGTERM)
            progress("next", 0, 0)
            went_on.append(True)

    assert (run_work(work), went_on) == (143, [])
    assert capfd.readouterr().err == "terminated; nothing was published\n"


def test_a_signal_that_was_dropped_until_the_end_is_no_success(run_work, capfd):
    assert run_work(lambda: in_a_library(signal.SIGINT)) == 130
    assert capfd.readouterr().err == "interrupted; the command had already finished\n"
    assert run_work(lambda: None) == 0  # the next command knows of no signal


@pytest.mark.parametrize("name", NUMBERS)
def test_a_signal_while_options_are_read_is_said_too(run_work, inside, name, capfd):
    def signalled(*_: object) -> bool:
        os.kill(os.getpid(), getattr(signal, name))
        return False

    def work(number: int = 1) -> None:
        pytest.fail(f"it went on with {number}")

    inside.around("mptk.cli.app._is_typed", signalled)
    assert run_work(work) == NUMBERS[name]
    said = "interrupted" if name == "SIGINT" else "terminated"
    assert capfd.readouterr().err == f"{said}; nothing was published\n"


def test_a_library_that_takes_a_signal_for_its_own_error_logs_nothing(
    run_work,
):
    logged = io.StringIO()
    log = logging.getLogger("library")
    log.addHandler(logging.StreamHandler(logged))

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            log.exception("failed")
            raise TypeError("it was interrupted") from error

    assert run_work(work) == 143
    assert logged.getvalue() == ""
    log.error("later")
    assert logged.getvalue() == "later\n"


def test_another_error_that_python_drops_is_shown_as_ever(run_work):
    seen: list[object] = []
    before, sys.unraisablehook = sys.unraisablehook, lambda found: seen.append(found.exc_type)

    class Last:
        def __del__(self) -> None:
            raise MptkError("a library's; its own matter")

    def work() -> None:
        Last()

    try:
        assert (run_work(work), seen) == (0, [MptkError])
    finally:
        sys.unraisablehook = before


# ---- streams ----

PROGRAM = """
import contextlib, os, sys
from pathlib import Path
from mptk.cli.app import register_all, main, register_command
from mptk.cli.console import err, out, show_stages

@register_command("work")
def work():
    with show_stages(err) as progress, open("file", "w") as file:
        for n in range(3):
            progress(f"stage {n}", 0, 0)
        with contextlib.suppress(OSError):
            os.write(2, b"words of a library\\n")
    out.print("the result " * 2000)
    Path("done").touch()

register_all({})

sys.argv = ["mptk", "work"]
main()
"""


def run_line(line: str, place: Path) -> subprocess.CompletedProcess[str]:
    """A line of a shell."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPTK_CACHE": str(place / "cache")}
    return subprocess.run(["bash", "-c", line], cwd=place, env=environment, capture_output=True, text=True)


CLOSED = "", "<&-", ">&-", "2>&-", "2>/dev/full", "<&- >&- 2>&-", ">&- 2>/dev/full", "| true", "| head -c 9 >/dev/null"


@pytest.mark.parametrize("streams", [*CLOSED, ">/dev/full"])
def test_streams_that_are_closed_or_full_end_nothing(streams, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    run = run_line(f"set -o pipefail; {sys.executable} program.py {streams}", tmp_path)
    assert run.returncode == (streams == ">/dev/full"), run.stderr
    assert "Traceback" not in run.stderr
    assert "Exception ignored" not in run.stderr
    assert (tmp_path / "done").exists()
    assert (tmp_path / "file").read_text() == ""  # no word went to a file that got a closed stream's number
    if streams == ">/dev/full":
        assert "the result could not be printed: No space left" in run.stderr.splitlines()[-1]
    elif ">" not in streams and "|" not in streams:
        assert " ".join(run.stdout.split()).count("the result") == 2000  # lines break where the terminal ends


def test_help_and_a_bad_option_need_no_streams(tmp_path):
    for line, code in (("--help >&-", 0), ("--help >/dev/full", 1), ("nonsense 2>&-", 2)):
        run = run_line(f"{sys.executable} -m mptk {line}", tmp_path)
        assert (run.returncode, "Traceback" in run.stderr) == (code, False)
