"""The study of how `mptk shapes` ranks: its table."""

from __future__ import annotations

from benchmarks.shape_ranking import table


def test_full_runs_are_compared_with_the_best_of_them_in_the_order_of_the_search():
    first = {"place": 1, "widths": {"ffn": 512}, "removed": 0.5, "losses": [5.0, 4.0], "wikitext2": 100.0, "c4": 144.0}
    second = first | {"place": 2, "widths": {"kv_groups": 2, "ffn": 672}, "wikitext2": 120.0, "c4": 100.0}
    rows = table([second, first])[2:]
    assert rows[0] == "| 1 | ffn 512 | 50.0% | 148 → 55 | 100.0 | 144.0 | +9.5% |"
    assert rows[1].endswith("| 120.0 | 100.0 | +0.0% |")
