"""sections: the views of a report, of timings, of a proof and of an estimate.

The terminal, the model card and the HTML page render the same views, so a figure is worded once, here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from mptk.cost.budgets import CACHE_CONTEXT
from mptk.cost.estimate import Estimate, describe_duration, describe_size
from mptk.ir import KERNEL_BLOCK
from mptk.ort.bench import Bench
from mptk.plugins import load_parts
from mptk.protocols import Report, Row
from mptk.report.row_view import RowView
from mptk.report.runs import (
    Comparable,
    MetricsLine,
    Run,
    describe_legal,
    explain_uncut,
    find_front,
    group_runs,
    name_group,
    shorten_model_name,
)
from mptk.report.view import (
    Bad,
    Good,
    Name,
    Section,
    Share,
    Table,
    View,
    format_count,
    format_difference,
    format_figure,
    format_megabytes,
)

COSTS = {
    "block": "block parameters",
    "parameters": "all parameters",
    "flops": "FLOPs a token",
    "bytes": "bytes of the weights",
    "kv_cache": "bytes of the KV cache at {context:,} tokens",
    "serving": "bytes of weights and KV cache",
    "latency_ms": "predicted {objective} (ms)",
}
"""Costs in a report → their names."""
CUT_TITLE, PROOF_TITLE = "What was cut, and why not more", "The proof, stage by stage"
QUALITY, CONTINUATIONS, TIMES, RUN = "Quality", "What they write", "Latency in ONNX Runtime", "The run"
HEIGHTS = "▁▂▃▄▅▆▇█"
"""Heights of a line that is drawn in text."""
LINE_LENGTH = 32
"""Most characters of such a line. The table of a run then fits 80 columns."""


def build_prune_view(
    report: Report,
    bench: Bench | None = None,
    texts: Mapping[str, tuple[str, str]] = MappingProxyType({}),
    metrics: Mapping[str, Sequence[Row]] = MappingProxyType({}),
) -> View:
    """The view of a run: the cut, the quality, the proof, the training, the speed, and how the folder was made.

    ``texts``, ``metrics``: as in ``Run``. A page leaves ``metrics`` out, since it draws them.
    """
    # What a reader asks first comes first: what was cut, and how good is it? Sections without content are left out.
    found = [
        Section(CUT_TITLE, [build_width_table(report), build_cost_table(report)]),
        Section(QUALITY, describe_quality(report)),
    ]
    if texts:
        said = [[Name(each) for each in (prompt, *written)] for prompt, written in texts.items()]
        found.append(Section(CONTINUATIONS, [Table("lll", ["prompt", "dense", "pruned"], said)]))
    for row, view in list_row_views(report):
        found += view.build_sections(row)
    if report.splits:
        # The method took the lowest loss, so the first row is the one that was taken. In JSON null is no finite number.
        tried = sorted(report.splits.items(), key=lambda split: math.inf if split[1] is None else split[1])
        rows = [
            [Name(f"{widths} (taken)" if not row else widths), format_figure(loss)]
            for row, (widths, loss) in enumerate(tried)
        ]
        table = Table("lr", ["widths", "loss on calibration text"], rows)
        found.append(Section("Divisions of the budget that were tried", [table]))
    found.append(Section(PROOF_TITLE, [build_proof_table(report.proof), describe_proof(report)]))
    found += [Section(f"Training: {phase}", [build_course_table(rows)]) for phase, rows in metrics.items()]
    if bench is not None:
        found.append(Section(TIMES, describe_timings(bench)))
    return View(
        [*found, Section(RUN, build_run_section(report))],
        f"{shorten_model_name(report.model)} pruned{report.describe_choice()}",
    )


def build_width_table(report: Report) -> Table:
    """Each cut family, tokens and KV heads: width, legal widths, and why it was not cut further."""
    rows = [
        [
            Name(name),
            str(row["layers"]),
            _format_width(row["of"], row["width"]),
            describe_legal(report, name),
            explain_uncut(report, name),
        ]
        for name, row in report.families.items()
    ]
    # Conversions before the cut have widths, too, but no legal ones: the user gave the number.
    for row, view in list_row_views(report):
        for name, of, kept in view.list_widths(row):
            rows.append([name, "", _format_width(of, kept), "", ""])
    return Table("lrrll", ["family", "layers", "width", "legal widths", "why not more"], rows)


def list_row_views(report: Report) -> list[tuple[Row, RowView]]:
    """The rows that features have in a report, with what shows them; without rows of features that are not there."""
    views = load_parts("views") if report.rows else {}
    return [(row, views[name]()) for name, row in report.rows.items() if name in views]


def _format_width(of: int, width: int) -> Share:
    return Share(f"{of} → {width}" if width < of else f"{of}", width / of)


def build_cost_table(report: Report) -> Table:
    """Both models' costs."""
    dense, pruned = report.cost["dense"], report.cost["pruned"]
    rows = []
    for key, label in COSTS.items():
        if key in dense:
            decimals = 2 if key == "latency_ms" else 0
            figures = [f"{cost[key]:,.{decimals}f}" for cost in (dense, pruned)]
            gone = 1 - pruned[key] / dense[key]
            said = label.format(objective=report.settings.objective, context=report.settings.context or CACHE_CONTEXT)
            rows.append([said, *figures, Share(f"{gone:.1%}", gone)])
    return Table("lrrr", ["", "dense", "pruned", "removed"], rows)


