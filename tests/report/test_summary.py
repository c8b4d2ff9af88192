"""The screen at the end of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from lab import fields

from mptk import Report
from mptk.errors import FileError
from mptk.report.summary import build_summary, list_next_commands, list_warnings
from mptk.testing import expect_error


@pytest.fixture
def report(laboratory):
    """Of a cut with an int8 graph."""
    return Report.read(laboratory.open_quantized())


def test_a_run_ends_on_one_screen_that_a_log_can_show(laboratory, report):
    """With the longest text: a latency as the budget, warnings of all kinds, notes."""
    cost = {name: {**row, "latency_ms": 12.5} for name, row in report.cost.items()}
    quality = {**report.quality, "metric": "perplexity", "dense": 12345.0, "pruned": 23456.0}
    data = {name: {**report.data.get("evaluation", {}), "source": "one text"} for name in ("calibration", "evaluation")}
    full = replace(report, cost=cost, quality=quality, data=data, notes=["one", "two"])
    for each in (report, full, Report.read(laboratory.open_recovered())):
        lines = build_summary(each, Path("runs/m30"))
        assert len(lines) <= 12
        # A command stays in one line, however long its paths are, so that it can be copied.
        assert max(len(line) for line in lines if " mptk " not in line) <= 120
        assert "runs/m30" in lines[0]


def test_a_recovered_folder_names_the_method_that_chose_its_units(laboratory):
    report = Report.read(laboratory.open_recovered())
    method = Report.read(laboratory.open_pruned()).settings.method
    assert f"removed by {method}, trained for" in build_summary(report, Path("out"))[0]
    # A plan may say nothing of its method.
    assert "removed by a plan" in build_summary(replace(report, chosen_by=""), Path("out"))[0]


def test_a_report_cannot_put_text_of_its_own_in_place_of_the_method(laboratory, tmp_path):
    folder = laboratory.copy(laboratory.open_recovered(), tmp_path / "copy")
    fields("report.json", chosen_by="x](http://elsewhere)")(folder)
    with expect_error(FileError, name="report.json"):
        Report.read(folder)


def test_what_was_cut_comes_first_and_dense_beside_pruned_in_each_type(report):
    lines = build_summary(report, Path("out"))
    cut = {name: row for name, row in report.families.items() if row["width"] < row["of"]}
    assert all(f"{name} {row['of']} → {row['width']}" in lines[1] for name, row in cut.items())
    kept = next(name for name in report.families if name not in cut)
    assert kept not in lines[1].partition(";")[0].split()
    rows = [line.split()[:2] for line in lines[3:7]]
    scheme = next(iter(report.quantized))
    assert [row[0] for row in rows] == ["dense", "dense", "pruned", "pruned"]
    assert [rows[1][1], rows[3][1]] == [scheme, scheme]


def test_a_large_loss_a_text_that_is_none_and_one_text_for_both_are_said(report):
    for metric, dense, pruned, warned in (
        ("perplexity", 20.0, 20.5, False),
        ("perplexity", 20.0, 30.0, True),
        ("perplexity", 5000.0, 5000.0, True),
        ("agreement", 1.0, 0.99, False),
        ("agreement", 1.0, 0.8, True),
        ("agreement", 0.8, 0.9, False),
    ):
        quality = {**report.quality, "metric": metric, "dense": dense, "pruned": pruned}
        assert bool(list_warnings(replace(report, quality=quality, data={}))) == warned
    row = {"source": "a", "samples": 2, "inputs": {}}
    same = replace(report, quality={**report.quality, "pruned": report.quality["dense"]})
    assert list_warnings(replace(same, data={"calibration": row, "evaluation": row})) != []
    assert list_warnings(replace(same, data={"calibration": row, "evaluation": {**row, "source": "b"}})) == []


def test_the_next_commands_are_ones_that_can_be_typed(laboratory, report):
    poor = replace(report, quality={**report.quality, "metric": "perplexity", "dense": 20.0, "pruned": 60.0})
    first, second = list_next_commands(poor, Path("my runs/a"))
    assert first == "mptk report 'my runs/a'"
    assert second.startswith("mptk recover 'my runs/a' ")
    good = replace(report, quality={**report.quality, "pruned": report.quality["dense"]})
    assert list_next_commands(good, Path("a"))[1] == f"mptk bench {report.model} a"
