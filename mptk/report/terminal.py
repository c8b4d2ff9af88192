"""report: analyses, reports and benchmarks as tables for people and as JSON for programs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypedDict

from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from mptk.config.settings import Settings
from mptk.cost.estimate import Estimate, duration, size_text
from mptk.cost.model import CostModel
from mptk.ir.families import Analysis
from mptk.ort.bench import Bench
from mptk.protocols.report import Report, Row
from mptk.protocols.shapes import Shapes
from mptk.publish.markdown import code
from mptk.report.page import shapes
from mptk.report.page.words import figure, ranges
from passes.targets.legalize import LegalWidths
from passes.targets.width_choices import partners

ANALYSIS = "mptk-analysis/1"


class MemberJson(TypedDict):
    """A weight dimension that a group's units lie in."""

    weight: str
    dim: int
    role: str
    layout: str


class GroupJson(TypedDict):
    """One layer of a family."""

    layer: str
    members: list[MemberJson]


class FamilyJson(TypedDict):
    """A family.

    ``refused``: why the target cannot cut it; ``breaks``: programs that a cut of it breaks; or None. ``together``: the
    families that can only be cut with it.
    """

    name: str
    description: str
    width: int
    layers: int
    scopes: int
    parameters_per_unit: float
    share: float
    minimum: int
    multiple: int
    legal_widths: list[int]
    refused: str | None
    together: list[str]
    breaks: str | None
    groups: list[GroupJson]


class BlockedJson(TypedDict):
    """An axis that cannot be cut."""

    name: str
    size: int
    weights: list[str]
    reasons: list[str]


class AnalysisJson(TypedDict):
    """What ``mptk analyze --json`` writes."""

    format: str
    model: str
    parameters: float
    block_parameters: float
    families: list[FamilyJson]
    blocked: list[BlockedJson]


def analysis_json(analysis: Analysis, legal: LegalWidths, model: str) -> AnalysisJson:
    """The analysis as JSON data (schema: ``docs/analysis.md``)."""
    cost = CostModel(analysis)
    total = cost.dense.parameters
    families: list[FamilyJson] = []
    for f in analysis.all_families:
        families.append(
            {
                "name": f.name,
                "description": f.description,
                "width": f.size,
                "layers": len(f.groups),
                "scopes": f.scopes,
                "parameters_per_unit": cost.parameters_per_unit(f),
                "share": 1 - cost({f.name: 0}).parameters / total,
                "minimum": f.minimum,
                "multiple": f.multiple,
                "legal_widths": list(legal.ladders.get(f.name, ())),
                "refused": legal.refused.get(f.name),
                "together": sorted(partners(f.name, {f.name}, legal.together)),
                "breaks": legal.breaks.get(f.name),
                "groups": [
                    {
                        "layer": g.layer,
                        "members": [
                            {"weight": m.weight, "dim": m.dim, "role": m.role, "layout": repr(m.term)}
                            for m in g.members
                        ],
                    }
                    for g in f.groups
                ],
            }
        )
    blocked: list[BlockedJson] = [
        {"name": b.name, "size": b.size, "weights": list(b.weights), "reasons": list(b.reasons)}
        for b in analysis.blocked
    ]
    for f in analysis.depths:
        for unit, why in f.stack.stay.items() if f.stack is not None else ():
            module = f.groups[0].layer
            blocked.append({"name": f"{f.name} {unit}", "size": 1, "weights": [f"{module}.{unit}"], "reasons": [why]})
    return {
        "format": ANALYSIS,
        "model": model,
        "parameters": total,
        "block_parameters": cost.dense.block,
        "families": families,
        "blocked": blocked,
    }


def analysis_view(report: AnalysisJson) -> Lines:
    """``mptk analyze``: the families, then the axes that cannot be cut, with reasons."""
    title = f"{report['model']}: {report['parameters']:,} parameters, {report['block_parameters']:,} of them prunable"
    table = Table(title=title, title_justify="left")
    for column in ("family", "what it is"):
        table.add_column(column)
    for column in ("width", "layers", "parameters per unit", "share"):
        table.add_column(column, justify="right")
    table.add_column("legal widths")
    for f in report["families"]:
        width = f"{f['width']}" if f["scopes"] == 1 else f"{f['width']} in each of {f['scopes']}"
        legal = "none: " + f["refused"] if f["refused"] else ranges(f["legal_widths"])
        if f["together"] and not f["refused"]:
            legal += f", with {', '.join(f['together'])} in proportion"
        table.add_row(
            f["name"],
            f["description"],
            width,
            str(f["layers"]),
            f"{f['parameters_per_unit']:,.0f}",
            f"{f['share']:.1%}",
            legal,
        )
    fixed = Table(title="cannot be cut", title_justify="left")
    for column in ("axis", "size", "weights", "why"):
        fixed.add_column(column)
    for row in grouped(report["blocked"]):
        fixed.add_row(*row)
    return Lines(table, *map(Text, breaking(report["families"])), fixed)


