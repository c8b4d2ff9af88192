"""charts: the charts of timings, advice and searches, one function each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mptk.files import write_result
from mptk.files.outputs import PLOT_MARK
from mptk.ort.bench import Bench
from mptk.plain import escape_text
from mptk.protocols import WORST, Advice, Point, Shape, Shapes
from mptk.report.advice import name_text
from mptk.report.page.svg import BAD, INK, QUIET, SERIES, WIDTH, Svg, draw_chart, save
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


# ---- what is measured before a cut: an advice, and a search of the shape ----


def format_percent(value: float, _: object) -> str:
    """A number of percent as an axis shows it."""
    return f"{value:g} %"


def draw_change_chart(found: Advice) -> Svg:
    """The change on each text over the share removed, with two standard errors, and the tolerance as a line."""
    xs = [100 * point.sparsity for point in found.division]

    def draw(axes: Axes) -> None:
        for number, text in enumerate(found.texts):
            colour = SERIES[number % len(SERIES)]
            ys = [100 * point.texts[text].change for point in found.division]
            errors = [100 * (point.texts[text].most - point.texts[text].change) for point in found.division]
            axes.errorbar(xs, ys, errors, color=colour, marker="o", markersize=4, label=name_text(text))
            if found.recovery is not None:
                after = [found.estimate_after(point, text) for point in found.division]
                least, most = [100 * each.least for each in after], [100 * each.most for each in after]
                axes.fill_between(xs, least, most, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(100 * found.tolerance, color=BAD, linewidth=1, linestyle="--")
        # Linear up to the tolerance, where the decision is; logarithmic above, where a ruined model may be at 10,000 %.
        axes.set_yscale("symlog", linthresh=100 * found.tolerance)
        axes.set_ylim(bottom=100 * find_lowest(found))
        axes.yaxis.set_major_formatter(format_percent)
        label_removed(axes, RISES[found.measure])

    return draw_chart(draw, f"{RISES[found.measure]} over the share removed, for {len(found.texts)} texts", 3.4)


def find_lowest(found: Advice) -> float:
    """The lowest change before and after training, at most 0."""
    cuts = [(point, text) for point in found.division for text in found.texts]
    after = [] if found.recovery is None else [found.estimate_after(point, text).least for point, text in cuts]
    return min([0.0, *(point.texts[text].change for point, text in cuts), *after])


def label_removed(axes: Axes, what: str) -> None:
    """Finish a chart of ``what`` over the share removed."""
    axes.xaxis.set_major_formatter(format_percent)
    axes.set_xlabel("removed")
    axes.set_ylabel(what)
    axes.grid(linewidth=0.6)
    axes.figure.legend(loc="outside upper left", ncols=2, handlelength=1.6)


RISES = {
    "perplexity": "rise of the perplexity",
    "disagreement": "samples with another prediction",
    "loss": "loss against the dense outputs",
}


def draw_agreement_chart(found: Advice) -> Svg | None:
    """The share of positions with the dense model's top-1 prediction, over the share removed; None without logits."""
    if any(figures.agreement is None for figures in found.dense.texts.values()):
        return None

    def draw(axes: Axes) -> None:
        xs = [0.0, *(100 * point.sparsity for point in found.division)]
        for number, text in enumerate(found.texts):
            ys = [100 * (point.texts[text].agreement or 0.0) for point in (found.dense, *found.division)]
            axes.plot(xs, ys, "o-", color=SERIES[number % len(SERIES)], markersize=4, label=name_text(text))
        axes.yaxis.set_major_formatter(format_percent)
        label_removed(axes, "same top-1 prediction")

    return draw_chart(draw, "agreement with the dense model over the share removed", 3.2)


def draw_families_chart(found: Advice) -> Svg:
    """The mean rise of the loss over the share removed: of each family by itself, and of the division."""

    def draw(axes: Axes) -> None:
        for number, (name, points) in enumerate(found.families.items()):
            _draw_line(axes, found, points, SERIES[number % len(SERIES)], name)
        if len(found.families) > 1:
            _draw_line(axes, found, found.division, QUIET, "as pruned", "--")
        label_removed(axes, "rise of the loss")

    return draw_chart(draw, "rise of the loss over the share removed, family by family", 3.2)


