"""How long `mptk prune` takes for the rows of the quality benchmark, as it estimates on this machine.

    python -m benchmarks.quality_time [--json FILE]

Rows have equal tokens, or the same `--minutes` (`quality.py`). The time is the whole command's: loading, scores,
training with a live teacher, reconstruction, proof, ONNX, perplexity. On one core: `OMP_NUM_THREADS=1`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.quality import MODEL, rows_in
from mptk import Settings
from mptk.config import Learning, Training
from mptk.cost.estimate import measure_machine
from mptk.run.estimate import read_estimator
from mptk.trust import NO_CODE

SAMPLES = 96
"""Calibration windows of a row that names none."""


def settings_of(row: dict[str, Any]) -> Settings:
    """The run of a row, with mptk's defaults where the benchmark has its own."""
    name, *additions = row["method"].split("+")
    batch = row.get("batch") or 8
    steps = row["tokens"] // (batch * Settings.length)
    return Settings(
        method=name,
        sparsity=row["sparsity"],
        data="text",
        samples=row.get("samples", SAMPLES),
        distil_epochs=3 if "distil" in additions else 0,
        compute_dtype=row.get("compute", "float32"),
        reconstruct=True if "fit" in additions else False if "nofit" in additions else None,
        learning=Learning(steps=steps, training=Training(batch=batch)),
    )


def main(
    json_file: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/quality_all_weights.json"),
) -> None:
    print(f"minutes at {measure_machine().flops / 1e9:.0f} GFLOP/s in a matrix product")
    print("| model | removed | minutes | tokens | windows | method | seed | widths | WikiText-2 | C4 |")
    print("|---|---:|---:|---:|---:|---|---:|---|---:|---:|")
    rows = [row for row in rows_in(json_file) if row["method"] != "dense"]
    needs = {model: read_estimator(model, NO_CODE).estimate for model in {row.get("model", MODEL) for row in rows}}
    times = [sum(needs[row.get("model", MODEL)](settings_of(row)).seconds.values()) / 60 for row in rows]
    for minutes, row in sorted(zip(times, rows, strict=True), key=lambda pair: (pair[1]["sparsity"], pair[0])):
        widths = ", ".join(f"{name} {width}" for name, width in row["widths"].items())
        print(
            f"| {row.get('model', MODEL)} | {row['sparsity']:.0%} | {minutes:.1f} | {row['tokens']:,} | {row.get('samples', SAMPLES)} "
            f"| {row['method']} | {row['seed']} | {widths} | {row['wikitext2']:.1f} | {row['c4']:.1f} |"
        )


if __name__ == "__main__":
    typer.run(main)
