"""Each row of a result says which commit it is of, and no result is of code that was never committed."""

from __future__ import annotations

from benchmarks.provenance import PAGE, count_commits, read_results, write_page

NAMES = """
advice agreement depth_choice depth_fit gguf_models ladder onnx quality quality_20_minutes quality_zero_shot
recovery recovery_warmup shape_ranking zoo_end_to_end
"""
OF_CHANGED_CODE = {f"{name}.json" for name in NAMES.split()}
"""Studies that ran beside changes, before a benchmark said so. Whoever runs one again takes it out of here."""


def test_the_page_says_which_row_is_of_which_commit():
    assert PAGE.read_text() == write_page(), "run python -m benchmarks.provenance"


def test_no_result_is_of_changed_code():
    results = read_results()
    dirty = {name for name, result in results.items() if any("-dirty" in commit for commit in count_commits(result))}
    assert dirty == OF_CHANGED_CODE


OF_ONE_COMMIT = ("zoo.json", "zoo_heads.json", "zoo_onnx.json", "zoo_depth.json")
"""Sweeps of which all rows are of one commit."""


def test_sweeps_are_of_one_commit():
    results = read_results()
    assert [name for name in OF_ONE_COMMIT if len(count_commits(results[name])) > 1] == []
