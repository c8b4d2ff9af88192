"""Each row of a result says which commit it is of, and no result is of code that was never committed."""

from __future__ import annotations

from benchmarks.provenance import PAGE, count_commits, read_results, write_page

OF_CHANGED_CODE = {
    "advice.json",
    "agreement.json",
    "depth_choice.json",
    "depth_fit.json",
    "gguf_models.json",
    "ladder.json",
    "latency.json",
    "mutants.json",
    "onnx.json",
    "quality.json",
    "quality_20_minutes.json",
    "quality_zero_shot.json",
    "recovery.json",
    "recovery_warmup.json",
    "shape_ranking.json",
    "zoo_depth.json",
    "zoo_end_to_end.json",
    "zoo_training.json",
}
"""Studies that ran beside changes, before a benchmark said so. Whoever runs one again takes it out of here."""


def test_the_page_says_which_row_is_of_which_commit() -> None:
    assert PAGE.read_text() == write_page(), "run python -m benchmarks.provenance"


def test_no_result_is_of_changed_code() -> None:
    results = read_results()
    dirty = {name for name, result in results.items() if any("-dirty" in commit for commit in count_commits(result))}
    assert dirty == OF_CHANGED_CODE


OF_ONE_COMMIT = ("zoo.json", "zoo_heads.json", "zoo_onnx.json")
"""Sweeps of which all rows are of one commit."""


def test_sweeps_are_of_one_commit() -> None:
    results = read_results()
    assert [name for name in OF_ONE_COMMIT if len(count_commits(results[name])) > 1] == []
