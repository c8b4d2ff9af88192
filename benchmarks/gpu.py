"""Time and memory of each stage on an accelerator: one-shot, mask learning, recovery, proof.

    python -m benchmarks.gpu [--devices cuda,cpu] [--models smollm2-135m,Llama-2-7B] [--jobs wanda,taylor,...]
        [--samples N] [--length N] [--steps N] [--memory 20GB] [--work DIR] [--json FILE] [--quick] [--table]

A row is one job on one model and device, in a process of its own. SmolLM2 is packaged; other models are synthetic
(`scale.SHAPES`). The rows of the JSON file are not run again, but failed ones are. `--table` only prints them.

    wanda, taylor    `mptk prune` without ONNX
    masks            `mptk prune --method maskprune`: masks are learned in half of the steps; recovery in the others
    recovery         `mptk recover` of the folder that wanda gave
    proof            `mptk verify` of that folder

A stage's seconds are those between its first word and the next stage's. Its peak is torch's `max_memory_allocated` of
the device, which is reset when it begins; a CPU has none. `anonymous_bytes` is the process's own memory (`scale.py`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import result_header, write_result
from benchmarks.scale import Bench, Row, measured, rows_in
from mptk.cli.options import parse_size

PACKAGED = "smollm2-135m"
JOBS = ("wanda", "taylor", "masks", "recovery", "proof")
GB = 1e9


@dataclass(frozen=True)
class Job:
    """What a process does. ``model``: a name or folder. ``pruned``: wanda's folder. ``stages``: where results go."""

    name: str
    model: str
    text: str
    device: str
    pruned: str
    out: str
    stages: str
    samples: int
    length: int
    steps: int
    memory: int | None


# ---- in the process of one job ----


class Stages:
    """A run's progress, from which each stage's seconds and peak memory on the device are taken."""

    def __init__(self, device: str) -> None:
        import torch

        from mptk.protocols import find_device

        there = find_device(device)
        self.module = None if there.type == "cpu" else torch.get_device_module(there)
        self.there, self.found, self.name, self.began = there, dict[str, dict[str, float]](), "", 0.0

    def __call__(self, stage: str, *_: object) -> None:
        if stage.startswith("will need"):
            return
        if stage != self.name:
            self.end()
            self.name, self.began = stage, time.perf_counter()
            if self.module is not None:
                self.module.reset_peak_memory_stats(self.there)

    def end(self) -> None:
        """The stage is over; one that comes twice counts together."""
        if not self.name:
            return
        if self.module is not None:
            self.module.synchronize(self.there)
        row = self.found.setdefault(self.name, {"seconds": 0.0})
        row["seconds"] = round(row["seconds"] + time.perf_counter() - self.began, 3)
        if self.module is not None:
            row["peak_bytes"] = max(row.get("peak_bytes", 0), self.module.max_memory_allocated(self.there))
        self.name = ""


def do(job: Job) -> None:
    """Run a job here, and write its stages."""
    from mptk import Settings, prune, recover
    from mptk.config import Learning
    from mptk.proof.verification import verify

    say = Stages(job.device)
    where: dict[str, Any] = {"device": job.device, "memory": job.memory}
    common: dict[str, Any] = {"data": job.text, "length": job.length, "eval_windows": 1, "eval_length": job.length}
    learning = Learning(steps=job.steps if job.name in ("masks", "recovery") else 0, mask_share=0.5)
    if job.name == "proof":
        say("proof")
        verify(job.pruned, **where)
    elif job.name == "recovery":
        recover(job.pruned, job.out, learning=learning, progress=say, onnx=False, **common, **where)
    else:
        method = "maskprune" if job.name == "masks" else job.name
        out = job.pruned if job.name == "wanda" else job.out
        settings = Settings(
            method=method,
            learning=learning,
            samples=job.samples,
            onnx=False,
            families=("ffn",),
            tolerance=0.05,
            **common,
            **where,
        )
        prune(job.model, out, settings, progress=say)
    say.end()
    Path(job.stages).write_text(json.dumps(say.found))


# ---- rows ----


def row_of(job: Job, threads: int) -> Row:
    """A job's row: its stages, and the figures of its process (`scale.measured`)."""
    file = Path(job.stages)
    file.unlink(missing_ok=True)
    command = ["-m", "benchmarks.gpu", "--job", json.dumps(asdict(job))]
    row = measured(command, file.with_suffix(".log"), threads=threads)
    del row["command"]
    return row | {"stages": json.loads(file.read_text()) if file.is_file() else {}}


