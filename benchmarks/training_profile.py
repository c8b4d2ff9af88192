"""How a training step spends its time, by part and by operator, and how near it comes to the rate of matrix products.

    OMP_NUM_THREADS=1 python -m benchmarks.training_profile [--phase masks|recovery] [--sparsity 0.5] [--width ffn=512]
        [--compute-dtype bfloat16] [--steps 6] [--json FILE]

The model is SmolLM2-135M, the step as `mptk prune` makes it: a batch of 8 windows of 256 tokens, a live teacher, language
model loss and KL, and in recovery all weights. A row of the file is a part. `share`: the operations of the step's matrix
products over what the machine multiplies in that time (`measure_machine`). A run is timed without the profiler first.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import result_header, write_result
from benchmarks.training import learn, recover
from mptk.cli.options import parse_width
from mptk.compat.glibc import retain_memory
from mptk.config import Learning, Settings, Training
from mptk.cost.estimate import measure_machine

PARTS = ("teacher", "student", "losses", "backward", "clip", "masks", "optimizer")
BATCH, MICRO, LENGTH = 8, 4, 256


def main(
    phase: str = "recovery",
    sparsity: float = 0.5,
    width: Annotated[list[str] | None, typer.Option(help="As --width of mptk prune.")] = None,
    compute_dtype: str = "bfloat16",
    optimizer: str = "adamw",
    steps: int = 6,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    training = Training(batch=BATCH, micro=MICRO, save_every=10**6, optimizer=optimizer)
    widths = dict(parse_width(each) for each in width or ["ffn=512"])
    settings = Settings(
        sparsity=sparsity,
        widths=widths,
        compute_dtype=compute_dtype,
        learning=Learning(steps=10_000, training=training, precision="bf16" if compute_dtype == "bfloat16" else "no"),
    )
    step = (learn if phase == "masks" else recover)(settings)
    with retain_memory():  # as in a run
        step()
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiled:
            step()
    parts, operators, flops = sum_up(profiled)
    took = statistics.median(seconds)
    machine = measure_machine(dtype=getattr(torch, compute_dtype))
    rate = machine.flops * machine.speedup
    tokens = BATCH * LENGTH // (settings.learning.mask_parts if phase == "masks" else 1)
    about = {
        "phase": phase,
        "compute": compute_dtype,
        "widths": widths,
        "tokens_a_minute": round(60 * tokens / took),
        "gflop_a_token": round(flops / tokens / 1e9, 3),
        "product_gflops": round(rate / 1e9),
        "share": round(flops / took / rate, 3),
        "seconds": [round(each, 3) for each in seconds],
        "operators": {name: round(share, 3) for name, share in operators.most_common(14)},
    }
    rows = [{"part": name, "share": round(parts[name], 3)} for name in (*PARTS, "other") if parts[name] > 0.0005]
    print(json.dumps({**about, "rows": rows}, indent=1))
    if json_file is not None:
        write_result(json_file, {**result_header(), **about}, rows)


def sum_up(profiled: Any) -> tuple[Counter[str], Counter[str], float]:
    """Shares of the step's time by part and by operator, and the operations of its matrix products."""
    parts, operators, flops, whole = Counter[str](), Counter[str](), 0.0, 0.0
    for event in profiled.key_averages():
        flops += event.flops
        whole += event.self_cpu_time_total
        if event.key in PARTS:
            parts[event.key] += event.cpu_time_total
        elif event.self_cpu_time_total:
            operators[event.key] += event.self_cpu_time_total
    parts["other"] = whole - parts.total()
    return (
        Counter({name: value / whole for name, value in parts.items()}),
        Counter({name: value / whole for name, value in operators.items()}),
        flops,
    )


if __name__ == "__main__":
    typer.run(main)
