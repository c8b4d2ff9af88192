"""What a report says of a run, from plain values."""

from __future__ import annotations

from dataclasses import replace

from mptk.protocols import Report
from mptk.report.sections import LINE_LENGTH, build_course_table, build_prune_view, draw_line


def test_the_course_of_training_is_a_row_a_metric_from_the_first_to_the_last_step():
    rows = [{"phase": "masks", "step": n + 1, "loss": 9.0 - n, "z": None} for n in range(8)]
    rows[-1]["held-out"] = 3.25
    found = build_course_table(rows)
    assert list(found.columns) == ["metric", "step 1", "", "step 8"]
    assert [list(row) for row in found.rows] == [
        ["loss", "9.00", "█▇▆▅▄▃▂▁", "2.00"],
        ["held-out", "3.25", "▁", "3.25"],
    ]


def test_a_line_goes_from_the_lowest_to_the_highest_value():
    assert draw_line([2.0] * 3) == "▁▁▁"
    assert draw_line([0.0, 1.0, 0.0]) == "▁█▁"
    half = LINE_LENGTH // 2
    assert draw_line([*[0.0] * 500, *[1.0] * 500]) == "▁" * half + "█" * half


def test_a_division_whose_loss_was_not_finite_was_not_taken(laboratory):
    report = replace(Report.read(laboratory.open_pruned()), splits={"ffn 3": None, "ffn 4": 2.0})
    (section,) = (each for each in build_prune_view(report).sections if each.title.startswith("Divisions"))
    assert [list(map(str, row)) for row in section.parts[0].rows] == [
        ["ffn 4 (taken)", "2.00"],
        ["ffn 3", "not finite"],
    ]
