"""charts: the charts of timings, one function each."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mptk.files import write_result
from mptk.files.outputs import PLOT_MARK
from mptk.ort.bench import Bench
from mptk.plain import escape_text
from mptk.report.page.svg import INK, SERIES, WIDTH, save
from mptk.report.view import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_bench_plot(bench: Bench, path: Path) -> None:
    """Draw the timings into ``path``; its suffix names the format (png, svg, pdf)."""
    mark = {"Software" if path.suffix.lower() == ".png" else "Creator": PLOT_MARK}

    def write(figure: Figure) -> None:
        write_result(path, partial(figure.savefig, metadata=mark))

    save(partial(draw_bench_bars, bench=bench), compute_bench_height(bench), 1.6 * WIDTH, write)


def compute_bench_height(bench: Bench) -> float:
    """The inches that ``draw_bench_bars`` needs."""
    graphs, cases = len(bench.graphs), len({row.case for row in bench.rows})
    return 0.9 + 0.22 * -(-graphs // 2) + cases * max(0.45, 0.24 * graphs)


def draw_bench_bars(axes: Axes, bench: Bench) -> None:
    """Draw a bar for each graph in each case: its time relative to the first graph's. A mark is the ideal."""
    # A group of bars for each case. The first graph's bar is 1 everywhere, and the others are to be read against it.
    cases = list(dict.fromkeys(row.case for row in bench.rows))
    graphs = [graph.name for graph in bench.graphs]
    tall = 0.8 / len(graphs)
    for row in bench.rows:
        at, index = cases.index(row.case), graphs.index(row.graph)
        place = at + (index - (len(graphs) - 1) / 2) * tall
        label = "_" if at else shorten_name(escape_text(row.graph))  # matplotlib leaves "_" out of legends
        axes.barh(place, row.ratio, tall * 0.85, color=SERIES[index % len(SERIES)], label=label)
        axes.text(row.ratio + 0.02, place, f" {row.ms:.1f} ms", va="center", size=8.5)
        if index:
            ends, ideal = [place - tall * 0.5, place + tall * 0.5], "_" if at or index > 1 else "ideal"
            axes.plot([row.ideal] * 2, ends, color=INK, linewidth=2, solid_capstyle="butt", label=ideal)
    axes.set_yticks(range(len(cases)), [f"{case}\n{format_count(case.threads, 'thread')}" for case in cases])
    axes.set_ylim(len(cases) - 0.45, -0.55)
    axes.set_xlim(0, 1.25 * max(row.ratio for row in bench.rows))
    axes.set_xlabel(f"time / time of {shorten_name(escape_text(graphs[0]))}")
    axes.figure.legend(loc="outside upper left", ncols=2, handlelength=1.2)
    axes.tick_params(axis="y", length=0)


def shorten_name(name: str, most: int = 24) -> str:
    """A name that fits a legend: its end, in which paths differ."""
    return name if len(name) <= most else f"…{name[1 - most :]}"
