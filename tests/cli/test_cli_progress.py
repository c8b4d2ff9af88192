"""Progress of a run on stderr: lines in a log, bars on a terminal.

It reaches for mptk.cli.console: its clock is the test's own.
"""

from __future__ import annotations

import io
import re

from rich.console import Console

from mptk import testing
from mptk.api import display
from mptk.api.graphs import export
from mptk.cli import console
from mptk.progress import enter_stage, show_nothing, step, step_through


def test_lines_come_at_the_start_of_a_stage_and_every_ten_seconds():
    """Also while a stage says nothing: ``None`` is a look at the clock."""
    file, now = io.StringIO(), 100.0
    report = display.LineProgress(Console(file=file), clock=lambda: now)
    for second, call in [
        *[(0, None), (0, ("load", 0, 0)), (3, ("score [wanda]", 0, 0)), (4, ("score [wanda]", 1, 9))],
        *[(12.9, ("score [wanda]", 4, 9)), (13, ("score [wanda]", 5, 9)), (22, ("score [wanda]", 8, 9))],
        *[(22.4, ("trace", 0, 0)), (27, None), (32.4, None), (41, None)],
        *[(41, ("score", 1, 9, "loss 2.1")), (51, None)],
    ]:
        now = 100.0 + second
        report.repeat() if call is None else report(*call)
    assert [line.strip().split(" s  ") for line in file.getvalue().splitlines()] == [
        *[["0", "load"], ["3", "score [wanda]"], ["13", "score [wanda] 5/9"]],
        *[["22", "trace"], ["32", "trace"], ["41", "score 1/9  loss 2.1"], ["51", "score 1/9"]],
    ]


def test_terminals_get_a_bar_for_each_stage():
    file = io.StringIO()
    with console.show_stages(Console(file=file, force_terminal=True, width=80, force_interactive=True)) as report:
        report("trace", 0, 0)
        report("score", 3, 9)
        report("score", 9, 9)
    assert re.search(r"trace .* 1/1\b", plain := re.sub(r"\x1b\[[\d;]*m", "", file.getvalue()))
    assert re.search(r"score .* 9/9\b", plain)


def test_steps_belong_to_the_stage_that_they_are_in():
    said = []
    step(1, 2)
    with enter_stage(lambda *words: said.append(words), "write onnx"):
        assert list(step_through("ab", str.upper)) == ["a", "b"]
        with enter_stage(show_nothing, "inner"):
            step(7, 9)
        step(3, 4, "weights")
    step(5, 6)
    assert said == [
        ("write onnx", 0, 2, "A"),
        ("write onnx", 1, 2, "B"),
        ("write onnx", 2, 2, ""),
        ("write onnx", 3, 4, "weights"),
    ]


def test_an_export_says_how_far_it_is(tmp_path):
    said = []
    with enter_stage(lambda *words: said.append(words), "export"):
        export(testing.make_llama(), tmp_path, quantize=["int8"])
    figures = [words[3] for words in said]
    for part in ("trace a decoding step", "translate the graph", "weights in 8-bit blocks"):
        assert part in figures
    assert {words[0] for words in said} == {"export"}
    weights = [words[1:3] for words in said if words[3] == "weights in 8-bit blocks"]
    assert weights == [(i, len(weights)) for i in range(len(weights))]
    assert len(weights) > 5
