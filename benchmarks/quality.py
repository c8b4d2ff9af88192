"""Perplexity after pruning and recovery, method by method, at equal training tokens or at equal time.

    python -m benchmarks.quality --train PATH[,PATH] --wikitext FILE --c4 FILE [--tokens N] [--sparsities 0.2,0.3,0.5]
        [--minutes 5] [--compute-dtype bfloat16] [--model smollm2-135m]
        [--methods A,B] [--seeds 0] [--rank 16] [--lr 1e-3] [--batch 8] [--widths kv_groups=2,ffn=672]
        [--tasks A,B --include-path DIR --limit N] [--json FILE] [--plot FILE] [--quick]

Every row is one `prune` run: the same text, the same number of training tokens and the same recovery (of all weights,
or LoRA of `--rank`; language model loss and KL to the dense model, whose top logits are kept in `--work` for all rows). A
one-shot method uses all tokens for recovery (none with `--tokens 0`), MaskPrune a part for its masks. With `--minutes`
each row has the steps and calibration windows that `mptk prune --minutes` chooses at this machine's rates, which the row
names; how long the row itself takes does not count. A method's name may have additions:

    +fit       with the closed-form reconstruction that MaskPrune uses      +nofit    without it
    +distil    with three epochs of local distillation after that
    +wN        with N calibration windows in place of 96
    +learned   at the widths that MaskPrune learned                    +fixed    at those of the best one-shot method
    +kvN       with N KV heads a layer, merged before anything is chosen
    +shareNN   with NN % of the steps for masks
    +hard      with masks that are 0 or 1 (`--masks hard`)

Rows that the JSON file has are not computed again; several processes may fill one file. A row that was interrupted goes
on from its last checkpoint in `--work`, and its `minutes` and `processor_minutes` count from there.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from filelock import FileLock

from benchmarks.common import result_header, write_result
from benchmarks.quality_text import write_mixture
from mptk import Settings, prune
from mptk.cli.options import parse_width
from mptk.config import Learning, Training
from mptk.cost.estimate import measure_machine
from mptk.io import data, measure_perplexity, models, zero_shot
from mptk.protocols import Report
from mptk.run.estimate import read_estimator
from mptk.run.minutes import complete_settings
from mptk.trust import NO_CODE, trust_by_caller

MODEL = "smollm2-135m"
METHODS = "maskprune,wanda,flap,taylor,wanda+fit,wanda+learned,random,magnitude,maskprune+nofit,maskprune+fixed"
ONE_SHOT = ("random", "magnitude", "wanda", "flap", "taylor", "fisher")


def settings(
    model: str,
    method: str,
    sparsity: float,
    seed: int,
    tokens: int,
    work: Path,
    widths: dict[str, int],
    trains: dict[str, Any],
    minutes: float | None,
) -> Settings:
    name, *additions = method.split("+")
    training = Training(seed=seed, save_every=40 * 8 // trains["batch"], lr=trains["lr"], batch=trains["batch"])
    steps = steps_of(tokens, training.batch) if minutes is None else None
    learning = Learning(
        steps=steps,
        rank=trains["rank"],
        training=training,
        teacher="cached",
        teacher_cache=str(work / f"teacher-{Path(model).name}"),
    )
    learning = replace(learning, masks="hard" if "hard" in additions else "proximal")
    for share in (addition.removeprefix("share") for addition in additions if addition.startswith("share")):
        learning = replace(learning, mask_share=int(share) / 100)
    windows = [int(addition[1:]) for addition in additions if addition[0] == "w" and addition[1:].isdigit()] or [96]
    kv_heads = [int(addition.removeprefix("kv")) for addition in additions if addition.startswith("kv")]
    found = Settings(
        method=name,
        sparsity=sparsity,
        data=str(work / "training.jsonl"),
        samples=windows[0] if minutes is None else None,
        minutes=minutes,
        widths=widths,
        portable=False,
        seed=seed,
        distil_epochs=3 if "distil" in additions else 0,
        reconstruct=True if "fit" in additions else False if "nofit" in additions else None,
        learning=learning,
        compute_dtype=trains["compute"],
        resume=True,
        **{"kv_heads": kv_heads[0] if kv_heads else None},  # a feature's
    )
    # Minutes leave out the training of a method that learns no masks, unless the run is one that recovers.
    complete, _ = complete_settings(found, read_estimator(model, NO_CODE), recovers=minutes is not None)
    return replace(complete, eval_windows=1, onnx=False)


def steps_of(tokens: int, batch: int) -> int:
    """Steps of training for so many tokens: none or at least 4."""
    return max(4, round(tokens / (batch * 256))) if tokens else 0


def measure(folder: str, texts: dict[str, str], windows: int, tasks: dict[str, Any]) -> dict[str, Any]:
    """Perplexity on the first windows of 512 tokens of each text, and the tasks' scores by lm-eval."""
    loaded = models.load(folder)
    found: dict[str, Any] = {}
    for name, text in texts.items():
        held_out = data.load_evaluation_windows(loaded.tokenizer, text, 512, windows)
        with torch.no_grad():
            measured = measure_perplexity(lambda ids: loaded.model(ids, use_cache=False).logits, held_out, data=name)
        found[name] = round(measured.value, 3)
        found["protocol"] = measured.protocol.partition(": ")[2]
    if tasks["tasks"]:
        scores = zero_shot(loaded, **tasks, trust=trust_by_caller(True))  # whoever runs this names the task files
        found |= {"tasks": {task: score(values) for task, values in scores.items()}, "limit": tasks["limit"]}
    return found


