"""Perplexity after pruning and recovery, method by method, at equal training tokens.

    python -m benchmarks.quality --train FILE --wikitext FILE --c4 FILE [--tokens N] [--sparsities 0.2,0.3,0.5]
        [--methods A,B] [--seeds 0] [--tasks A,B --include-path DIR --limit N] [--json FILE] [--plot FILE] [--quick]

Every row is one `prune` run: the same text, the same number of training tokens and the same recovery (LoRA, language
model loss and KL to the dense model). A one-shot method uses all of them for recovery, MaskPrune a part for its masks.
`METHOD+fit` is a one-shot method with the closed-form take-over that MaskPrune uses; `maskprune-fixed` is MaskPrune at
the widths that the best one-shot method chose; `maskprune-nofit` is MaskPrune without the take-over. Rows that the JSON
file has are not computed again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import result_header, write_result
from mptk import Settings, data, models, prune
from mptk.evaluation import perplexity, zero_shot
from mptk.learning import Learning
from mptk.maskprune.train import Training

MODEL = "smollm2-135m"
METHODS = "random,magnitude,wanda,flap,taylor,wanda+fit,flap+fit,maskprune-nofit,maskprune,maskprune-fixed"
ONE_SHOT = ("wanda", "flap", "taylor")


def settings(method: str, sparsity: float, seed: int, tokens: int, text: str, fixed: dict[str, int]) -> Settings:
    name, _, variant = method.replace("+", "-").partition("-")
    training = Training(seed=seed, save_every=1000)
    steps = max(4, round(tokens / (training.batch * 256)))
    return Settings(
        method=name,
        sparsity=sparsity,
        data=text,
        samples=96,
        eval_windows=1,
        widths=fixed if variant == "fixed" else {},
        onnx=False,
        seed=seed,
        reconstruct={"fit": True, "nofit": False}.get(variant),
        learning=Learning(steps=steps, training=training),
    )


def measure(folder: str, texts: dict[str, str], windows: int, tasks: dict[str, Any]) -> dict[str, Any]:
    """Perplexity on the first windows of 512 tokens of each text, and the tasks' scores by lm-eval."""
    loaded = models.load(folder)
    found: dict[str, Any] = {}
    for name, text in texts.items():
        held_out = data.evaluation_windows(loaded.tokenizer, text, 512, windows)
        with torch.no_grad():
            measured = perplexity(lambda ids: loaded.model(ids, use_cache=False).logits, held_out, data=name)
        found[name] = round(measured.value, 3)
        found["protocol"] = measured.protocol.partition(": ")[2]
    if tasks["tasks"]:
        found["tasks"] = {task: score(values) for task, values in zero_shot(loaded, **tasks).items()}
        found["limit"] = tasks["limit"]
    return found


def score(values: dict[str, float]) -> float:
    """Accuracy, normalised by length where the task has that."""
    return round(values.get("acc_norm,none", values.get("acc,none", float("nan"))), 4)


def row_of(method: str, sparsity: float, seed: int, tokens: int, train: str, fixed: dict[str, int]) -> tuple[dict, str]:
    folder = tempfile.mkdtemp(prefix="quality-")
    began = time.perf_counter()
    chosen = settings(method, sparsity, seed, tokens, train, fixed)
    report = prune(MODEL, Path(folder) / "out", chosen)
    steps, batch = chosen.learning.steps, chosen.learning.training.batch
    return {
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "tokens": steps * batch * chosen.length,
        "widths": {n: f["width"] for n, f in report["families"].items() if f["width"] < f["of"]},
        "removed": round(report["sparsity"], 4),
        "parameters": report["cost"]["pruned"]["parameters"],
        "minutes": round((time.perf_counter() - began) / 60, 1),
    }, folder


def main(
    train: Annotated[str, typer.Option(help="Training text.")],
    wikitext: Annotated[str, typer.Option(help="WikiText-2 test.")],
    c4: Annotated[str, typer.Option(help="C4 text that is not in the training text.")],
    tokens: int = 500_000,
    sparsities: str = "0.2,0.3,0.5",
    methods: str = METHODS,
    seeds: str = "0",
    windows: int = 40,
    json_file: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/quality.json"),
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, comma-separated.")] = "",
    include_path: Annotated[Path | None, typer.Option(help="Folder with their files.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples a task.")] = None,
    plot: Path | None = None,
    quick: Annotated[bool, typer.Option("--quick", help="4 steps, 4 windows: to see that it runs.")] = False,
) -> None:
    if quick:
        tokens, windows, methods = 4 * 8 * 256, 4, "wanda,maskprune"
    texts = {"wikitext2": wikitext, "c4": c4}
    zero = {"tasks": [task for task in tasks.split(",") if task], "include_path": include_path, "limit": limit}
    rows: list[dict[str, Any]] = json.loads(json_file.read_text())["rows"] if json_file.is_file() else []
    done = {(r["method"], r["sparsity"], r["seed"], r["tokens"]) for r in rows}
    if not any(r["method"] == "dense" for r in rows):
        rows.append(
            {"method": "dense", "sparsity": 0.0, "seed": 0, "tokens": 0, **measure(MODEL, texts, windows, zero)}
        )
    counted = max(4, round(tokens / 2048)) * 2048
    for seed in map(int, seeds.split(",")):
        for sparsity in map(float, sparsities.split(",")):
            for method in methods.split(","):
                if (method, sparsity, seed, counted) in done:
                    continue
                fixed = best_widths(rows, sparsity) if method == "maskprune-fixed" else {}
                row, folder = row_of(method, sparsity, seed, counted, train, fixed)
                rows.append({**row, **measure(f"{folder}/out", texts, windows, zero)})
                shutil.rmtree(folder)
                print(rows[-1], flush=True)
                write_result(json_file, result_header(), rows)
    print(table(rows))
    if plot is not None:
        draw(rows, plot)


def best_widths(rows: list[dict[str, Any]], sparsity: float) -> dict[str, int]:
    """Widths of the best one-shot row at that sparsity."""
    fitting = [r for r in rows if r["sparsity"] == sparsity and r["method"] in ONE_SHOT]
    return dict(min(fitting, key=lambda r: r["wikitext2"])["widths"])


def table(rows: list[dict[str, Any]]) -> str:
    tasks = sorted({task for r in rows for task in r.get("tasks", {})})
    columns = ["method", "sparsity", "seed", "tokens", "widths", "WikiText-2", "C4", *tasks]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for r in sorted(rows, key=lambda r: (r["sparsity"], r["wikitext2"])):
        widths = ", ".join(f"{n} {w}" for n, w in r.get("widths", {}).items())
        lines.append(
            f"| {r['method']} | {r['sparsity']:.0%} | {r['seed']} | {r['tokens']:,} | {widths} "
            f"| {r['wikitext2']:.2f} | {r['c4']:.2f} |"
            + "".join(f" {r['tasks'][task]:.3f} |" if task in r.get("tasks", {}) else " |" for task in tasks)
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity on WikiText-2 against sparsity, a line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for method in dict.fromkeys(r["method"] for r in rows if r["method"] != "dense"):
        points = sorted((r["sparsity"], r["wikitext2"]) for r in rows if r["method"] == method)
        axes.plot(*zip(*points, strict=True), marker="o", label=method)
    axes.axhline(
        next(r["wikitext2"] for r in rows if r["method"] == "dense"), color="grey", linestyle=":", label="dense"
    )
    axes.set(xlabel="share of block parameters removed", ylabel="perplexity, WikiText-2 test", yscale="log")
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter(pyplot.FormatStrFormatter("%g"))
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)
