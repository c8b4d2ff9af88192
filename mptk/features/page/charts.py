"""charts: the charts of pruned folders, one function each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mptk.ir import FamilyPlan
from mptk.ort.bench import Bench
from mptk.report.page.charts import compute_bench_height, draw_bench_bars, shorten_name
from mptk.report.page.svg import BAD, INK, PAPER, QUIET, SERIES, Svg, draw_chart
from mptk.report.runs import Comparable, Run, find_front, shorten_model_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELLS = 192
"""Most columns in a map of units: with more, cells are too thin to be seen."""
STAGE_NAME = 26
"""Most characters of the name of a stage of the proof."""
FAINT = 1e-10
"""Position of a difference of zero on a scale of powers of ten, which has no zero."""
TRACES = (
    ("loss", ("loss", "lm", "kl")),
    ("cost", ("cost", "target")),
    ("widths, as shares of the dense ones", ("width/",)),
    ("dual z, the price of the budget", ("z",)),
    ("dual y, the mean over layers", ("y",)),
    ("masks of the tail, and units that came back from it, as shares", ("tail", "returned")),
)
"""Title → the metrics that it shows; a name that ends in ``/`` is a prefix."""


def map_kept_units(family: FamilyPlan) -> np.ndarray:
    """Whether each unit is kept, layers × units; nan beyond the units of a layer."""
    rows = []
    for keep in family.keep.values():
        kept = np.zeros((len(keep), family.of))
        for scope, units in enumerate(keep):
            kept[scope, list(units)] = 1
        rows.append(kept.ravel())
    whole = np.full((len(rows), max(map(len, rows))), np.nan)
    for number, row in enumerate(rows):
        whole[number, : len(row)] = row
    return whole


def draw_kept_chart(run: Run, name: str) -> Svg | None:
    """The units of a family, a row for each layer; of many units, each layer's share. None if it would say nothing."""
    kept = map_kept_units(run.kept[name])
    shares = np.nanmean(kept, axis=1)
    if kept.shape[1] > CELLS:
        return None if np.ptp(shares) == 0 else _draw_shares_chart(run, name, shares)
    # A picture, not bars: thousands of cells as shapes would be megabytes of SVG.
    image = np.zeros((*kept.shape, 4))
    image[..., :3] = (0.16, 0.47, 0.84)  # style sheets do not reach into a picture: a colour for white and for black
    image[..., 3] = np.nan_to_num(kept)
    tall = min(3.6, max(0.25, 0.09 * len(kept)))

    def draw(axes: Axes) -> None:
        axes.imshow(image, aspect="auto", interpolation="none", extent=(0, kept.shape[1], len(kept) - 0.5, -0.5))
        axes.set_xlabel("unit")
        axes.set_ylabel("layer" if len(kept) > 1 else "")
        axes.locator_params(integer=True)
        if len(kept) == 1:  # a family of one group has no layers to number
            axes.set_yticks([])
        for side in ("top", "right"):
            axes.spines[side].set_visible(True)

    return draw_chart(draw, f"{run.name}: kept units of {name}", 0.7 + tall)


def _draw_shares_chart(run: Run, name: str, shares: np.ndarray) -> Svg:
    def draw(axes: Axes) -> None:
        axes.bar(range(len(shares)), 100 * shares, color=SERIES[0])
        axes.set_xlabel("layer")
        axes.set_ylabel("kept (%)")
        axes.set_ylim(0, 100)
        axes.locator_params(axis="x", integer=True)

    return draw_chart(draw, f"{run.name}: share of {name} that each layer keeps", 1.8)


def draw_trace_charts(run: Run, phase: str) -> list[Svg]:
    """The metrics of a training phase that change."""
    rows = run.metrics[phase]
    return [
        draw_trace_chart(run, phase, title, lines)
        for title, keys in TRACES
        if rows and (lines := _collect_lines(run, rows, keys))
    ]


Line = tuple[list[str], list[float]]
"""Metrics that are equal in all steps, and their values."""


def _collect_lines(run: Run, rows: Sequence[Mapping[str, object]], keys: Sequence[str]) -> list[Line]:
    """The metrics that the keys name, except ones that are always zero."""
    found: list[Line] = []
    for name in (n for key in keys for n in rows[0] if n == key or (key.endswith("/") and n.startswith(key))):
        family = run.report.families.get(name.removeprefix("width/"))
        dense = 1 if family is None or "/" not in name else family["of"]
        # Metrics with the same curve (widths that are cut together) are one line with both names.
        values = [_read_metric(row.get(name)) / dense for row in rows]
        alike = next((names for names, other in found if np.allclose(values, other, rtol=1e-4, equal_nan=True)), None)
        if alike is not None:
            alike.append(name)
        elif any(values):
            found.append(([name], values))
    return found