def score(values: dict[str, float]) -> tuple[float, float]:
    """Accuracy, normalised by length if the task has that, and its standard error."""
    metric = "acc_norm" if "acc_norm,none" in values else "acc"
    return round(values[f"{metric},none"], 4), round(values[f"{metric}_stderr,none"], 4)


def row_of(
    model: str,
    method: str,
    sparsity: float,
    seed: int,
    work: Path,
    widths: dict[str, int],
    trains: dict[str, Any],
    chosen: Settings,
) -> tuple[dict[str, Any], Path]:
    shape = [f"{family}{width}" for family, width in widths.items()]
    trained_by = [f"{name}{value}" for name, value in trains.items() if value is not None]
    sizes = [f"steps{chosen.steps}", f"samples{chosen.windows}"]
    folder = work / "-".join(["row", Path(model).name, method, str(sparsity), str(seed), *sizes, *shape, *trained_by])
    began, used = time.perf_counter(), time.process_time()
    report = Report.read(folder) if folder.is_dir() else prune(model, folder, chosen).report
    steps, batch = chosen.learning.steps, chosen.learning.training.batch
    return {
        "model": model,
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "tokens": steps * batch * chosen.length,
        "samples": chosen.windows,
        "allowed": chosen.minutes,
        "gflops": round(measure_machine().flops / 1e9),
        "compute": chosen.compute_dtype,
        "batch": batch,
        **{name: report.recovery.get(name) for name in ("rank", "lr")},
        "given": widths,
        "widths": {n: f["width"] for n, f in report.families.items() if f["width"] < f["of"]},
        "removed": round(report.sparsity, 4),
        "parameters": report.cost["pruned"]["parameters"],
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "processor_minutes": round((time.process_time() - used) / 60, 1),
    }, folder


def rows_in(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text())["rows"] if file.is_file() else []


def rows_of(file: Path, model: str) -> list[dict[str, Any]]:
    """The file's rows of a model. Older rows name none: they are of ``MODEL``."""
    return [row for row in rows_in(file) if row.get("model", MODEL) == model]


def add(file: Path, row: dict[str, Any]) -> None:
    """Add a row to the file, which other processes may be filling."""
    with FileLock(f"{file}.lock"):
        write_result(file, result_header(), [*rows_in(file), row])