def describe_quality(report: Report) -> list[Table | str]:
    """Quality and size of each model."""
    # A run that is stopped after publishing leaves a proven folder without quality.
    found, sizes = report.quality, {name: row["bytes"] for name, row in report.cost.items()}
    if not found:
        return ["Not measured, since the run was stopped earlier; run mptk eval."]
    # A cut competes with the dense model in each type, too.
    types = report.quantized.items()
    rows = [("dense", found["dense"], sizes["dense"])]
    rows += [
        (f"dense, {scheme} in ONNX Runtime", row["dense"].get("quality"), row["dense"]["bytes"])
        for scheme, row in types
        if "dense" in row
    ]
    rows.append(("pruned", found["pruned"], sizes["pruned"]))
    rows += [(f"pruned, {scheme} in ONNX Runtime", row.get("quality"), row["bytes"]) for scheme, row in types]
    said = [
        [
            name,
            *_format_change(value, found["dense"], format_figure),
            *_format_change(size, sizes["dense"], format_megabytes),
        ]
        for name, value, size in rows
    ]
    return [
        Table("lrrrr", ["model", Name(found["metric"]), "change", "size", "change"], said),
        Name(f"{found['metric']}: {found['protocol']}"),
        *list_further_figures(found),
    ]


def list_further_figures(found: Row) -> list[str]:
    """A line for each figure beside the metric: its value for each model."""
    return [
        Name(f"{name}: {', '.join(f'{format_figure(value)} {model}' for model, value in values.items())}")
        for name, values in found.items()
        if isinstance(values, Mapping)
    ]


def _format_change(value: float | None, dense: float, shown: Callable[[float], str]) -> list[str]:
    """A value, and its change from the dense model's in percent; the dense model itself has none."""
    if value is None:
        return ["not measured", ""]
    return [shown(value), "" if value == dense or not dense else f"{value / dense - 1:+.1%}"]


def build_proof_table(rows: Sequence[Row]) -> Table:
    """Each stage's difference, its tolerance, and why a tolerance was widened."""
    found = []
    for row in rows:
        said = ", ".join([row[key] for key in ("widened", "ran", "failure") if row.get(key)])
        held = (Good if row["ok"] else Bad)(", ".join(filter(None, ["ok" if row["ok"] else "FAILED", said])))
        found.append(
            [Name(row["stage"]), *(format_difference(row[key]) for key in ("max_abs", "relative", "tolerance")), held]
        )
    return Table("lrrrl", ["stage", "absolute", "relative", "tolerance", "result"], found)


def describe_proof(report: Report) -> str:
    """A sentence on what the proof compared."""
    codes = any(row["stage"].endswith(" weights") and row["stage"] != "stored weights" for row in report.proof)
    steps = "The weights of a quantised graph differ by parts of a step of their rounding: up to 1 is right. "
    return (
        "Each stage is compared with the dense model whose removed units are masked, on samples of up to "
        f"{report.proof_length:,} tokens or positions. A relative difference is relative to the largest output. "
        f"{steps if codes else ''}mptk verify repeats it."
    )


