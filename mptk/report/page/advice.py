"""advice: the charts of ``mptk advise``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mptk.protocols.advice import Advice, Point
from mptk.report.advice import short
from mptk.report.page.svg import BAD, QUIET, SERIES, Svg, chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def percent(value: float, _: object) -> str:
    """A number of percent as an axis shows it."""
    return f"{value:g} %"


def change_chart(found: Advice) -> Svg:
    """The change on each text over the share removed, with two standard errors, and the tolerance as a line."""
    xs = [100 * point.sparsity for point in found.division]

    def draw(axes: Axes) -> None:
        for number, text in enumerate(found.texts):
            colour = SERIES[number % len(SERIES)]
            ys = [100 * point.texts[text].change for point in found.division]
            errors = [100 * (point.texts[text].most - point.texts[text].change) for point in found.division]
            axes.errorbar(xs, ys, errors, color=colour, marker="o", markersize=4, label=short(text))
        axes.axhline(100 * found.tolerance, color=BAD, linewidth=1, linestyle="--")
        axes.set_yscale("symlog", linthresh=100 * found.tolerance)
        axes.set_ylim(bottom=min(0.0, *(100 * p.texts[text].change for p in found.division for text in found.texts)))
        axes.yaxis.set_major_formatter(percent)
        over_removed(axes, RISES[found.measure])

    return chart(draw, f"{RISES[found.measure]} over the share removed, for {len(found.texts)} texts", 3.4)


def over_removed(axes: Axes, what: str) -> None:
    """Finish a chart of ``what`` over the share removed."""
    axes.xaxis.set_major_formatter(percent)
    axes.set_xlabel("removed")
    axes.set_ylabel(what)
    axes.grid(linewidth=0.6)
    axes.figure.legend(loc="outside upper left", ncols=2, handlelength=1.6)


RISES = {
    "perplexity": "rise of the perplexity",
    "disagreement": "samples with another prediction",
    "loss": "loss against the dense outputs",
}


def agreement_chart(found: Advice) -> Svg | None:
    """The share of positions with the dense model's top-1 prediction, over the share removed; None without logits."""
    if any(figures.agreement is None for figures in found.dense.texts.values()):
        return None

    def draw(axes: Axes) -> None:
        xs = [0.0, *(100 * point.sparsity for point in found.division)]
        for number, text in enumerate(found.texts):
            ys = [100 * (point.texts[text].agreement or 0.0) for point in (found.dense, *found.division)]
            axes.plot(xs, ys, "o-", color=SERIES[number % len(SERIES)], markersize=4, label=short(text))
        axes.yaxis.set_major_formatter(percent)
        over_removed(axes, "same top-1 prediction")

    return chart(draw, "agreement with the dense model over the share removed", 3.2)


def families_chart(found: Advice) -> Svg:
    """The mean rise of the loss over the share removed: of each family by itself, and of the division."""

    def draw(axes: Axes) -> None:
        for number, (name, points) in enumerate(found.families.items()):
            _line(axes, found, points, SERIES[number % len(SERIES)], name)
        if len(found.families) > 1:
            _line(axes, found, found.division, QUIET, "as pruned", "--")
        over_removed(axes, "rise of the loss")

    return chart(draw, "rise of the loss over the share removed, family by family", 3.2)


def _line(axes: Axes, found: Advice, points: tuple[Point, ...], colour: str, label: str, style: str = "-") -> None:
    rises = [point.rise for point in points]
    known = [(100 * point.sparsity, rise) for point, rise in zip(points, rises, strict=True) if math.isfinite(rise)]
    xs, ys = [0.0, *(x for x, _ in known)], [0.0, *(y for _, y in known)]
    axes.plot(xs, ys, marker="o", linestyle=style, color=colour, markersize=4, label=label)


def layers_chart(rises: tuple[float, ...], name: str) -> Svg:
    """The rise of the loss if one layer has half of its units: a bar a layer."""

    def draw(axes: Axes) -> None:
        axes.bar(range(len(rises)), rises, color=SERIES[0], width=0.7)
        axes.set_xlabel("layer")
        axes.set_ylabel("rise of the loss")
        axes.grid(axis="y", linewidth=0.6)

    return chart(draw, f"rise of the loss if one layer of {name} has half of its units", 2.6)