def breaking(families: Sequence[FamilyJson]) -> list[str]:
    """For each kind of programs that a cut breaks: the families whose cut does."""
    found: dict[str, list[str]] = {}
    for f in families:
        if f["breaks"]:
            found.setdefault(f["breaks"], []).append(f["name"])
    return [f"a cut of {', '.join(names)} breaks {why}; --portable leaves it out" for why, names in found.items()]


def grouped(blocked: Sequence[BlockedJson]) -> list[tuple[str, str, str, str]]:
    """Rows of blocked axes; axes with the same reason in several layers share a row."""
    rows: dict[tuple[str, int, str, str], int] = {}
    for b in blocked:
        starred = re.sub(r"(?<=\.)\d+(?=\.)", "*", ", ".join(b["weights"][:3]))
        reasons = re.sub(r"(?<=\.)\d+(?=[.,])", "*", "; ".join(b["reasons"][:2]))
        key = (b["name"], b["size"], starred, reasons)
        rows[key] = rows.get(key, 0) + 1
    return [(n if c == 1 else f"{n} ×{c}", str(size), weights, why) for (n, size, weights, why), c in rows.items()]


def comparison_view(reports: Sequence[Report]) -> Table:
    """Pruned models of one dense model: method, share removed, perplexity, widths."""
    table = Table(title="side by side", title_justify="left")
    table.add_column("method")
    for column in ("steps", "removed", "dense perplexity", "perplexity"):
        table.add_column(column, justify="right")
    table.add_column("widths")
    for r in reports:
        widths = {n: f["width"] for n, f in r.families.items() if f["width"] < f["of"]}
        table.add_row(
            r.settings.method,
            str(r.settings.steps),
            f"{r.sparsity:.1%}",
            _quality(r, "dense"),
            _quality(r, "pruned"),
            ", ".join(f"{n} {w}" for n, w in widths.items()),
        )
    return table


def _by(settings: Settings) -> str:
    if settings.plan is not None:
        return " by a plan"
    return "" if settings.fixed else f" by {settings.method}"


def prune_view(report: Report) -> Lines:
    """``mptk report``: what was cut, what it cost, and the proof."""
    dense, pruned = report.cost["dense"], report.cost["pruned"]
    widths = Table(title=f"{report.model} pruned{_by(report.settings)}", title_justify="left")
    for column in ("family", "width", "layers"):
        widths.add_column(column, justify="left" if column == "family" else "right")
    for name, f in report.families.items():
        if f["width"] < f["of"]:
            widths.add_row(name, f"{f['of']} → {f['width']}", str(f["layers"]))
    if found := report.vocabulary:
        widths.add_row("vocabulary", f"{found['of']} → {found['kept']}", "")
    if found := report.kv_heads:
        widths.add_row("KV heads, merged", f"{found['of']} → {found['kept']}", "")
    cost = Table()
    cost.add_column("")
    for column in ("dense", "pruned", "removed"):
        cost.add_column(column, justify="right")
    for label, key in (
        ("block parameters (sparsity)", "block"),
        ("all parameters", "parameters"),
        ("FLOPs a token", "flops"),
        ("bytes", "bytes"),
    ):
        cost.add_row(label, f"{dense[key]:,}", f"{pruned[key]:,}", f"{1 - pruned[key] / dense[key]:.1%}")
    if "latency_ms" in dense:
        before, after = dense["latency_ms"], pruned["latency_ms"]
        label = f"predicted {report.settings.objective} (ms)"
        cost.add_row(label, f"{before:.2f}", f"{after:.2f}", f"{1 - after / before:.1%}")
    metric = str(report.quality.get("metric", "quality"))
    cost.add_row(metric, _quality(report, "dense"), _quality(report, "pruned"), "")
    for scheme, q in report.quantized.items():
        measured = figure(q["quality"]) if "quality" in q else ""
        cost.add_row(f"{metric}, {scheme} in ONNX Runtime", "", measured, f"{q['bytes'] / 1e6:.0f} MB")
    protocol = report.quality.get("protocol", "not measured, since the run was stopped before")
    notes = [Text(f"{metric}: {protocol}"), *map(Text, report.notes)]
    searched = [shapes_view(Shapes.from_json(report.search))] if report.search else []
    return Lines(*searched, widths, cost, *notes, proof_view(report.proof))


def shapes_view(found: Shapes) -> Lines:
    """``mptk shapes``: each shape with its costs and its losses, the best first."""
    table = Table(title=f"{len(found.shapes)} shapes of {found.model}, by {found.metric}", title_justify="left")
    for column in shapes.columns(found):
        table.add_column(column, justify="right")
    for number, row in enumerate(shapes.rows(found)):
        table.add_row(*row, end_section=not number)
    note = "★ no other shape that went as far costs as little and was as good at that stage"
    return Lines(table, Text(note), Text(found.protocol))


