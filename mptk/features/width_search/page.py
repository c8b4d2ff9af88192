"""page: the ranking of a search on an HTML page, with charts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mptk.features.width_search.shapes import WORST, Shape, Shapes
from mptk.features.width_search.view import SEARCH_TITLE, build_shapes_view
from mptk.report.page.render import FRONT_LINE, Chapter, Figure, fill_template
from mptk.report.page.svg import QUIET, SERIES, Svg, draw_chart
from mptk.report.view import Section, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def render_shapes_page(found: Shapes) -> str:
    """One page about the shapes of a search."""
    view = build_shapes_view(found)
    best = [Section("The best one", [found.command])] if found.command else []
    drawn = {SEARCH_TITLE: draw_ranking_figures(found)}
    return fill_template([Chapter(View([*view.sections, *best], view.title), drawn)])


def draw_ranking_figures(found: Shapes) -> list[Figure]:
    """The charts of a search."""
    caption = f"Rings: before training. Dots: after. Numbers as in the table. {FRONT_LINE}"
    front, training = draw_front_chart(found), draw_training_chart(found)
    more = "After each rung the better half of the shapes is trained for twice as long."
    trained = [] if training is None else [Figure("Training", training, more)]
    return [Figure("Cost and quality of each shape", front, caption), *trained]


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
