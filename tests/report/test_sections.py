"""What a report says of a run, from plain values."""

from __future__ import annotations

from mptk.report.sections import LINE_LENGTH, build_course_table, draw_line


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
