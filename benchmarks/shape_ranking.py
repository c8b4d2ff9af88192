"""How well `mptk shapes` ranks ways to divide a budget: its order beside full runs at the widths of each.

    python -m benchmarks.shape_ranking --train PATH[,PATH] --wikitext FILE --c4 FILE [--model smollm2-135m] [--sparsity 0.5] [--method wanda]
        [--shapes 12] [--full 6] [--search-tokens 20480] [--search-batch 4] [--steps 12] [--batch 4] [--samples 48] [--windows 20]
        [--json FILE] [--work DIR]

A full run is `prune --reconstruct` at the widths of one of the first shapes, with recovery of all weights; perplexity is
measured on text that neither search nor run has read. Runs at widths that the JSON file has are not made again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import result_header, write_result
from benchmarks.quality import MODEL, measure, rows_in
from benchmarks.quality_text import write_mixture
from mptk import prune, shapes
from mptk.features.width_search.api import SHAPES_FILE
from mptk.features.width_search.shapes import Shape, Shapes
from mptk.reading import make_damage_error, read_as


def row_of(place: int, shape: Shape, found: Shapes) -> dict[str, Any]:
    """What the search says of a shape: its widths where they are less than the dense model's, and its losses."""
    cut = {name: width for name, width in shape.widths.items() if width < found.dense.widths[name]}
    losses = [round(loss, 4) for loss in shape.stages]
    return {"place": place, "widths": cut, "removed": round(shape.sparsity, 4), "losses": losses}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The shapes in the order of the search, each with its perplexities beside the best full run's."""

    def mean(row: Mapping[str, Any]) -> float:
        return math.sqrt(row["wikitext2"] * row["c4"])

    best = min(map(mean, rows))
    lines = ["| | widths | removed | search | WikiText-2 | C4 | over the best |", "|---:|---|---:|---:|---:|---:|---:|"]
    for row in sorted(rows, key=lambda row: row["place"]):
        widths = ", ".join(f"{name} {width}" for name, width in row["widths"].items())
        search = " → ".join(f"{math.exp(loss):.0f}" for loss in row["losses"])
        lines.append(
            f"| {row['place']} | {widths} | {row['removed']:.1%} | {search} | {row['wikitext2']:.1f} | {row['c4']:.1f} "
            f"| {mean(row) / best - 1:+.1%} |"
        )
    return lines


def main(
    train: Annotated[str, typer.Option(help="Files and folders of training text, comma-separated.")],
    wikitext: Annotated[str, typer.Option(help="WikiText-2 test.")],
    c4: Annotated[Path, typer.Option(help="C4 as JSON lines: the last documents are not trained on.")],
    model: str = MODEL,
    sparsity: float = 0.5,
    method: str = "wanda",
    candidates: Annotated[int, typer.Option("--shapes", help="Most shapes of the search.")] = 12,
    full: Annotated[int, typer.Option(help="Shapes that get a full run, the best first.")] = 6,
    search_tokens: Annotated[int, typer.Option(help="Tokens that the search trains on in all.")] = 20480,
    search_batch: Annotated[int, typer.Option(help="Windows in a step of the search.")] = 4,
    steps: Annotated[int, typer.Option(help="Training steps of a full run.")] = 12,
    batch: Annotated[int, typer.Option(help="Windows in a step.")] = 4,
    samples: Annotated[int, typer.Option(help="Windows to score and fit with.")] = 48,
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens of each text to measure on.")] = 20,
    json_file: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/shape_ranking.json"),
    work: Path = Path("runs/shape_ranking"),
) -> None:
    training, held_out = write_mixture([Path(part) for part in train.split(",")], c4, work)
    texts = {"wikitext2": wikitext, "c4": str(held_out)}
    how: dict[str, Any] = {"sparsity": sparsity, "method": method, "reconstruct": True, "portable": False}
    how |= {"data": str(training), "samples": samples}
    effort = {"search_shapes": candidates, "search_tokens": search_tokens}
    if not (ranking := work / f"shapes{search_batch}" / SHAPES_FILE).is_file():
        shapes(model, ranking.parent, resume=True, batch=search_batch, **how, **effort)
    found = read_as(Shapes, ranking, make_damage_error(ranking, "remove it"))
    run = {"model": model, "method": method, "sparsity": sparsity, "tokens": steps * batch * 256}
    asked = run | effort | {"search_batch": search_batch}
    rows = []
    for place, shape in enumerate(found.shapes[:full], 1):
        row = asked | row_of(place, shape, found)
        known = [each for each in rows_in(json_file) if each.items() >= (run | {"widths": row["widths"]}).items()]
        if not known:
            folder, widths = work / f"shape{place}", dict(shape.widths)
            prune(
                model,
                folder,
                widths=widths,
                steps=steps,
                batch=batch,
                onnx=False,
                eval_windows=1,
                overwrite=True,
                **how,
            )
            known = [measure(str(folder), texts, windows, {"tasks": []})]
        rows.append({name: value for name, value in known[0].items() if name not in row} | row)
        others = [
            each for each in rows_in(json_file) if not each.items() >= (asked | {"widths": row["widths"]}).items()
        ]
        write_result(json_file, result_header(), [*others, rows[-1]])
        print(rows[-1], flush=True)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    typer.run(main)
