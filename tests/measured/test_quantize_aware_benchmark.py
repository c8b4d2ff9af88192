"""The benchmark of `--quantize-aware`: which rows its table compares."""

from __future__ import annotations

from benchmarks.quantize_aware import make_table


def make_row(trained_for, graph, perplexity, seed=0):
    case = {"model": "m", "sparsity": 0.2, "steps": 16, "batch": 4, "seed": seed}
    return case | {"trained_for": trained_for, "graph": graph, "perplexity": perplexity}


def test_a_graph_stands_beside_the_same_graph_of_the_same_seed():
    rows = [
        make_row("float32", "int4", 50.0),
        make_row("float32", "float32", 40.0),
        make_row("float32", "int4", 60.0, seed=1),
        make_row("int4", "int4", 45.0),
        make_row("int4", "float32", 44.0),
        make_row("int4", "int4", 66.0, seed=1),
    ]
    assert make_table(rows).splitlines()[2:] == [
        "| m | 20% | int4 | 0 | 50.00 | 45.00 | -10.0% |",
        "| m | 20% | int4 | 1 | 60.00 | 66.00 | +10.0% |",
    ]
