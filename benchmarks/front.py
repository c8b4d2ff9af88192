"""The README's chart: size, decode speed and perplexity of SmolLM2-135M, dense and cut by 20, 30 and 50 %.

    python -m benchmarks.front [--json FILE] [--plot FILE] [--work FOLDER] [--again]

Perplexities are rows of benchmarks/results/quality_all_weights.json: of MaskPrune, the row with most tokens at each
sparsity. Their speed is measured here, on models of the same widths, whose units are chosen at random: it does not
depend on which units go. Models that are in FOLDER are used again. ``--again`` draws the figures of FILE without measuring.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure

import mptk
from benchmarks.common import result_header, write_result
from benchmarks.quality import MODEL, rows_in

QUALITY = Path("benchmarks/results/quality_all_weights.json")
CARD, TEXT, BAR, DENSE = "#f6f8fa", "#1f2328", "#0969da", "#8b949e"
PANELS = (
    ("megabytes", "ONNX file in float32 (MB)", "{:,.0f}"),
    ("speed", "decode speed in ONNX Runtime", "{:.2f}×"),
    ("wikitext2", "perplexity on WikiText-2", "{:,.1f}"),
)


def chosen() -> list[dict[str, Any]]:
    """Of MaskPrune's rows at each sparsity, the one with most tokens; the dense model's row first."""
    dense, *rows = rows_in(QUALITY)
    own = [row for row in rows if row["method"] == "maskprune"]
    best = {row["sparsity"]: row for row in sorted(own, key=lambda row: (row["tokens"], -row["wikitext2"]))}
    return [dense, *(best[sparsity] for sparsity in sorted(best))]


def measured(rows: list[dict[str, Any]], work: Path) -> list[dict[str, Any]]:
    """The rows with the graph's megabytes, and its speed over the dense one's: one thread, 128 tokens in the cache."""
    folders = [MODEL]
    for row in rows[1:]:
        folders.append(str(work / f"{row['sparsity']:g}"))
        if Path(folders[-1]).exists():
            continue
        given = {"widths": row["widths"], "sparsity": row["sparsity"], "tolerance": 1.0}
        mptk.prune(MODEL, folders[-1], method="random", samples=4, length=64, eval_windows=1, **given)
    times = mptk.bench(folders, lengths=[128], rounds=7)
    keys = ("method", "sparsity", "tokens", "widths", "wikitext2", "c4")
    sizes = {graph.name: graph.bytes / 1e6 for graph in times.graphs}
    speeds = {timed.graph: 1 / timed.ratio for timed in times.rows if timed.case.phase == "decode"}
    return [
        {key: row.get(key) for key in keys} | {"megabytes": sizes[folder], "speed": speeds[folder]}
        for row, folder in zip(rows, folders, strict=True)
    ]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Three panels of bars, which read on a light and on a dark page."""
    figure = Figure(figsize=(9.5, 2.3), facecolor=CARD, layout="constrained")
    names = ["dense", *(f"−{row['sparsity']:.0%}" for row in rows[1:])]
    for axes, (key, title, form) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        bars = axes.barh(names, [row[key] for row in rows], color=[DENSE, *[BAR] * (len(rows) - 1)], height=0.7)
        axes.bar_label(bars, [form.format(row[key]) for row in rows], padding=4, color=TEXT, fontsize=9)
        axes.set_title(title, fontsize=9.5, color=TEXT, loc="left")
        axes.set(xlim=(0, 1.3 * max(row[key] for row in rows)), xticks=[], facecolor=CARD)
        axes.tick_params(colors=TEXT, length=0, labelsize=9)
        axes.invert_yaxis()
        for side in axes.spines.values():
            side.set_visible(False)
    figure.savefig(path, dpi=160)


def main(
    json_file: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/front.json"),
    plot: Path = Path("docs/front.png"),
    work: Path | None = None,
    again: bool = False,
) -> None:
    if not again:
        with tempfile.TemporaryDirectory() as temporary:
            write_result(json_file, result_header(), measured(chosen(), work or Path(temporary)))
    draw(json.loads(json_file.read_text())["rows"], plot)


if __name__ == "__main__":
    typer.run(main)
