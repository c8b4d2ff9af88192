"""The zoo, trained: each type that ``zoo --end-to-end`` verified is cut to the same widths, and trained for a few steps.

    python -m benchmarks.zoo_training [--mapping NAME] [--types A,B] [--jobs N] [--json FILE]

Twice: all weights after a cut by Wanda with reconstruction, and MaskPrune in bfloat16. Models are tiny and random, so this shows
that training runs, and that the proof holds after it, not what it brings. Families that MaskPrune refuses, since their
masks would disturb a norm or a choice of experts, stay whole; without others the type counts as ``refused``.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import typer
from safetensors.torch import save_file

from benchmarks.tiny_models import example_inputs, tiny_model
from benchmarks.zoo import COMMANDS_LIMIT_S, Jobs, OneMapping, RowsFile, Types, saved_rows, sweep
from benchmarks.zoo_end_to_end import said

CUT = Path("benchmarks/results/zoo_end_to_end.json")
SIZES = "--samples 4 --length 12 --eval-windows 2 --eval-length 12 --batch 2 --micro 2 --no-onnx --align 1 --memory 2GB"
WAYS = {
    "recovery": "--method wanda --reconstruct --steps 2",
    "masks": "--method maskprune --steps 4 --compute-dtype bfloat16",
}
REFUSED = re.compile(
    r"([^\s']+)(?: cannot be learned| can only be cut together| cannot have width|'; (?:there are|did you mean) )"
    r"|cannot be trained where (\S+) is cut|leave its depth (out)"
)
"""What prune says of a family that it cannot take, or does not find: its names are of the sweep that wrote ``CUT``."""


@cache
def verified() -> dict[tuple[str, str], dict[str, Any]]:
    """(mapping, type) → its row in ``CUT``, of the types that passed there."""
    return {(r["mapping"], r["type"]): r for r in saved_rows(CUT) if r["stage"] == "verified"}


def run_type(mapping: str, model_type: str, ways: Collection[str] = tuple(WAYS)) -> dict[str, Any]:
    """One row. For each of the ``ways``: "trained", "refused" or why it failed. ``stage``: "failed" if one did."""
    row, known = {"mapping": mapping, "type": model_type}, verified()[mapping, model_type]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model: Any = tiny_model(mapping, model_type).model
        model.save_pretrained(folder / "dense")
        save_file(example_inputs(mapping, model, 0), inputs := folder / "inputs.safetensors")
        words = ["prune", folder / "dense", "--target", known["target"], *SIZES.split()]
        for way in ways:
            row[way] = trained([*words, *WAYS[way].split()], dict(known["widths"]), folder / way, inputs)
    reached = [row[way] for way in ways]
    return {**row, "stage": "failed" if set(reached) - {"trained", "refused"} else max(reached)}


def trained(words: list[object], widths: dict[str, tuple[int, int]], out: Path, inputs: Path) -> str:
    """``words`` with the widths of all families that the method does not refuse. ``inputs``: for models that take no others."""
    while widths:
        cut = [word for name, (width, _) in widths.items() for word in ("--width", f"{name}={width}")]
        asked = [*words, "--families", ",".join(widths), *cut]
        if not (why := said(*asked, "--out", out, "--data", "random")):
            return "trained"
        if "has no linear layer for LoRA" in why or "does not run in half precision" in why:
            return "refused"
        if not (refused := REFUSED.search(why)):
            other = said(*asked, "--out", f"{out}-inputs", "--inputs", inputs)
            return (other and f"{why} | {other}") or "trained"
        # A message about a block names the block, and not its family: layers, or layers.0 where there are several.
        gone = [name for name in widths if name.startswith("layers")] if refused[3] else [refused[1] or refused[2]]
        if not gone or not widths.keys() >= set(gone):
            return f"refused, but not for a family that was asked for: {why}"
        for name in gone:
            del widths[name]
    return "refused"


def main(mapping: OneMapping = "", types: Types = "", jobs: Jobs = 1, json_file: RowsFile = None) -> None:
    """Train every type; prints a row each and how many there are of each stage."""
    rows = saved_rows(json_file)
    pairs = [(m, t) for m, t in verified() if mapping in ("", m) and (not types or t in types.split(","))]
    for row in sweep(pairs, rows, jobs, json_file, run_type, COMMANDS_LIMIT_S):
        ways = "  ".join(f"{way}: {row[way][:300]}" for way in WAYS if way in row) or row["reason"]
        print(f"{row['mapping']:20} {row['type']:28} {row['seconds']:6.1f}s  {ways}", flush=True)
    print(", ".join(f"{count} {stage}" for stage, count in Counter(row["stage"] for row in rows).items()))


if __name__ == "__main__":
    typer.run(main)