def _quality(report: Report, name: str) -> str:
    """How good a model of the report is; empty if it was not measured."""
    return figure(report.quality[name]) if name in report.quality else ""


def estimate_view(found: Estimate) -> Lines:
    """Memory, disk and time that a run will need, part by part."""
    table = Table(show_edge=False)
    for column, justify in (("", "left"), ("for", "left"), ("about", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    needed = (
        ("memory", {**found.needed, **found.held}),
        *([(f"memory on {found.device}", found.there)] if found.device else []),
        ("disk", {**found.output, **found.temporary}),
    )
    for what, parts in needed:
        for number, (name, size) in enumerate(parts.items()):
            table.add_row("" if number else what, name, size_text(size))
        table.add_row("", "in all", size_text(sum(parts.values())), style="bold", end_section=True)
    for number, (stage, seconds) in enumerate(found.seconds.items()):
        table.add_row("" if number else "time", stage, duration(seconds))
    table.add_row("", "in all", duration(sum(found.seconds.values())), style="bold")
    return Lines(table, Text(f"\nA run {found}."))


def proof_view(proof: Sequence[Row]) -> Table:
    """Each stage's difference from the masked dense model, its tolerance, and why that was widened."""
    table = Table(title="proof: how far each stage is from what it must equal", title_justify="left")
    table.add_column("stage")
    for column in ("absolute", "relative", "tolerance"):
        table.add_column(column, justify="right")
    table.add_column("")
    for d in proof:
        said = ", ".join(["ok" if d["ok"] else "FAILED", *(d[key] for key in ("widened", "ran") if d.get(key))])
        numbers = ("not finite" if d[key] is None else f"{d[key]:.1e}" for key in ("max_abs", "relative", "tolerance"))
        table.add_row(d["stage"], *numbers, said)
    return table


def bench_view(result: Bench) -> Lines:
    """``mptk bench``: each graph in each case, the size of each graph, and the machine's peaks."""
    table = Table(title="ONNX Runtime, median of alternating rounds", title_justify="left")
    for index, column in enumerate(BENCH_COLUMNS):
        table.add_column(column, justify="left" if index < 2 else "right")
    for row in bench_cells(result):
        table.add_row(*row)
    sizes = Table()
    for column in ("graph", "files", "memory"):
        sizes.add_column(column, justify="left" if column == "graph" else "right")
    for graph in result.graphs:
        sizes.add_row(graph.name, f"{graph.bytes / 1e6:.0f} MB", f"{graph.memory / 1e6:.0f} MB")
    return Lines(table, sizes, *map(Text, _peaks(result)))


BENCH_COLUMNS = ("case", "graph", "threads", "ms", "tokens/s", "ratio", "ideal ratio", "of the peak")


def bench_cells(result: Bench) -> list[tuple[str, ...]]:
    """The rows of the comparison, as text."""
    return [
        (
            str(row.case),
            row.graph,
            str(row.case.threads),
            f"{row.ms:.1f} ± {row.iqr_ms:.1f}",
            f"{row.tokens_s:.0f}",
            f"{row.ratio:.3f}",
            f"{row.ideal:.3f}",
            f"{row.roofline:.0%}",
        )
        for row in result.rows
    ]


def bench_markdown(result: Bench) -> str:
    """The comparison as a Markdown table."""
    head = [" | ".join(BENCH_COLUMNS), "|".join("---" if i < 2 else "---:" for i in range(len(BENCH_COLUMNS)))]
    cells = ([code(cell) if i == 1 else cell for i, cell in enumerate(row)] for row in bench_cells(result))
    rows = [f"| {line} |" for line in (*head, *(" | ".join(map(_cell, row)) for row in cells))]
    sizes = [
        f"- {code(g.name)}: {g.bytes / 1e6:.0f} MB in files, {g.memory / 1e6:.0f} MB of memory" for g in result.graphs
    ]
    return "\n".join([*rows, "", *sizes, *(f"- {line}" for line in _peaks(result))]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _peaks(result: Bench) -> list[str]:
    return [
        f"ran in {', '.join(result.providers)}",
        *(
            f"{threads} thread{'s' * (threads != 1)}: {peak.flops / 1e9:.0f} GFLOP/s in a matrix product, "
            f"{peak.bandwidth / 1e9:.1f} GB/s read"
            for threads, peak in result.peaks.items()
        ),
    ]


def rerun_view(rows: Sequence[Row]) -> Lines:
    """``mptk rerun``: what was compared, before and now, and a sentence."""
    table = Table()
    for column in ("", "before", "now", ""):
        table.add_column(column)
    for row in rows:
        table.add_row(row["what"], str(row["before"]), str(row["now"]), "same" if row["same"] else "DIFFERS")
    differ = [row["what"] for row in rows if not row["same"]]
    said = f"differs in {', '.join(differ)}" if differ else "the run gave the same result"
    return Lines(table, Text(said))