def _read_metric(value: object) -> float:
    """A logged number; null in JSON means that it is not finite."""
    return float(value) if isinstance(value, int | float) else float("nan")


def draw_trace_chart(run: Run, phase: str, title: str, lines: Sequence[Line]) -> Svg:
    """Metrics of a phase of training over its steps, widths as shares of the dense ones."""
    steps = [row["step"] for row in run.metrics[phase]]

    def draw(axes: Axes) -> None:
        for number, (names, values) in enumerate(lines):
            # Colours and dashes have other periods, so 12 lines differ, and some also without colours.
            colour, style = SERIES[number % len(SERIES)], ("-", "--", "-.", ":")[number % 4]
            label = ", ".join(shorten_name(name.removeprefix("width/")) for name in names)
            axes.plot(steps, values, style, color=colour, label=label, marker="o" if len(steps) == 1 else "")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(axis="y", linewidth=0.6)
        axes.locator_params(axis="x", integer=True)
        axes.ticklabel_format(axis="y", useOffset=False, style="plain")
        if len(lines) > 1 or len(lines[0][0]) > 1:
            axes.legend(loc="best", handlelength=2.2)

    return draw_chart(draw, f"{run.name}: {title} in phase {phase}", 2.3)


def draw_proof_chart(run: Run) -> Svg:
    """Each stage of the proof: a dot for its difference, on a scale of powers of ten, and a mark for its tolerance."""
    proof = run.report.proof

    def draw(axes: Axes) -> None:
        # A row for each stage, the first at the top.
        axes.set_yticks(range(len(proof)), [shorten_name(stage["stage"], STAGE_NAME) for stage in proof])
        axes.set_ylim(len(proof) - 0.4, -0.6)
        axes.set_xscale("log")
        for row, stage in enumerate(proof):
            found, most = _read_metric(stage["relative"]), stage["tolerance"]
            colour = SERIES[0] if stage["ok"] else BAD
            place = min(max(found, FAINT), 1e3) if found == found else 1e3  # not a number: at the far end
            axes.plot([FAINT, place], [row, row], color=colour, linewidth=1)
            axes.plot(place, row, "o" if found else "D", color=colour, markerfacecolor=colour if found else PAPER)
            if most:
                axes.plot(most, row, "|", color=INK, markersize=11, markeredgewidth=1.6)
        axes.set_xlim(FAINT / 3, None)  # room for a diamond at 0
        axes.locator_params(axis="x", numticks=7)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axes.set_xlabel("relative difference")
        axes.grid(axis="x", linewidth=0.6)
        axes.minorticks_off()
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)

    return draw_chart(draw, f"{run.name}: each stage of the proof, and its tolerance", 0.6 + 0.27 * len(proof))


def draw_bench_chart(run: Run, bench: Bench) -> Svg:
    """The timings of a run's graphs."""
    label = f"{run.name}: times in ONNX Runtime over those of {bench.graphs[0].name}, and the ideal"
    return draw_chart(partial(draw_bench_bars, bench=bench), label, compute_bench_height(bench))


def draw_pareto_chart(group: Comparable) -> Svg:
    """Quality over the share of block parameters that was removed. The line is the Pareto front of several runs."""
    metric, dense = str(group.first.report.quality["metric"]), group.first.report.quality["dense"]
    best = find_front(group)

    def draw(axes: Axes) -> None:
        if len(group.runs) > 1:
            # The front begins at the dense model, which removes nothing.
            line = [(0.0, dense), *((100 * run.report.sparsity, run.report.quality["pruned"]) for run in best)]
            axes.plot(*zip(*line, strict=True), color=QUIET, linewidth=1, linestyle="--", zorder=1)
        axes.plot(0, dense, "D", color=INK, label=f"dense {shorten_model_name(group.first.report.model)}"[:44])
        for number, run in enumerate(group.runs):
            # Another marker once all colours are used.
            colour, marker = SERIES[number % len(SERIES)], "os^vPX"[number // len(SERIES) % 6]
            x, y = 100 * run.report.sparsity, run.report.quality["pruned"]
            label = f"{shorten_name(run.name)} ({run.report.settings.method})"
            axes.plot(x, y, marker, color=colour, markersize=8, label=label)
        axes.set_xlabel("block parameters removed (%)")
        axes.set_ylabel(f"{metric} ({'more' if group.rises else 'less'} is better)")
        axes.grid(linewidth=0.6)
        axes.figure.legend(loc="outside lower left", ncols=1)

    label = f"{metric} over the share removed, of {', '.join(run.name for run in group.runs)}"
    return draw_chart(draw, label, 2.7 + 0.2 * len(group.runs))