def build_proof_view(rows: Sequence[Row]) -> View:
    """``mptk verify``: a proof."""
    return View([Section("", [build_proof_table(rows)])])


def build_course_table(rows: Sequence[Row]) -> Table:
    """The metrics of a training phase: the first and the last value, and a line of all values between."""
    names = dict.fromkeys(name for row in rows for name in row if name not in MetricsLine.__annotations__)
    courses = {name: [row[name] for row in rows if isinstance(row.get(name), int | float)] for name in names}
    found = [
        [Name(name), format_figure(course[0]), draw_line(course), format_figure(course[-1])]
        for name, course in courses.items()
        if course
    ]
    steps = [str(row["step"]) for row in (rows[0], rows[-1])]
    return Table("lrlr", ["metric", f"step {steps[0]}", "", f"step {steps[1]}"], found)


def draw_line(values: Sequence[float]) -> str:
    """Values as bars of text from the lowest to the highest; of many, the mean of each part."""
    count = min(len(values), LINE_LENGTH)
    bounds = [len(values) * i // count for i in range(count + 1)]
    parts = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = min(parts), max(parts)
    if not high > low:
        return HEIGHTS[0] * count
    return "".join(HEIGHTS[min(int((part - low) / (high - low) * len(HEIGHTS)), len(HEIGHTS) - 1)] for part in parts)


def build_run_section(report: Report) -> list[Table | str]:
    """How the folder was made, and notes."""
    settings, versions = report.settings, [f"{name} {found}" for name, found in report.versions.items()]
    chosen = f"{settings.method}, {settings.steps} training steps, seed {settings.seed}"
    rows = [["dense model", report.model], ["method", chosen], ["target", settings.target]]
    rows += [[n, f"{d['source']}, {d['samples']} samples"] for n, d in report.data.items() if n != "files"]
    rows.append(["versions", ", ".join([f"mptk {report.mptk}", *versions])])
    how = Table("ll", ["", ""], [[name, Name(said)] for name, said in rows])
    return [how, build_stage_table(report), *map(Name, report.notes)]


def build_stage_table(report: Report) -> Table:
    """The ten stages of the run that took longest: passes are stages, too, so there may be dozens."""
    slowest = sorted(report.stages, key=lambda stage: -stage["seconds"])[:10]
    longest = max((stage["seconds"] for stage in slowest), default=0) or 1
    rows = [[Name(s["name"]), Share(f"{s['seconds']:.1f}", s["seconds"] / longest)] for s in slowest]
    return Table("lr", ["longest stages", "seconds"], rows)


def build_bench_view(bench: Bench) -> View:
    """``mptk bench``: timings of graphs."""
    return View([Section("", describe_timings(bench))])


def describe_timings(bench: Bench) -> list[Table | str]:
    """Each graph in each case, the size of each graph, and the machine's peaks."""
    # The timings; then how large each graph is on disk and in memory.
    rows = [
        [
            str(row.case),
            Name(row.graph),
            str(row.case.threads),
            f"{row.ms:.1f} ± {row.iqr_ms:.1f}",
            f"{row.tokens_s:.0f}",
            f"{row.ratio:.3f}",
            f"{row.ideal:.3f}",
            f"{row.roofline:.0%}",
        ]
        for row in bench.rows
    ]
    columns = ["case", "graph", "threads", "ms", "a second", "ratio", "ideal ratio", "of the peak"]
    sizes = [
        [Name(graph.name), format_megabytes(graph.bytes), format_megabytes(graph.memory)] for graph in bench.graphs
    ]
    # The machine: its peaks, of which a row says what share a graph reached, and what ran on it.
    peaks = [
        f"{format_count(threads, 'thread')}: {peak.flops / 1e9:.0f} GFLOP/s in a matrix product, "
        f"{peak.bandwidth / 1e9:.1f} GB/s read"
        for threads, peak in bench.peaks.items()
    ]
    ran = Name(f"ONNX Runtime {bench.onnxruntime}, {', '.join(bench.providers)}")
    how = (
        f"Median of {bench.rounds} alternating rounds. The ratio is the median of the rounds' ratios, so that load in "
        "one does not count. Of the peak: the share of what memory or products allow; above 100 % if caches hold "
        "what the peak reads from memory. Times hold for the machine that measured them."
    )
    tables = [Table("llrrrrrr", columns, rows), Table("lrr", ["graph", "files", "memory"], sizes)]
    return [*tables, *describe_unaligned(bench), *peaks, ran, how]


def describe_unaligned(bench: Bench) -> list[Table | str]:
    """What widths cost that are no multiples of the kernels' block; empty if all are multiples."""
    if not bench.unaligned:
        return []
    rows = [
        [
            Name(each.graph),
            f"{each.rows} × {each.inputs} × {each.outputs}",
            f"{each.ms:.3f}",
            " × ".join(map(str, each.aligned)),
            f"{each.aligned_ms:.3f}",
            f"{each.ms / each.aligned_ms:.2f}",
        ]
        for each in bench.unaligned
    ]
    return [
        Table("llrrrr", ["graph", "product", "ms", "aligned", "ms", "ratio"], rows),
        f"Widths that are no multiples of {KERNEL_BLOCK} beside the next ones that are; `--align cpu` keeps to these.",
    ]


def build_comparison_view(runs: Sequence[Run]) -> View:
    """Pruned folders side by side; only runs that may be compared share a table."""
    groups, unmeasured = group_runs(runs)
    found = [Section(name_group(number, group), describe_group(group)) for number, group in enumerate(groups)]
    if unmeasured:
        names = ", ".join(run.name for run in unmeasured)
        found.append(Section("Not compared", [Name(f"quality was not measured: {names}")]))
    return View(found, f"{len(runs)} pruned models side by side")


def describe_group(group: Comparable) -> list[Table | str]:
    """Runs that may be compared, and the dense model."""
    first, best = group.first.report, [run.name for run in find_front(group)]
    several = len(group.runs) > 1
    rows = [
        [Name(f"{run.name} ★" if several and run.name in best else run.name), *_build_run_row(run.report)]
        for run in group.runs
    ]
    size, metric = format_megabytes(first.cost["dense"]["bytes"]), first.quality["metric"]
    rows.append(["dense", "", "", f"{0:.1%}", size, format_figure(first.quality["dense"]), ""])
    # A front needs at least two runs. How a group differs from the first says why it has a table of its own.
    columns = ["run", "method", "steps", "removed", "size", Name(metric), "widths"]
    apart = [f"Not comparable with the first group: {group.apart}."] if group.apart else []
    star = ["★ Pareto-optimal: no other run of this table removes as much and is as good"] if several else []
    about = [Name(f"dense model: {first.model}"), Name(f"{metric}: {first.quality['protocol']}")]
    return [*apart, *about, Table("llrrrrl", columns, rows), *star]


def _build_run_row(report: Report) -> list[str]:
    cut = [f"{name} {row['width']}" for name, row in report.families.items() if row["width"] < row["of"]]
    figures = [
        f"{report.sparsity:.1%}",
        format_megabytes(report.cost["pruned"]["bytes"]),
        format_figure(report.quality["pruned"]),
    ]
    return [Name(report.settings.method), str(report.settings.steps), *figures, Name(", ".join(cut))]


def build_estimate_view(found: Estimate) -> View:
    """Memory, disk space and time that a run needs, part by part."""
    # Each part, then the sum of the parts, behind which a line ends the block. Disk space is shown even if it is none.
    rows: list[list[str]] = []
    ends = []
    for what, parts, said in (
        ("memory", {**found.needed, **found.held}, describe_size),
        (f"memory on {found.device}", found.there, describe_size),
        ("disk", {**found.output, **found.temporary}, describe_size),
        ("time", found.seconds, describe_duration),
    ):
        if parts or what == "disk":
            whole = {**parts, "in all": sum(parts.values())}
            rows += [["" if number else what, name, said(size)] for number, (name, size) in enumerate(whole.items())]
            ends.append(len(rows) - 1)
    return View([Section("", [Table("llr", ["", "for", "about"], rows, ends), f"A run {found}."])])
