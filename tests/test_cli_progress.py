"""Progress of a run on stderr: lines in a log, bars on a terminal."""

from __future__ import annotations

import io
import re

from rich.console import Console

from mptk.cli import progress


def test_lines_come_at_the_start_of_a_stage_and_every_ten_seconds():
    file, now = io.StringIO(), 100.0
    report = progress.lines(Console(file=file), clock=lambda: now)
    for second, call in [
        (0, ("load", 0, 0)),
        (3, ("score [wanda]", 0, 0)),
        (4, ("score [wanda]", 1, 9)),
        (12.9, ("score [wanda]", 4, 9)),
        (13, ("score [wanda]", 5, 9)),
        (22, ("score [wanda]", 8, 9)),
        (22.4, ("write", 0, 0)),
    ]:
        now = 100.0 + second
        report(*call)
    assert [line.split(" s  ") for line in file.getvalue().splitlines()] == [
        ["    0", "load"],
        ["    3", "score [wanda]"],
        ["   13", "score [wanda] 5/9"],
        ["   22", "write"],
    ]


def test_terminals_get_a_bar_for_each_stage():
    file = io.StringIO()
    with progress.stages(Console(file=file, force_terminal=True, width=80, force_interactive=True)) as report:
        report("trace", 0, 0)
        report("score", 3, 9)
        report("score", 9, 9)
    assert re.search(r"trace .* 1/1\b", plain := re.sub(r"\x1b\[[\d;]*m", "", file.getvalue()))
    assert re.search(r"score .* 9/9\b", plain)
