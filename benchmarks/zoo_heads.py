"""The zoo's KV heads: for every decoder type, whether ``mptk prune --kv-heads 1`` merges them all into one, proven.

    python -m benchmarks.zoo_heads [--types A,B] [--jobs N] [--json FILE] [--quick]

Each type runs in a process of its own (``benchmarks/zoo.py``): a tiny random model is saved, its KV heads are merged to
one in each layer on random data, and the checkpoint that is written must give the logits of the merged model. That one,
with equal heads in place of one, must give the dense model's own with the same equal heads.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

import mptk
from benchmarks.tiny_models import CannotBuild, model_types, tiny_model
from benchmarks.zoo import Jobs, RowsFile, Types, describe, saved_rows, sweep
from mptk.features.kv_heads.convert import MergedHeads

MAPPING = "causal-lm"
ALONE: dict[str, Any] = {
    **{"sparsity": 0.0, "method": "wanda", "data": "random", "samples": 4, "length": 12, "eval_windows": 1},
    **{"eval_length": 12, "onnx": False, "memory": 2 << 30, "progress": None},
}
"""Nothing but KV heads goes."""
QUICK = 16


def run_type(mapping: str, model_type: str) -> dict[str, Any]:
    """One row; ``stage`` is ``merged``, or else ``none`` or ``built`` with the reason why it is not."""
    row: dict[str, Any] = {"type": model_type, "mapping": mapping, "stage": "none", "reason": ""}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            model: Any = tiny_model(mapping, model_type).model
            model.save_pretrained(folder / "dense")
            row["stage"] = "built"
            found = mptk.prune(str(folder / "dense"), folder / "merged", kv_heads=1, **ALONE)
        except CannotBuild as error:
            return {**row, "reason": str(error)}
        except Exception as error:
            return {**row, "reason": describe(error)}
        assert found is not None
        assert found.compiled is not None
        (merged,) = found.compiled.prepared.conversions
        assert isinstance(merged, MergedHeads)
        row |= {"stage": "merged", "heads": [merged.of, 1], "keys": merged.keys, "values": merged.values}
        return {**row, "difference": max(stage["relative"] for stage in found.report.proof)}


def main(
    types: Types = "",
    jobs: Jobs = 1,
    json_file: RowsFile = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"Every {QUICK}th type")] = False,
) -> None:
    """Merge the KV heads of every decoder type; prints a row each and the totals."""
    rows = saved_rows(json_file)
    pairs = [(MAPPING, t) for t in model_types(MAPPING) if not types or t in types.split(",")][:: QUICK if quick else 1]
    for row in sweep(pairs, rows, jobs, json_file, run_type):
        said = f"keys {row['keys']}, values {row['values']}" if row["stage"] == "merged" else row["reason"][:300]
        print(f"{row['type']:28} {row['stage']:8} {row['seconds']:6.1f}s  {said}", flush=True)
    stages = Counter(row["stage"] for row in rows)
    fitted = sum(row.get("keys") == "fit" for row in rows)
    print(f"{len(rows)} types, {stages['merged']} merged and proven, {fitted} of them with fitted keys")


if __name__ == "__main__":
    typer.run(main)
