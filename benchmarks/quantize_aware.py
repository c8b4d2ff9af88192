"""Whether training for the rounded weights of a graph pays: `recover --quantize-aware` beside the same training without it.

    python -m benchmarks.quantize_aware --text FILE --held-out FILE [--model smollm2-135m] [--sparsity 0.2] [--steps 16]
        [--batch 4] [--seeds 0] [--windows 16] [--json FILE] [--work DIR]

All rows start from one cut, Wanda's with reconstruction, and train with the same text, steps and seed. The perplexity is of the
graph in ONNX Runtime, on held-out text. Rows that the file has are not computed again, and a cut that DIR has is not made again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import result_header, write_result
from mptk import prune, recover

FLOAT32, TYPES = "float32", ("int8", "int4")


def main(
    text: Annotated[Path, typer.Option(help="What scores, fits and trains.")],
    held_out: Annotated[Path, typer.Option(help="What graphs are measured on.")],
    model: str = "smollm2-135m",
    sparsity: float = 0.2,
    steps: int = 16,
    batch: int = 4,
    seeds: str = "0",
    windows: int = 16,
    json_file: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/quantize_aware.json"),
    work: Path = Path("runs/quantize-aware"),
) -> None:
    """Print a line for each graph and each way to train for it."""
    how: dict[str, Any] = {"data": str(text), "eval_data": str(held_out), "eval_windows": windows}
    start = work / f"{Path(model).name}-{sparsity}"
    if not start.is_dir():
        prune(model, start, sparsity=sparsity, method="wanda", reconstruct=True, quantize=TYPES, **how)
    rows = json.loads(json_file.read_text())["rows"] if json_file.exists() else []
    for seed in map(int, seeds.split(",")):
        for aware in ("", *TYPES):
            case = {
                "model": model,
                "sparsity": sparsity,
                "steps": steps,
                "batch": batch,
                "seed": seed,
                "trained_for": aware or FLOAT32,
            }
            if any(case.items() <= row.items() for row in rows):
                continue
            out = work / "out"
            kinds = (aware,) if aware else TYPES
            made = recover(
                start,
                out,
                steps=steps,
                batch=batch,
                seed=seed,
                quantize=kinds,
                quantize_aware=bool(aware),
                overwrite=True,
                **how,
            )
            assert made is not None  # only a process of many has no report
            found = {kind: made.report.quantized[kind]["quality"] for kind in kinds}
            found[FLOAT32] = made.report.quality["pruned"]
            rows += [case | {"graph": graph, "perplexity": round(value, 3)} for graph, value in found.items()]
            write_result(json_file, result_header() | {"windows": windows}, rows)
            shutil.rmtree(out)
    print(make_table(rows))


def make_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The perplexity of each graph with and without ``--quantize-aware``, a line for each type and seed."""
    lines = [
        "| model | cut | graph | seed | trained as it is | trained for the graph | change |",
        "|---|---:|---|" + "---:|" * 4,
    ]
    for row in (row for row in rows if row["trained_for"] == row["graph"] != FLOAT32):
        same = {key: row[key] for key in ("model", "sparsity", "steps", "batch", "seed", "graph")} | {
            "trained_for": FLOAT32
        }
        plain = next(other["perplexity"] for other in rows if same.items() <= other.items())
        cells = [row["model"], f"{row['sparsity']:.0%}", row["graph"], str(row["seed"]), f"{plain:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {row['perplexity']:.2f} | {row['perplexity'] / plain - 1:+.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
