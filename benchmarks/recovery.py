"""Perplexity after recovery, by how it trains: all from one cut, on the same text and the same number of tokens.

    python -m benchmarks.recovery --train PATH[,PATH] --wikitext FILE --c4 FILE [--tokens 20480,40960] [--variants "A;B"]
        [--widths kv_groups=2,ffn=672] [--distil-epochs 3] [--seeds 0] [--windows 40] [--json FILE]

A variant names settings of `mptk.recover`, as `rank=0,lr=3e-4`; what it does not name is `BASE`. The cut is Wanda's with
reconstruction. Rows that the JSON file has are not computed again.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.quality import MODEL, add, measure, rows_in
from benchmarks.quality_text import write_mixture
from mptk import prune, recover

BASE: dict[str, Any] = {"rank": 16, "lr": 1e-3, "batch": 8, "lm": 1.0, "kl": 1.0, "hidden_loss": 0.0, "precision": "no"}
BASE |= {"optimizer": "adamw", "warmup": 0.05}
LENGTH = 256
VARIANTS = "rank=16,lr=1e-3;rank=16,lr=3e-3;rank=64,lr=1e-3;rank=0,lr=1e-4;rank=0,lr=3e-4;rank=0,lr=6e-4;rank=0,lr=1e-3"


def parsed(variant: str) -> dict[str, Any]:
    """``rank=0,lr=3e-4`` as settings."""
    given = dict(part.split("=") for part in variant.split(",") if part)
    said = {name: value for name, value in given.items() if isinstance(BASE[name], str)}
    return BASE | {n: type(BASE[n])(float(value)) for n, value in given.items() if n not in said} | said


def widths_in(text: str) -> dict[str, int]:
    return {name: int(width) for name, width in (part.split("=") for part in text.split(","))}


def cut(folder: Path, training: Path, widths: dict[str, int], epochs: int) -> None:
    """The pruned folder that every variant starts from, after ``epochs`` of local distillation."""
    if not folder.exists():
        text = {"data": str(training), "samples": 96, "length": LENGTH, "eval_windows": 1, "distil_epochs": epochs}
        prune(MODEL, folder, sparsity=0.5, method="wanda", reconstruct=True, widths=widths, onnx=False, **text)


def trained(start: Path, out: Path, variant: str, tokens: int, seed: int, work: Path) -> dict[str, Any]:
    """Train ``start`` as the variant says and write ``out``; returns the row without its perplexity."""
    chosen = parsed(variant)
    steps = round(tokens / (chosen["batch"] * LENGTH))
    hidden = (
        {"teacher": "live"} if chosen["hidden_loss"] else {"teacher": "cached", "teacher_cache": str(work / "teacher")}
    )
    began, busy = time.perf_counter(), time.process_time()
    done = recover(
        start,
        out,
        steps=steps,
        seed=seed,
        data=str(work / "training.jsonl"),
        eval_windows=1,
        save_every=max(1, steps // 4),
        onnx=False,
        **chosen,
        **hidden,
    )
    assert done is not None
    losses = done.report.recovery["losses"]
    return {
        "variant": variant,
        "tokens": steps * chosen["batch"] * LENGTH,
        "seed": seed,
        "settings": chosen,
        "held_out": losses,
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "cpu_minutes": round((time.process_time() - busy) / 60, 1),
    }


def main(
    train: Annotated[str, typer.Option(help="Files and folders of training text, comma-separated.")],
    wikitext: Annotated[str, typer.Option(help="WikiText-2 test.")],
    c4: Annotated[Path, typer.Option(help="C4 as JSON lines: the last documents are not trained on.")],
    tokens: str = "20480,40960",
    variants: Annotated[str, typer.Option(help="Separated by semicolons.")] = VARIANTS,
    widths: str = "kv_groups=2,ffn=672",
    distil_epochs: int = 0,
    seeds: str = "0",
    windows: int = 40,
    json_file: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/recovery.json"),
    work: Annotated[Path, typer.Option(help="Folder for the text, the cut and the teacher's outputs.")] = Path(
        "runs/recovery"
    ),
) -> None:
    training, held_out = write_mixture([Path(part) for part in train.split(",")], c4, work)
    texts = {"wikitext2": wikitext, "c4": str(held_out)}
    none = {"tasks": [], "include_path": None, "limit": None}
    distilled = {"distilled": distil_epochs} if distil_epochs else {}
    start = work / ("cut-" + widths.replace(",", "-").replace("=", "") + f"-distil{distil_epochs}" * bool(distilled))
    cut(start, training, widths_in(widths), distil_epochs)
    if not any(row["variant"] == "no recovery" and is_from(row, widths, distil_epochs) for row in rows_in(json_file)):
        row = {"variant": "no recovery", "widths": widths, "tokens": 0, "seed": 0} | distilled
        add(json_file, row | measure(str(start), texts, windows, none))
    for count in map(int, tokens.split(",")):
        for seed in map(int, seeds.split(",")):
            for variant in variants.split(";"):
                wanted, known = (
                    (variant, count, seed),
                    [r for r in rows_in(json_file) if is_from(r, widths, distil_epochs)],
                )
                if any((r["variant"], r["tokens"], r["seed"]) == wanted for r in known):
                    continue
                out = work / "out"
                row = {"widths": widths} | distilled | trained(start, out, variant, count, seed, work)
                row |= measure(str(out), texts, windows, none)
                shutil.rmtree(out)
                print(row, flush=True)
                add(json_file, row)
    print(table(rows_in(json_file)))


def is_from(row: dict[str, Any], widths: str, epochs: int) -> bool:
    """Whether the row starts from that cut."""
    return bool(row["widths"] == widths and row.get("distilled", 0) == epochs)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| recovery | tokens | seed | WikiText-2 | C4 | processor minutes |", "|---|---:|---:|---:|---:|---:|"]
    for r in sorted(rows, key=lambda r: (r["widths"], r["tokens"], r["wikitext2"])):
        cells = [r["variant"], f"{r['tokens']:,}", r["seed"], f"{r['wikitext2']:.2f}", f"{r['c4']:.2f}"]
        lines.append(f"| {' | '.join(map(str, [*cells, r.get('cpu_minutes', '')]))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
