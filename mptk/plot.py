"""plot: a comparison of ``mptk bench`` as a picture."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from mptk.bench import Bench
from mptk.errors import MptkError


def require_matplotlib() -> None:
    """Raise MptkError if there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MptkError("matplotlib is not installed, and it draws the plot; run: pip install 'mptk[plot]'")


def draw_bench(result: Bench, path: Path) -> None:
    """Bars of each graph's time over the first graph's, case by case; a line across each bar is its ideal.

    The file's ending says what is written (png, svg, pdf).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [graph.name for graph in result.graphs]
    cases = list(dict.fromkeys(row.case for row in result.rows))
    figure, axes = pyplot.subplots(figsize=(max(6, 0.5 * len(cases) * len(names)), 4.5))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        rows = [row for row in result.rows if row.graph == name]
        places = [at + index * width for at in range(len(cases))]
        axes.bar(places, [row.ratio for row in rows], width, label=name)
        axes.hlines(
            [row.ideal for row in rows],
            [place - width / 2 for place in places],
            [place + width / 2 for place in places],
            color="black",
            label="_" if index else "ideal",
        )
    axes.set_xticks(
        [at + 0.4 - width / 2 for at in range(len(cases))],
        [f"{case}\n{case.threads} thread{'s' * (case.threads != 1)}" for case in cases],
        fontsize=8,
    )
    axes.set(ylabel=f"time / time of {names[0]}", title="ONNX Runtime, median of alternating rounds")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
