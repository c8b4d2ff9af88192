"""The README's chart: SmolLM2-135M dense in float32, int8 and int4, and in int8 with 20, 30 and 50 % cut.

    python -m benchmarks.front --wikitext FILE --text FILE [--json FILE] [--plot FILE] [--work FOLDER]
    python -m benchmarks.front --again      # draw the figures of FILE without measuring

Sizes and speeds are measured here, all graphs in turns in one process, one thread, 128 tokens in the cache. For that, a
cut's units are chosen one-shot, since speed depends on widths only. If they are chosen at random, the int8 graph differs
too much from the float32 one to be written. Perplexities are of the first 40 windows of 512 tokens of WikiText-2 test: of
the dense graphs in ONNX Runtime, measured here, int4 rounded for the text; of a cut MaskPrune's row with most tokens in
benchmarks/results/quality_all_weights.json, in float32 (int8 adds 0.3 to 0.9 %, benchmarks/onnx.md).
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
from mptk.api.graphs import export_folder
from mptk.api.use import of_graph
from mptk.config import Settings
from mptk.progress import show_nothing
from passes.targets.onnx.names import ONNX_FILE, name_quantized_file

QUALITY = Path("benchmarks/results/quality_all_weights.json")
TYPES, CUT_TYPE = ("int8", "int4"), "int8"
WINDOWS, LENGTH = 40, 512
CARD, TEXT, CUT, DENSE = "#f6f8fa", "#1f2328", "#0969da", "#8b949e"


def choose_rows() -> list[dict[str, Any]]:
    """Of MaskPrune's rows at each sparsity, the one with most tokens; the dense model's row first."""
    dense, *rows = rows_in(QUALITY)
    own = [row for row in rows if row["method"] == "maskprune"]
    best = {row["sparsity"]: row for row in sorted(own, key=lambda row: (row["tokens"], -row["wikitext2"]))}
    return [dense, *(best[sparsity] for sparsity in sorted(best))]


def measure_graphs(rows: list[dict[str, Any]], wikitext: str, text: str, work: Path) -> list[dict[str, Any]]:
    """A row for each graph: its megabytes, its speed over the dense float32 graph's, and its perplexity."""
    dense = work / "dense"
    if not dense.exists():
        export_folder(MODEL, dense, Settings(quantize=TYPES), text=text)
    graphs = {str(dense): rows[0]}
    for scheme in TYPES:
        file = name_quantized_file(dense / "onnx" / ONNX_FILE, scheme)
        found = of_graph(str(file), wikitext, Settings(), show_nothing, LENGTH, WINDOWS)
        graphs[f"{dense} {scheme}"] = rows[0] | {"type": scheme, "wikitext2": round(found.value, 3)}
    folders = [str(dense)]
    for row in rows[1:]:
        folders.append(str(work / f"{row['sparsity']:g}"))
        graphs[f"{folders[-1]} {CUT_TYPE}"] = row | {"type": CUT_TYPE}
        if not Path(folders[-1]).exists():
            given = {"widths": row["widths"], "sparsity": row["sparsity"], "tolerance": 1.0, "quantize": CUT_TYPE}
            given |= {"method": "wanda", "reconstruct": True, "samples": 16, "eval_windows": 1}
            mptk.prune(MODEL, folders[-1], data=text, **given)
    times = mptk.bench(folders, lengths=[128], threads=[1], rounds=7)
    sizes = {graph.name: graph.bytes / 1e6 for graph in times.graphs}
    speeds = {timed.graph: 1 / timed.ratio for timed in times.rows if timed.case.phase == "decode"}
    keys = ("method", "sparsity", "type", "tokens", "widths", "wikitext2")
    return [
        {"type": "float32"}
        | {key: row[key] for key in keys if key in row}
        | {"megabytes": sizes[name], "speed": speeds[name]}
        for name, row in graphs.items()
    ]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Three columns of bars on a card of its own, which reads on a light and on a dark page. A longer bar is better."""
    figure = Figure(figsize=(5.2, 2.9), facecolor=CARD, layout="constrained")
    names = [f"−{row['sparsity']:.0%}, {row['type']}" if row["sparsity"] else f"dense {row['type']}" for row in rows]
    dense = rows[0]
    panels = (
        (
            "times smaller",
            [dense["megabytes"] / row["megabytes"] for row in rows],
            [f"{row['megabytes']:.0f} MB" for row in rows],
        ),
        ("times as fast", [row["speed"] for row in rows], [f"{row['speed']:.1f}×" for row in rows]),
        (
            "quality",
            [dense["wikitext2"] / row["wikitext2"] for row in rows],
            [f"ppl {row['wikitext2']:.0f}" for row in rows],
        ),
    )
    for axes, (title, lengths, labels) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        bars = axes.barh(names, lengths, color=[CUT if row["sparsity"] else DENSE for row in rows], height=0.72)
        axes.bar_label(bars, labels, padding=3, color=TEXT, fontsize=8.5)
        axes.set_title(title, fontsize=9.5, color=TEXT, loc="left")
        axes.set(xlim=(0, 1.75 * max(lengths)), xticks=[], facecolor=CARD)
        axes.tick_params(colors=TEXT, length=0, labelsize=9)
        for side in axes.spines.values():
            side.set_visible(False)
    axes.invert_yaxis()  # shared: the first row at the top in all three
    figure.savefig(path, dpi=200)


def main(
    wikitext: Annotated[str, typer.Option(help="WikiText-2 test.")] = "",
    text: Annotated[str, typer.Option(help="Text for which int4 is rounded.")] = "",
    json_file: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/front.json"),
    plot: Path = Path("docs/front.png"),
    work: Path | None = None,
    again: bool = False,
) -> None:
    if not again:
        with tempfile.TemporaryDirectory() as temporary:
            rows = measure_graphs(choose_rows(), wikitext, text, work or Path(temporary))
        write_result(json_file, result_header(), rows)
    draw(json.loads(json_file.read_text())["rows"], plot)


if __name__ == "__main__":
    typer.run(main)
