"""plot: draw a comparison of ``mptk bench``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mptk.files import write_result
from mptk.ort.bench import Bench, Case
from mptk.plain import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PER_ROW = 4
"""Number of cases in a row."""


def draw_bench(result: Bench, path: Path) -> None:
    """Draw a bar for each graph: its time over the first graph's. A line across the bar marks the ideal ratio.

    The suffix of ``path`` selects the format (png, svg, pdf).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [plain(graph.name) for graph in result.graphs]
    cases = list(dict.fromkeys(row.case for row in result.rows))
    parts = [cases[start : start + PER_ROW] for start in range(0, len(cases), PER_ROW)]
    wide = max(6.0, 0.3 * len(parts[0]) * len(names))
    pyplot.rcParams["text.parse_math"] = False  # names are no formulas
    figure, grid = pyplot.subplots(len(parts), figsize=(wide, 3 * len(parts) + 1), squeeze=False, layout="constrained")
    for axes, part in zip(grid[:, 0], parts, strict=True):
        _draw_cases(axes, result, names, part)
    figure.suptitle("ONNX Runtime, median of alternating rounds")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    write_result(path, figure.savefig)
    pyplot.close(figure)


def _draw_cases(axes: Axes, result: Bench, names: Sequence[str], cases: Sequence[Case]) -> None:
    import matplotlib

    width, colours = 0.8 / len(names), matplotlib.colormaps["tab20"]
    for index, name in enumerate(names):
        rows = {row.case: row for row in result.rows if plain(row.graph) == name}
        places = [at + index * width for at in range(len(cases))]
        axes.bar(places, [rows[c].ratio for c in cases], width, label=name, color=colours(index % colours.N))
        ends = [place - width / 2 for place in places], [place + width / 2 for place in places]
        axes.hlines([rows[c].ideal for c in cases], *ends, color="black", label="_" if index else "ideal")
    axes.set_xticks(
        [at + 0.4 - width / 2 for at in range(len(cases))],
        [f"{case}\n{case.threads} thread{'s' * (case.threads != 1)}" for case in cases],
        fontsize=8,
    )
    axes.set_ylabel(f"time / time of {names[0]}")
