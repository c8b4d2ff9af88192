"""report: analyses, reports and benchmarks as tables for people and as JSON for programs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from mptk.bench import Bench
from mptk.cost import CostModel
from mptk.families import Analysis

ANALYSIS = "mptk-analysis/1"


def analysis_json(
    analysis: Analysis, ladders: Mapping[str, Sequence[int]], refused: Mapping[str, str], model: str
) -> dict[str, Any]:
    """The analysis as data (schema: ``docs/analysis.md``)."""
    cost = CostModel(analysis)
    total = cost.dense.parameters
    families = []
    for f in analysis.families:
        unit = cost.parameters_per_unit(f)
        families.append(
            {
                "name": f.name,
                "description": f.description,
                "width": f.size,
                "layers": len(f.groups),
                "scopes": f.scopes,
                "parameters_per_unit": unit,
                "share": unit * f.size / total,
                "minimum": f.minimum,
                "multiple": f.multiple,
                "legal_widths": list(ladders.get(f.name, ())),
                "refused": refused.get(f.name),
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
    blocked = [
        {"name": b.name, "size": b.size, "weights": list(b.weights), "reasons": list(b.reasons)}
        for b in analysis.blocked
    ]
    return {
        "format": ANALYSIS,
        "model": model,
        "parameters": total,
        "block_parameters": cost.dense.block,
        "families": families,
        "blocked": blocked,
    }


def analysis_view(report: Mapping[str, Any]) -> Lines:
    """``mptk analyze``: the families, and below them the axes that cannot be cut and why."""
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
    return Lines(table, fixed)


def grouped(blocked: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Blocked axes with the same reason in several layers as one row."""
    rows: dict[tuple[str, int, str, str], int] = {}
    for b in blocked:
        starred = re.sub(r"(?<=\.)\d+(?=\.)", "*", ", ".join(b["weights"][:3]))
        reasons = re.sub(r"(?<=\.)\d+(?=[.,])", "*", "; ".join(b["reasons"][:2]))
        key = (b["name"], b["size"], starred, reasons)
        rows[key] = rows.get(key, 0) + 1
    return [(n if c == 1 else f"{n} ×{c}", str(size), weights, why) for (n, size, weights, why), c in rows.items()]


def ranges(widths: Sequence[int]) -> str:
    """``32…1536 step 32`` where widths are evenly spaced, a list otherwise."""
    if len(widths) > 3:
        steps = {b - a for a, b in itertools.pairwise(widths)}
        if len(steps) == 1:
            step = steps.pop()
            return f"{widths[0]}…{widths[-1]}" + (f" step {step}" if step > 1 else "")
    return ", ".join(map(str, widths)) if len(widths) <= 12 else f"{widths[0]}…{widths[-1]}, {len(widths)} widths"


def comparison_view(reports: Sequence[Mapping[str, Any]]) -> Table:
    """Pruned models of one dense model: what each removed, its widths, its perplexity."""
    table = Table(title="side by side", title_justify="left")
    table.add_column("method")
    for column in ("steps", "removed", "dense perplexity", "perplexity"):
        table.add_column(column, justify="right")
    table.add_column("widths")
    for r in reports:
        widths = {n: f["width"] for n, f in r["families"].items() if f["width"] < f["of"]}
        quality = r["perplexity"]
        table.add_row(
            r["settings"]["method"],
            str(r["settings"]["learning"]["steps"]),
            f"{r['sparsity']:.1%}",
            f"{quality['dense']:.2f}",
            f"{quality['pruned']:.2f}",
            ", ".join(f"{n} {w}" for n, w in widths.items()),
        )
    return table


def prune_view(report: Mapping[str, Any]) -> Lines:
    """``mptk report``: what was cut, what it cost, and the proof."""
    dense, pruned = report["cost"]["dense"], report["cost"]["pruned"]
    widths = Table(title=f"{report['model']} pruned by {report['settings']['method']}", title_justify="left")
    for column in ("family", "width", "layers"):
        widths.add_column(column, justify="left" if column == "family" else "right")
    for name, f in report["families"].items():
        if f["width"] < f["of"]:
            widths.add_row(name, f"{f['of']} → {f['width']}", str(f["layers"]))
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
        label = f"predicted {report['settings']['objective']} (ms)"
        cost.add_row(label, f"{before:.2f}", f"{after:.2f}", f"{1 - after / before:.1%}")
    quality = report["perplexity"]
    cost.add_row("perplexity", f"{quality['dense']:.2f}", f"{quality['pruned']:.2f}", "")
    notes = [Text(f"perplexity: {quality['protocol']}"), *map(Text, report["notes"])]
    return Lines(widths, cost, *notes, proof_view(report["proof"]))


def proof_view(proof: Sequence[Mapping[str, Any]]) -> Table:
    """Each stage's difference from the masked dense model."""
    table = Table(title="proof: largest logit difference from the masked dense model", title_justify="left")
    table.add_column("stage")
    for column in ("absolute", "relative", "tolerance", ""):
        table.add_column(column, justify="right")
    for d in proof:
        ok = "ok" if d["ok"] else "FAILED"
        table.add_row(d["stage"], f"{d['max_abs']:.1e}", f"{d['relative']:.1e}", f"{d['tolerance']:.0e}", ok)
    return table


def bench_view(result: Bench) -> Table:
    """``mptk bench``: dense beside pruned."""
    table = Table(title="ONNX Runtime, median of alternating rounds", title_justify="left")
    for column in ("phase", "threads", "dense ms", "pruned ms", "ratio", "ideal ratio"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for row in result.rows:
        table.add_row(
            row.phase,
            str(row.threads),
            f"{row.dense_ms:.1f} ± {row.dense_iqr_ms:.1f}",
            f"{row.pruned_ms:.1f} ± {row.pruned_iqr_ms:.1f}",
            f"{row.ratio:.3f}",
            f"{row.ideal:.3f}",
        )
    return table
