"""page: an advice on an HTML page, with charts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mptk.features.advise.advice import Advice, Point, Way
from mptk.features.advise.view import (
    BY_FAMILY,
    CUTS,
    SAFE,
    SENSITIVE,
    WAYS,
    build_advice_view,
    list_commands,
    name_text,
)
from mptk.report.page.render import Chapter, Figure, fill_template
from mptk.report.page.svg import BAD, PAPER, QUIET, SERIES, Svg, draw_chart
from mptk.report.view import Section, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEMORY, FILE_SIZE = "memory in decoding", "size"
"""What a chart may count beside the milliseconds of a phase."""
AXIS_MARGIN = 1.15
"""How much farther an axis goes than what is drawn over it."""


def render_advice_page(found: Advice) -> str:
    """One page about an advice."""
    # Some charts need what not every advice has: logits for the agreement, more layers than one.
    view = build_advice_view(found)
    bars = "Bars: two standard errors. The dashed line is the tolerance; above it the axis is logarithmic."
    bars += "" if found.recovery is None else " Shaded: after training."
    same = draw_agreement_chart(found)
    drawn = {
        SAFE: [Figure("", draw_change_chart(found), bars)],
        CUTS: [] if same is None else [Figure("", same)],
        BY_FAMILY: [Figure("", draw_families_chart(found))],
        SENSITIVE: [Figure(name, draw_layers_chart(rises, name)) for name, rises in found.layers.items()],
    }
    if found.ways:
        drawn[WAYS] = list_ways_charts(found)
    said = list_commands(found)
    best = [Section("The command", said)] if said else []
    first, *others = view.sections
    return fill_template([Chapter(View([first, *best, *others], view.title), drawn)])


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
        label_removal_axis(axes, RISES[found.measure])

    return draw_chart(draw, f"{RISES[found.measure]} over the share removed, for {len(found.texts)} texts", 3.4)


def list_ways_charts(found: Advice) -> list[Figure]:
    """Quality against each phase that is timed, memory if it is limited, and size."""
    said = "A line is a type, from the dense model (square) to the largest cut."
    said += " Dashed: the limit." if found.limits.is_set else ""
    said += " Rings: measured." if any(way.measured for way in found.ways) else ""
    limited = [MEMORY] if found.limits.memory is not None else []
    return [Figure("", draw_ways_chart(found, what), said) for what in (*found.ways[0].ms, *limited, FILE_SIZE)]


def draw_ways_chart(found: Advice, what: str) -> Svg:
    """The mean rise of the perplexity over what each way takes, a line for each type, and the limit as a line.

    Lines are as predicted. ``what``: a phase, ``MEMORY`` or ``FILE_SIZE``.
    """
    limits = found.limits
    known = {"decode": limits.decode_ms, "prefill": limits.prefill_ms, MEMORY: limits.memory, FILE_SIZE: limits.bytes}
    most = known[what]
    scale, unit = (1e6, "MB") if what in (MEMORY, FILE_SIZE) else (1, "ms")
    widest = max(take_amount(way, what) for way in found.ways) / scale

    def draw(axes: Axes) -> None:
        for number, name in enumerate(dict.fromkeys(way.type for way in found.ways)):
            colour, own = SERIES[number % len(SERIES)], [way for way in found.ways if way.type == name]
            xs, ys = [take_amount(way, what) / scale for way in own], [compute_percent(way) for way in own]
            axes.plot(xs, ys, "o-", color=colour, markersize=4, label=name)
            # The dense model's name stands beside its square, towards the middle of the chart.
            axes.plot(xs[0], ys[0], "s", color=colour, markersize=6)
            side, align = (7, "left") if xs[0] < 0.6 * widest else (-7, "right")
            where, units = (side, 6), "offset points"
            text = axes.annotate(f"dense {name}", (xs[0], ys[0]), where, textcoords=units, ha=align, zorder=4)
            # Another type's line may pass below the name.
            text.set(color=colour, fontsize=9, bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1})
            for way in [way.measured for way in own if way.measured is not None]:
                x, y = take_amount(way, what) / scale, compute_percent(way)
                axes.plot(x, y, "o", color=colour, markersize=9, fillstyle="none")
        # A limit beyond everything would press the lines together.
        if most is not None and most / scale < AXIS_MARGIN * widest:
            axes.axvline(most / scale, color=BAD, linewidth=1, linestyle="--")
        axes.set_xlim(0, AXIS_MARGIN * widest)
        axes.set_yscale("symlog", linthresh=10)
        percents = [compute_percent(way) for way in found.ways]
        axes.set_ylim(min(0.0, *percents) - 0.5, 1.2 * max(1.0, *percents))  # room for whole markers
        axes.yaxis.set_major_formatter(format_percent)
        label_removal_axis(axes, RISES["perplexity"])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"{what}, {unit}")

    return draw_chart(draw, f"rise of the perplexity over {what}, for each type", 3.4)


def take_amount(way: Way, what: str) -> float:
    """What a way takes of a phase, of ``MEMORY`` or of ``FILE_SIZE``."""
    return {**way.ms, MEMORY: way.memory or 0.0, FILE_SIZE: way.bytes}[what]


def compute_percent(way: Way) -> float:
    """The mean rise of the perplexity in percent."""
    rises = [figures.rise for figures in way.texts.values()]
    return 100 * math.expm1(min(sum(rises) / len(rises), 700.0))


def find_lowest(found: Advice) -> float:
    """The lowest change before and after training, at most 0."""
    cuts = [(point, text) for point in found.division for text in found.texts]
    after = [] if found.recovery is None else [found.estimate_after(point, text).least for point, text in cuts]
    return min([0.0, *(point.texts[text].change for point, text in cuts), *after])


def label_removal_axis(axes: Axes, what: str) -> None:
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
        label_removal_axis(axes, "same top-1 prediction")

    return draw_chart(draw, "agreement with the dense model over the share removed", 3.2)


def draw_families_chart(found: Advice) -> Svg:
    """The mean rise of the loss over the share removed: of each family by itself, and of the division."""

    def draw(axes: Axes) -> None:
        for number, (name, points) in enumerate(found.families.items()):
            _draw_line(axes, found, points, SERIES[number % len(SERIES)], name)
        if len(found.families) > 1:
            _draw_line(axes, found, found.division, QUIET, "as pruned", "--")
        label_removal_axis(axes, "rise of the loss")

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
