"""What layers of their own width bring: one-shot cuts with equal and with free layers, without training.

    python -m benchmarks.free_layers --data FILE --text NAME=FILE [--text NAME=FILE …] [--sparsities 0.2,0.3] [--windows 3,16]
        [--methods wanda] [--families ffn] [--distil-epochs 3] [--layers uniform,free] [--json FILE]

Every row is one `prune --reconstruct --target graph`: 32 windows of 256 tokens of `--data` to calibrate, and to train each
block on with `--distil-epochs`. Perplexity is that of the first windows of 512 tokens of each text. Rows that the JSON
file has are not computed again.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.quality import MODEL, add, rows_in
from mptk import prune
from mptk.io import data, measure_perplexity, models


def measured(module: Any, texts: dict[str, str], windows: list[int]) -> dict[str, float]:
    """Perplexity on the first windows of each text, for each number of them."""
    tokenizer = models.load(MODEL).tokenizer
    found = {}
    for name, text in texts.items():
        held_out = data.load_evaluation_windows(tokenizer, text, 512, max(windows))
        for count in windows:
            with torch.no_grad():
                value = measure_perplexity(lambda ids: module(ids), held_out[:count], data=name).value
            found[f"{name}, {count}"] = round(value, 3)
    return found


def row_of(
    layers: str, method: str, sparsity: float, text: str, families: tuple[str, ...], epochs: int
) -> tuple[dict, Any]:
    began, busy = time.perf_counter(), time.process_time()
    pruned = prune(
        MODEL,
        sparsity=sparsity,
        method=method,
        reconstruct=True,
        layers=layers,
        families=families,
        distil_epochs=epochs,
        target="graph",
        data=text,
        samples=32,
        length=256,
        eval_windows=1,
    )
    assert pruned is not None
    report = pruned.report
    return {
        "layers": layers,
        "method": method,
        "sparsity": sparsity,
        "distil_epochs": epochs,
        "removed": round(report.sparsity, 4),
        "widths": {name: f["width"] for name, f in report.families.items() if f["width"] < f["of"]},
        "masked": report.splits,
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "cpu_minutes": round((time.process_time() - busy) / 60, 1),
    }, pruned.model


def main(
    text: Annotated[list[str], typer.Option(help="NAME=FILE, may be repeated.")],
    calibration: Annotated[str, typer.Option("--data")],
    sparsities: str = "0.2,0.3",
    methods: str = "wanda",
    families: str = "ffn",
    windows: str = "3,16",
    layers: str = "uniform,free",
    distil_epochs: int = 0,
    json_file: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/free_layers.json"),
) -> None:
    texts = dict(each.split("=", 1) for each in text)
    for sparsity in map(float, sparsities.split(",")):
        for method in methods.split(","):
            for each in layers.split(","):
                wanted = (each, method, sparsity, distil_epochs)
                if any(
                    (r["layers"], r["method"], r["sparsity"], r.get("distil_epochs", 0)) == wanted
                    for r in rows_in(json_file)
                ):
                    continue
                row, module = row_of(each, method, sparsity, calibration, tuple(families.split(",")), distil_epochs)
                row |= {"perplexity": measured(module, texts, [int(count) for count in windows.split(",")])}
                print(row, flush=True)
                add(json_file, row)
    print(table(rows_in(json_file)))


def table(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for r in rows for name in r["perplexity"]))
    head = ["layers", "method", "distillation", "removed", *names]
    lines = [f"| {' | '.join(head)} |", "|---|---|---:|---:|" + "---:|" * len(names)]
    for r in sorted(rows, key=lambda r: (r["sparsity"], r["method"], r["layers"], r.get("distil_epochs", 0))):
        epochs = r.get("distil_epochs", 0)
        cells = [
            r["layers"],
            r["method"],
            str(epochs or ""),
            f"{r['removed']:.1%}",
            *(f"{r['perplexity'][n]:.1f}" for n in names),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
