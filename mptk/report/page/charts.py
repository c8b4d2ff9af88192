"""charts: one function draws one chart of a pruned folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mptk.ir.plan import FamilyPlan
from mptk.ort.bench import Bench
from mptk.report.page.runs import Run
from mptk.report.page.svg import BAD, INK, LINE, PAPER, QUIET, SERIES, Svg, chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW = 0.38
"""Inches of a row of bars."""
TICKS = 64
"""More legal widths than that are drawn as a line."""
CELLS = 192
"""Columns of a map of units. More units than that share a cell."""
FAINT = 1e-10
"""Where a difference of zero stands on a scale of powers of ten."""
COSTS = (
    ("block", "block parameters"),
    ("parameters", "all parameters"),
    ("flops", "FLOPs a token"),
    ("bytes", "bytes"),
    ("latency_ms", "predicted latency"),
)
TRACES = (
    ("loss", ("loss", "lm", "kl")),
    ("cost", ("cost", "target")),
    ("widths, as shares of the dense ones", ("width/",)),
    ("dual z, and what is left of removed masks", ("z", "tail")),
)
"""Title → the metrics that it shows; one that ends in ``/`` stands for all that begin so."""


def widths_chart(run: Run) -> Svg:
    """A bar for each family: what was kept of its dense width. Marks below it are the legal widths."""
    families = list(run.report.families.items())

    def draw(axes: Axes) -> None:
        _share_axis(axes, [name for name, _ in families])
        for row, (name, family) in enumerate(families):
            legal = run.report.legal.get(name, {"widths": (), "refused": None})
            share, of = family["width"] / family["of"], family["of"]
            colour = QUIET if legal["refused"] else SERIES[0]
            axes.barh(row, 1, 0.5, color=LINE)
            axes.barh(row, share, 0.5, color=colour, alpha=0.5 if legal["refused"] else 1)
            text = f"{of} → {family['width']}" if share < 1 else f"{of}, refused" if legal["refused"] else f"{of}"
            axes.text(1.02, row, text, va="center", size=9)
            shares = [width / of for width in legal["widths"]]
            if len(shares) > TICKS:
                axes.plot([shares[0], shares[-1]], [row + 0.36] * 2, color=INK, linewidth=1)
            elif len(shares) > 1:
                axes.plot(shares, [row + 0.36] * len(shares), "|", color=INK, markersize=4, markeredgewidth=0.8)

    return chart(draw, f"{run.name}: the width of each family", 0.45 + ROW * len(families))


def cost_chart(run: Run) -> Svg:
    """A bar for each cost: the pruned model's share of the dense one's."""
    dense, pruned = run.report.cost["dense"], run.report.cost["pruned"]
    rows = [(key, label) for key, label in COSTS if dense.get(key)]

    def draw(axes: Axes) -> None:
        _share_axis(axes, [label for _, label in rows])
        for row, (key, _) in enumerate(rows):
            share = pruned[key] / dense[key]
            axes.barh(row, 1, 0.5, color=LINE)
            axes.barh(row, share, 0.5, color=SERIES[0])
            axes.text(1.02, row, f"{1 - share:.1%} less", va="center", size=9)

    return chart(draw, f"{run.name}: costs as shares of the dense model's", 0.45 + ROW * len(rows))


def _share_axis(axes: Axes, names: Sequence[str]) -> None:
    """Rows from the top down, on a scale from nothing to all, with room for a text at the right."""
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(0, 1.3)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.tick_params(axis="y", length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def kept_shares(family: FamilyPlan) -> tuple[np.ndarray, int]:
    """What is kept, layers × cells, and the units that share a cell (fewer in a row's last)."""
    rows = []
    for keep in family.keep.values():
        kept = np.zeros((len(keep), family.of))
        for scope, units in enumerate(keep):
            kept[scope, list(units)] = 1
        rows.append(kept.ravel())
    longest = max(map(len, rows))
    each = -(-longest // CELLS)
    starts = np.arange(0, longest, each)
    whole = np.full((len(rows), longest), np.nan)
    for number, row in enumerate(rows):
        whole[number, : len(row)] = row
    counts = np.add.reduceat(np.ones(longest), starts)
    return np.add.reduceat(whole, starts, axis=1) / counts, each


def kept_chart(run: Run, name: str) -> Svg:
    """A map of a family's units: a row for each layer, darker where more is kept."""
    shares, each = kept_shares(run.kept[name])
    image = np.zeros((*shares.shape, 4))
    image[..., :3] = (0.16, 0.47, 0.84)  # an image has its own colours: one that shows on white and on black
    image[..., 3] = np.nan_to_num(shares)
    tall = min(3.6, max(0.25, 0.09 * len(shares)))

    def draw(axes: Axes) -> None:
        extent = (0, shares.shape[1] * each, len(shares) - 0.5, -0.5)
        axes.imshow(image, aspect="auto", interpolation="none", extent=extent)
        axes.set_xlabel(f"unit ({each} in a cell)" if each > 1 else "unit")
        axes.set_ylabel("layer" if len(shares) > 1 else "")
        axes.locator_params(axis="y", integer=True)
        if len(shares) == 1:
            axes.set_yticks([])
        for side in ("top", "right"):
            axes.spines[side].set_visible(True)

    return chart(draw, f"{run.name}: kept units of {name}", 0.7 + tall)


def trace_charts(run: Run, phase: str) -> list[Svg]:
    """The traces of a phase of training of which there is something to see."""
    rows = run.metrics[phase]
    return [
        trace_chart(run, phase, title, lines) for title, keys in TRACES if rows and (lines := _lines(run, rows, keys))
    ]


Line = tuple[list[str], list[float]]
"""Metrics that are the same in each step, and their values."""


def _lines(run: Run, rows: Sequence[Mapping[str, object]], keys: Sequence[str]) -> list[Line]:
    """The metrics that the keys stand for, without those that are always zero."""
    found: list[Line] = []
    for name in (n for key in keys for n in rows[0] if n == key or (key.endswith("/") and n.startswith(key))):
        family = run.report.families.get(name.removeprefix("width/"))
        dense = 1 if family is None or "/" not in name else family["of"]
        values = [_number(row.get(name)) / dense for row in rows]
        alike = next((names for names, other in found if np.allclose(values, other, rtol=1e-4, equal_nan=True)), None)
        if alike is not None:
            alike.append(name)
        elif any(values):
            found.append(([name], values))
    return found


def _number(value: object) -> float:
    """A logged number. What is not finite is null in JSON."""
    return float(value) if isinstance(value, int | float) else float("nan")


def trace_chart(run: Run, phase: str, title: str, lines: Sequence[Line]) -> Svg:
    """Metrics of a phase of training over its steps, widths as shares of the dense ones."""
    steps = [row["step"] for row in run.metrics[phase]]

    def draw(axes: Axes) -> None:
        for number, (names, values) in enumerate(lines):
            colour, style = SERIES[number % len(SERIES)], ("-", "--", "-.", ":")[number % 4]
            label = ", ".join(short(name.removeprefix("width/")) for name in names)
            axes.plot(steps, values, style, color=colour, label=label, marker="o" if len(steps) == 1 else "")
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(axis="y", linewidth=0.6)
        axes.locator_params(axis="x", integer=True)
        axes.ticklabel_format(axis="y", useOffset=False, style="plain")
        if len(lines) > 1 or len(lines[0][0]) > 1:
            axes.legend(loc="best", handlelength=2.2)

    return chart(draw, f"{run.name}: {title} in phase {phase}", 2.3)


def proof_chart(run: Run) -> Svg:
    """A dot for each stage of the proof: its difference, on a scale of powers of ten, and its tolerance."""
    proof = run.report.proof

    def draw(axes: Axes) -> None:
        axes.set_yticks(range(len(proof)), [short(stage["stage"]) for stage in proof])
        axes.set_ylim(len(proof) - 0.4, -0.6)
        axes.set_xscale("log")
        for row, stage in enumerate(proof):
            found, most = _number(stage["relative"]), stage["tolerance"]
            colour = SERIES[0] if stage["ok"] else BAD
            place = min(max(found, FAINT), 1e3) if found == found else 1e3
            axes.plot([FAINT, place], [row, row], color=colour, linewidth=1)
            axes.plot(place, row, "o" if found else "D", color=colour, markerfacecolor=colour if found else PAPER)
            if most:
                axes.plot(most, row, "|", color=INK, markersize=11, markeredgewidth=1.6)
        axes.set_xlim(FAINT / 3, None)
        axes.locator_params(axis="x", numticks=7)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axes.set_xlabel("relative difference")
        axes.grid(axis="x", linewidth=0.6)
        axes.minorticks_off()
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)

    return chart(draw, f"{run.name}: each stage of the proof, and its tolerance", 0.6 + 0.27 * len(proof))


def bench_chart(run: Run, bench: Bench) -> Svg:
    """A bar for each graph in each case: its time over the first graph's. A mark is the ideal."""
    cases = list(dict.fromkeys(row.case for row in bench.rows))
    graphs = [graph.name for graph in bench.graphs]
    tall = 0.8 / len(graphs)

    def draw(axes: Axes) -> None:
        for index, name in enumerate(graphs):
            rows = {row.case: row for row in bench.rows if row.graph == name}
            for at, case in enumerate(cases):
                if case not in rows:
                    continue
                row, place = rows[case], at + (index - (len(graphs) - 1) / 2) * tall
                label = short(name) if at == 0 else "_"
                axes.barh(place, row.ratio, tall * 0.85, color=SERIES[index % len(SERIES)], label=label)
                axes.text(row.ratio + 0.02, place, f" {row.ms:.1f} ms", va="center", size=8.5)
                if index:
                    ends = [place - tall * 0.5, place + tall * 0.5]
                    ideal = "ideal" if at == 0 and index == 1 else "_"
                    axes.plot([row.ideal] * 2, ends, color=INK, linewidth=2, solid_capstyle="butt", label=ideal)
        threads = [f"{case}\n{case.threads} thread{'s' * (case.threads != 1)}" for case in cases]
        axes.set_yticks(range(len(cases)), threads)
        axes.set_ylim(len(cases) - 0.45, -0.55)
        axes.set_xlim(0, 1.25 * max(row.ratio for row in bench.rows))
        axes.set_xlabel(f"time / time of {short(graphs[0])}")
        axes.figure.legend(loc="outside upper left", ncols=2, handlelength=1.2)
        axes.tick_params(axis="y", length=0)

    wanted = 0.9 + 0.22 * -(-len(graphs) // 2) + len(cases) * max(0.45, 0.24 * len(graphs))
    return chart(draw, f"{run.name}: times in ONNX Runtime over those of {graphs[0]}, and the ideal", wanted)


def short(name: str, most: int = 24) -> str:
    """A name that fits a legend: its end, which tells paths apart."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def stages_chart(run: Run) -> Svg:
    """The seconds of each stage of the run, the longest ten."""
    rows = sorted(run.report.stages, key=lambda stage: -stage["seconds"])[:10]

    def draw(axes: Axes) -> None:
        longest = max((stage["seconds"] for stage in rows), default=1) or 1
        axes.barh(range(len(rows)), [stage["seconds"] for stage in rows], 0.6, color=SERIES[0])
        for row, stage in enumerate(rows):
            axes.text(stage["seconds"] + 0.02 * longest, row, f"{stage['seconds']:.1f} s", va="center", size=9)
        axes.set_yticks(range(len(rows)), [short(stage["name"]) for stage in rows])
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_xlim(0, 1.2 * longest)
        axes.set_xticks([])
        axes.tick_params(axis="y", length=0)
        axes.spines["bottom"].set_visible(False)

    return chart(draw, f"{run.name}: seconds of each stage", 0.2 + 0.28 * max(1, len(rows)))