def main(
    train: Annotated[str, typer.Option(help="Files and folders of training text, comma-separated.")],
    wikitext: Annotated[str, typer.Option(help="WikiText-2 test.")],
    c4: Annotated[Path, typer.Option(help="C4 as JSON lines: the last documents are not trained on.")],
    model: Annotated[str, typer.Option(help="What is pruned.")] = MODEL,
    tokens: int = 500_000,
    minutes: Annotated[float | None, typer.Option(help="Time of each run, as estimated, instead of --tokens.")] = None,
    sparsities: str = "0.2,0.3,0.5",
    methods: str = METHODS,
    seeds: str = "0",
    rank: Annotated[int | None, typer.Option(help="LoRA of this rank; without it all weights are trained.")] = None,
    widths: Annotated[str, typer.Option(help="Widths of every row, as kv_groups=2,ffn=672.")] = "",
    batch: Annotated[int, typer.Option(help="Windows in a step.")] = 8,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; by default that of what is trained.")] = None,
    compute_dtype: Annotated[str, typer.Option(help="Type for scoring and training.")] = "float32",
    windows: int = 40,
    json_file: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/quality.json"),
    work: Annotated[Path, typer.Option(help="Folder for the mixture and the teacher's outputs.")] = Path(
        "runs/quality"
    ),
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, comma-separated.")] = "",
    include_path: Annotated[Path | None, typer.Option(help="Folder with their files.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples a task.")] = None,
    plot: Path | None = None,
    quick: Annotated[bool, typer.Option("--quick", help="4 steps, 4 windows: to see that it runs.")] = False,
) -> None:
    if quick:
        tokens, windows, methods = 4 * 8 * 256, 4, "wanda,maskprune"
    _, held_out = write_mixture([Path(part) for part in train.split(",")], c4, work)
    texts = {"wikitext2": wikitext, "c4": str(held_out)}
    zero = {"tasks": [task for task in tasks.split(",") if task], "include_path": include_path, "limit": limit}
    if not any(r["method"] == "dense" for r in rows_of(json_file, model)):
        dense = {"model": model, "method": "dense", "sparsity": 0.0, "seed": 0, "tokens": 0}
        add(json_file, {**dense, **measure(model, texts, windows, zero)})
    trains = {"rank": rank, "lr": lr, "batch": batch, "compute": compute_dtype}
    counted = steps_of(tokens, batch) * batch * Settings.length
    recovery = {"rank": rank or 0, **({} if lr is None else {"lr": lr})} if tokens or minutes else {}
    for seed in map(int, seeds.split(",")):
        for sparsity in map(float, sparsities.split(",")):
            for method in methods.split(","):
                rows = [
                    r
                    for r in rows_of(json_file, model)
                    if (r["sparsity"], r["seed"], r.get("allowed")) == (sparsity, seed, minutes)
                    and (r["tokens"] == counted or minutes is not None)
                    and r.items() >= recovery.items()
                    and r.get("batch", 8) == batch
                    and r.get("compute", "float32") == compute_dtype
                ]
                given = dict(parse_width(each) for each in widths.split(",") if each) | given_widths(method, rows)
                if any((r["method"], r["given"]) == (method, given) for r in rows):
                    continue
                chosen = settings(model, method, sparsity, seed, counted, work, given, trains, minutes)
                row, folder = row_of(model, method, sparsity, seed, work, given, trains, chosen)
                row |= measure(str(folder), texts, windows, zero)
                shutil.rmtree(folder)
                print(row, flush=True)
                add(json_file, row)
    print(table(rows_of(json_file, model)))
    if plot is not None:
        draw(rows_of(json_file, model), plot)


def given_widths(method: str, rows: list[dict[str, Any]]) -> dict[str, int]:
    """Widths that a method's additions ask for: MaskPrune's, or the best one-shot method's, of the rows so far."""
    additions = method.split("+")[1:]
    if "learned" in additions:
        return dict(next(r for r in rows if r["method"] == "maskprune")["widths"])
    if "fixed" in additions:
        return dict(min((r for r in rows if r["method"] in ONE_SHOT), key=lambda r: r["wikitext2"])["widths"])
    return {}


def table(rows: list[dict[str, Any]]) -> str:
    tasks = sorted({task for r in rows for task in r.get("tasks", {})})
    columns = ["method", "sparsity", "seed", "minutes", "tokens", "trained", "widths", "WikiText-2", "C4", *tasks]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for r in sorted(rows, key=lambda r: (r["sparsity"], r["wikitext2"])):
        widths = ", ".join(f"{n} {w}" for n, w in r.get("widths", {}).items())
        lines.append(
            f"| {r['method']} | {r['sparsity']:.0%} | {r['seed']} | {r.get('allowed') or ''} | {r['tokens']:,} "
            f"| {trained(r)} | {widths} "
            f"| {r['wikitext2']:.2f} | {r['c4']:.2f} |"
            + "".join(
                f" {'{:.3f} ± {:.3f}'.format(*r['tasks'][t]) if t in r.get('tasks', {}) else ''} |" for t in tasks
            )
        )
    return "\n".join(lines)


def trained(row: dict[str, Any]) -> str:
    if not row["tokens"]:
        return ""
    return f"LoRA {row['rank']}" if row["rank"] else "all weights"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity on WikiText-2 against sparsity, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FormatStrFormatter

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for method in dict.fromkeys(r["method"] for r in rows if r["method"] != "dense"):
        points = sorted((r["sparsity"], r["wikitext2"]) for r in rows if r["method"] == method)
        axes.plot(*zip(*points, strict=True), marker="o", label=method)
    axes.axhline(
        next(r["wikitext2"] for r in rows if r["method"] == "dense"), color="grey", linestyle=":", label="dense"
    )
    axes.set(xlabel="share of block parameters removed", ylabel="perplexity, WikiText-2 test", yscale="log")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(FormatStrFormatter("%g"))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)