def _draw_line(axes: Axes, found: Advice, points: tuple[Point, ...], colour: str, label: str, style: str = "-") -> None:
    rises = [point.rise for point in points]
    known = [(100 * point.sparsity, rise) for point, rise in zip(points, rises, strict=True) if math.isfinite(rise)]
    xs, ys = [0.0, *(x for x, _ in known)], [0.0, *(y for _, y in known)]
    axes.plot(xs, ys, marker="o", linestyle=style, color=colour, markersize=4, label=label)


def draw_layers_chart(rises: tuple[float, ...], name: str) -> Svg:
    """The rise of the loss if one layer has half of its units: a bar a layer."""

    def draw(axes: Axes) -> None:
        axes.bar(range(len(rises)), rises, color=SERIES[0], width=0.7)
        axes.set_xlabel("layer")
        axes.set_ylabel("rise of the loss")
        axes.grid(axis="y", linewidth=0.6)

    return draw_chart(draw, f"rise of the loss if one layer of {name} has half of its units", 2.6)


def draw_front_chart(found: Shapes) -> Svg:
    """The metric over the cost. Rings: before training. Dots: after. The line is the Pareto front."""
    best = sorted(found.front, key=lambda shape: shape.cost)

    def draw(axes: Axes) -> None:
        points = [(_scale_cost(shape), _compute_figure(found, shape.loss)) for shape in best if shape.loss < WORST]
        axes.plot(*zip(*points, strict=True), color=QUIET, linewidth=1, linestyle="--", zorder=1)
        for number, shape in _list_drawn(found):
            x, (first, *_, last) = (
                _scale_cost(shape),
                (*_compute_figures(found, shape), _compute_figure(found, shape.loss)),
            )
            # A ring for the loss before any training, a dot for the last, and a line between them.
            axes.plot([x, x], [first, last], color=SERIES[0], linewidth=1)
            axes.plot(x, first, "o", color=QUIET, markerfacecolor="none", markersize=6)
            if shape.rungs:
                axes.plot(x, last, "o", color=SERIES[0], markersize=6)
            if shape.rungs or shape in best:
                axes.annotate(f"{number}", (x, last), (6, 5), textcoords="offset points", size=9)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:.4g}")
        axes.tick_params(axis="y", which="minor", labelsize=8)
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(name_cost(found))
        axes.set_ylabel(f"{found.metric} (less is better)")
        axes.grid(linewidth=0.6)

    return draw_chart(draw, f"{found.metric} over {name_cost(found)} of {len(found.shapes)} shapes", 3.2)


def draw_training_chart(found: Shapes) -> Svg | None:
    """The metric of each trained shape over its training tokens; None if no shape was trained."""
    trained = [(number, shape) for number, shape in _list_drawn(found) if shape.rungs]
    if not trained:
        return None

    def draw(axes: Axes) -> None:
        for number, shape in trained:
            tokens = [0, *(rung.tokens for rung in shape.rungs)]
            colour = SERIES[(number - 1) % len(SERIES)]
            axes.plot(tokens, _compute_figures(found, shape), "o-", color=colour, markersize=4, label=f"{number}")
        axes.set_xlabel("tokens trained on")
        axes.set_ylabel(found.metric)
        axes.grid(axis="y", linewidth=0.6)
        axes.figure.legend(loc="outside right upper", title="shape", handlelength=1.4)

    return draw_chart(draw, f"{found.metric} of the shapes that were trained, over tokens", 3.2)


def name_cost(found: Shapes) -> str:
    """What ``Shape.cost`` counts."""
    return "parameters (millions)" if found.dense.latency_ms is None else "predicted milliseconds"


def _scale_cost(shape: Shape) -> float:
    return shape.cost if shape.latency_ms is not None else shape.cost / 1e6


def _list_drawn(found: Shapes) -> list[tuple[int, Shape]]:
    """The shapes whose losses are finite, with their numbers in the table."""
    return [(n, shape) for n, shape in enumerate(found.shapes, 1) if max(shape.stages) < WORST]


def _compute_figures(found: Shapes, shape: Shape) -> Sequence[float]:
    return [_compute_figure(found, loss) for loss in shape.stages]


def _compute_figure(found: Shapes, loss: float) -> float:
    value = found.to_figure(loss)
    assert value is not None
    return value