def table(rows: list[Row]) -> str:
    """Each stage of each job, with the devices side by side."""
    devices = list(dict.fromkeys(row["device"] for row in rows))
    lines = [
        f"| model | job | stage | {' | '.join(f'{d}, s | {d}, peak' for d in devices)} |",
        f"|---|---|---|{'---:|---:|' * len(devices)}",
    ]
    done = [row for row in rows if "failed" not in row]
    for model, job in dict.fromkeys((row["shape"], row["row"]) for row in done):
        sides = {row["device"]: row for row in done if (row["shape"], row["row"]) == (model, job)}
        for stage in dict.fromkeys(name for row in sides.values() for name in row["stages"]):
            cells = [_cells(sides.get(device, {}).get("stages", {}).get(stage)) for device in devices]
            lines.append(f"| {model} | {job} | {stage} | {' | '.join(cells)} |")
        cells = [f"{sides[d]['seconds']:.1f} | " if d in sides else " | " for d in devices]
        lines.append(f"| {model} | {job} | **whole process** | {' | '.join(cells)} |")
    failed = (f"{r['row']} {r['shape']} on {r['device']} failed: {r['failed']}" for r in rows if "failed" in r)
    return "\n".join([*lines, "", *failed]).rstrip()


def _cells(stage: Mapping[str, float] | None) -> str:
    if stage is None:
        return " | "
    peak = f"{stage['peak_bytes'] / GB:.2f} GB" if "peak_bytes" in stage else ""
    return f"{stage['seconds']:.1f} | {peak}"


def main(
    devices: Annotated[str, typer.Option(help="Comma-separated, as `mptk --device` takes them.")] = "cuda",
    models: Annotated[str, typer.Option(help="Comma-separated: smollm2-135m, shapes of scale.py.")] = (
        f"{PACKAGED},Llama-2-7B"
    ),
    jobs: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(JOBS)}.")] = ",".join(JOBS),
    samples: int = 32,
    length: int = 256,
    steps: Annotated[int, typer.Option(help="Training steps of masks and of recovery.")] = 20,
    memory: Annotated[str, typer.Option(help="The jobs' --memory.")] = "",
    threads: int = 1,
    work: Annotated[Path, typer.Option(help="Folder for checkpoints and outputs.")] = Path("runs/gpu"),
    json_file: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/gpu.json"),
    quick: Annotated[bool, typer.Option("--quick", help="The tiny shape, four steps: to see that it runs.")] = False,
    show: Annotated[bool, typer.Option("--table", help="Print the table of the JSON file, run nothing.")] = False,
    job: Annotated[str, typer.Option(hidden=True, help="Do this one here.")] = "",
) -> None:
    if job:
        do(Job(**json.loads(job)))
        return
    if quick:
        models, samples, length, steps = "tiny", 4, 32, 4
    bench, bound = Bench(work, threads, "", None, 1, ""), parse_size(memory or None, "memory")
    for model in () if show else models.split(","):
        text = bench.checkpoint("tiny")[0] / "text.txt"
        source = PACKAGED if model == PACKAGED else str(bench.checkpoint(model)[0])
        for device in devices.split(","):
            place = bench.work / f"{model}-{device.replace(':', '')}"
            place.mkdir(exist_ok=True)
            for name in (name for name in JOBS if name in jobs.split(",")):
                key = (name, model, device)
                kept = [r for r in rows_in(json_file) if (r["row"], r["shape"], r["device"]) != key]
                there = any("failed" not in r for r in rows_in(json_file) if r not in kept)
                if there and (name != "wanda" or (place / "wanda").is_dir()):
                    continue
                paths = {
                    "pruned": str(place / "wanda"),
                    "out": str(place / "out"),
                    "stages": str(place / "stages.json"),
                }
                sizes = {"samples": samples, "length": length, "steps": steps, "memory": bound}
                asked = Job(name, source, str(text), device, **paths, **sizes)
                row = {"row": name, "shape": model, "device": device, **row_of(asked, threads), "threads": threads}
                print(json.dumps(row), flush=True)
                write_result(json_file, result_header(), [*kept, row])
    print(table(rows_in(json_file)))


if __name__ == "__main__":
    typer.run(main)
