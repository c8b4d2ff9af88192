"""ONNX Runtime on SmolLM2-135M: export time by stage, prefill and decode of the dense and of a narrower model.

    python -m benchmarks.onnx [--json FILE] [--quick] [--threads 1,2] [--rounds N]

The narrower model keeps 6 of 9 heads, 2 of 3 KV groups and 1024 of 1536 feed-forward channels: the first ones, since
which ones does not matter for speed. Both are exported with the logits of all positions and with the last alone.
``--quick``: the first four layers, one prompt length, three rounds.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.common import result_header, write_result
from mptk import models
from mptk.bench import bench_decoders
from passes.emit_onnx import emit_onnx
from passes.trace_decoder import Logits, trace_decoder

MODEL = "smollm2-135m"
NARROW = {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1024}
LOGITS: tuple[Logits, ...] = ("all", "last")


@torch.no_grad()
def resized(model: PreTrainedModel, **sizes: int) -> PreTrainedModel:
    """A model of the same class with other sizes in its config and the first rows and columns of each weight."""
    config = type(model.config)(**{**model.config.to_dict(), **sizes})
    result: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    weights = model.state_dict()
    for name, parameter in result.named_parameters():
        parameter.copy_(weights[name][tuple(slice(size) for size in parameter.shape)])
    return result


def export(model: PreTrainedModel, folder: Path, logits: Logits) -> dict[str, Any]:
    """Trace and emit; seconds of each."""
    start = time.perf_counter()
    program = trace_decoder(model, logits=logits)
    traced = time.perf_counter()
    file = emit_onnx(program, folder)
    emitted = time.perf_counter()
    return {
        "trace_s": round(traced - start, 2),
        "emit_s": round(emitted - traced, 2),
        "nodes": len(program.graph.graph.nodes),
        "megabytes": round(sum(f.stat().st_size for f in (file, file.with_name("model.onnx.data"))) / 1e6, 1),
    }


def main(
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    quick: Annotated[bool, typer.Option("--quick")] = False,
    threads: Annotated[str, typer.Option("--threads")] = "1,2",
    rounds: Annotated[int, typer.Option("--rounds")] = 11,
) -> None:
    dense = models.load(MODEL).model
    if quick:
        dense = resized(dense, num_hidden_layers=4)
    sides = {"dense": dense, "narrow": resized(dense, **NARROW)}
    counts = (1,) if quick else tuple(int(count) for count in threads.split(","))
    prompts = (128,) if quick else (128, 512)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for logits in LOGITS[-1:] if quick else LOGITS:
            folders = {side: Path(temporary) / f"{side}-{logits}" for side in sides}
            for side, model in sides.items():
                rows.append({"kind": "export", "graph": side, "logits": logits, **export(model, folders[side], logits)})
                print(rows[-1], flush=True)
            result = bench_decoders(
                *folders.values(), prompts=prompts, threads=counts, rounds=3 if quick else rounds
            ).to_json()
            for row in result["rows"]:
                rows.append(
                    {"kind": "speed", "logits": logits, **row, "over_ideal": round(row["ratio"] / row["ideal"], 3)}
                )
                print(rows[-1], flush=True)
    if json_file is not None:
        write_result(json_file, {**result_header(), "model": MODEL, "narrow": NARROW, "quick": quick}, rows)


if __name__ == "__main__":
    typer.run(main)
