"""summary: the end of a run on one screen: what was cut, what it costs, whether it is proven, and what to do next.

``mptk report`` has all the rest. The page of ``mptk report --html`` begins with the same. On a terminal lines are text,
and not tables: they fit 80 columns and a log alike.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from mptk.protocols import Report
from mptk.report.runs import shorten_model_name
from mptk.report.sections import list_row_views
from mptk.report.view import CommandLine, Section, Table, format_count, format_figure, format_megabytes

SUMMARY_TITLE = "In short"
SAFE_CHANGE = 0.05
"""Largest change of the quality that ``mptk advise`` calls safe, as a share."""
PERPLEXITY = "perplexity"
STRANGE_PERPLEXITY = 1000.0
"""A dense model with a perplexity above it does not know the text: it guesses among a thousand tokens."""
MOST_WARNINGS = 2
"""Lines of warnings on the screen. The first ones matter most."""
LABEL_WIDTH = 10
"""Columns of the word before a line."""


def build_summary(report: Report, place: Path) -> list[str]:
    """At most 12 lines on the result in ``place``."""
    shown = [f"written to {place}: {shorten_model_name(report.model)}, {describe_amount(report)}"]
    shown += label_lines("cut", [describe_cut(report)])
    shown += label_lines("", align_columns(list(list_model_rows(report))))
    shown += label_lines("proof", [describe_agreement(report)])
    notes = [f"{format_count(len(said), 'note')} in the report" for said in [report.notes] if said]
    shown += label_lines("careful", [*list_warnings(report), *notes][:MOST_WARNINGS])
    shown += label_lines("next", list_next_commands(report, place))
    return shown


def build_summary_section(report: Report, place: Path) -> Section:
    """The same for a page."""
    columns, *rows = list_model_rows(report)
    align = "l" + "r" * (len(columns) - 1)
    said = [f"Cut: {describe_cut(report)}", f"Proof: {describe_agreement(report)}"]
    said += [f"Careful: {warning}" for warning in list_warnings(report)]
    _, *commands = list_next_commands(report, place)  # the first shows what this page shows
    following = ["Next:", *map(CommandLine, commands)] if commands else []
    return Section(SUMMARY_TITLE, [Table(align, columns, rows), *said, *following])


def label_lines(label: str, lines: Sequence[str]) -> list[str]:
    """The lines in a column of their own, the first one behind its label."""
    return [f"  {label if not i else '':{LABEL_WIDTH}}{line}" for i, line in enumerate(lines)]


def describe_amount(report: Report) -> str:
    """How much is gone, and by what."""
    trained = f", trained for {format_count(report.settings.steps, 'step')}" if report.recovery else ""
    return f"{report.sparsity:.0%} of its block parameters removed{report.describe_choice()}{trained}"


def describe_cut(report: Report) -> str:
    """The widths that are narrower now. The families that stayed are only counted."""
    cut = report.list_cut_words()
    for row, view in list_row_views(report):
        cut += [f"{name} {of} → {kept}" for name, of, kept in view.list_widths(row) if kept < of]
    whole = sum(row["width"] == row["of"] for row in report.families.values())
    stay = f"; {whole} more can be cut or must stay" if whole else ""
    return f"{', '.join(cut) or 'nothing'}{stay}"


def list_model_rows(report: Report) -> Iterator[list[str]]:
    """A row for each model: dense and pruned, each as it is and in the first quantised type, by size and quality."""
    found, sizes = report.quality, {name: row["bytes"] for name, row in report.cost.items()}
    times = {name: row["latency_ms"] for name, row in report.cost.items() if "latency_ms" in row}
    timed = [f"{report.settings.objective} (predicted)"] if times else []
    yield ["", "size", str(found.get("metric", "quality")), "change", *timed]
    scheme = next(iter(report.quantized), "")
    for name in ("dense", "pruned"):
        value = found.get(name)
        time = [f"{times[name]:.1f} ms"] if times else []
        yield [name, format_megabytes(sizes[name]), *_describe_quality(value, found.get("dense")), *time]
        graph = report.quantized.get(scheme, {})
        row = graph.get("dense", {}) if name == "dense" else graph
        if row:
            size = format_megabytes(row["bytes"])
            yield [
                f"{name} {scheme}",
                size,
                *_describe_quality(row.get("quality"), found.get("dense")),
                *([""] if times else []),
            ]


def _describe_quality(value: float | None, dense: float | None) -> list[str]:
    """A figure and its change from the dense model's."""
    if value is None:
        return ["not measured", ""]
    change = f"{value / dense - 1:+.1%}" if dense else ""
    return [format_figure(value), "" if change in ("+0.0%", "-0.0%") else change]


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of words as lines: the first column to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def describe_agreement(report: Report) -> str:
    """What was compared, in a line."""
    compared = ["weights", "reloaded folder"]
    types = f" ({', '.join(report.quantized)}, too)" if report.quantized else ""
    compared += [f"ONNX Runtime{types}"] if any("ONNX" in row["stage"] for row in report.proof) else []
    return f"{format_count(len(report.proof), 'stage')} agree with the masked dense model: {', '.join(compared)}"


def list_warnings(report: Report) -> list[str]:
    """What a reader of the figures should know: a large loss, a text that flatters, a text that is none."""
    found, warnings = report.quality, list[str]()
    dense = found.get("dense")
    if has_large_loss(report):
        change = f"{compute_change(report):+.0%}"
        warnings.append(f"the {found['metric']} changes by {change}; `mptk advise` calls {SAFE_CHANGE:.0%} safe")
    if found.get("metric") == PERPLEXITY and dense and dense > STRANGE_PERPLEXITY:
        warnings.append("the dense model does not know this text: is it text of its language?")
    sources = [report.data.get(name, {}).get("source") for name in ("calibration", "evaluation")]
    if found and sources[0] == sources[1] and sources[0] is not None:
        warnings.append("calibrated and measured on one text, which flatters; give --eval-data another")
    return warnings


def compute_change(report: Report) -> float | None:
    """The change of the quality from the dense model's, as a share; None if it was not measured."""
    dense, pruned = report.quality.get("dense"), report.quality.get("pruned")
    return pruned / dense - 1 if dense and pruned is not None else None


def has_large_loss(report: Report) -> bool:
    """Whether the quality falls by more than is safe. A lower perplexity is better; of other metrics a higher value."""
    change = compute_change(report)
    if change is None:
        return False
    return (change if report.quality["metric"] == PERPLEXITY else -change) > SAFE_CHANGE


def list_next_commands(report: Report, place: Path) -> list[str]:
    """Two commands to type: all figures; then training if nothing was trained and much was lost, or timing."""
    folder = shlex.quote(str(place))
    commands = [f"mptk report {folder}"]
    if has_large_loss(report) and not report.recovery and report.settings.target == "stock":
        data = "" if report.settings.data == "self" else f" --data {shlex.quote(report.settings.data)}"
        commands.append(f"mptk recover {folder}{data} --out {shlex.quote(f'{place}-recovered')}")
    elif not report.live and any(file.endswith(".onnx") for file in report.files):
        commands.append(f"mptk bench {shlex.quote(report.model)} {folder}")
    return commands
