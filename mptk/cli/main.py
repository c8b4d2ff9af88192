"""The command line: each command of ``mptk`` is a function here, its options the function's arguments."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mptk.cli.options import (
    Batch,
    Checkpointing,
    Dense,
    Hidden,
    Json,
    Kl,
    Lm,
    LogitsOption,
    MaxMs,
    Micro,
    Model,
    Objective,
    Onnx,
    Precision,
    ProofLength,
    Quantize,
    Rank,
    Rate,
    Resume,
    SaveEvery,
    Steps,
    Teacher,
    TeacherCache,
    Threads,
    Tracker,
    Trust,
    latency_budget,
    learning,
    names,
    parse_counts,
    parse_logits,
    parse_width,
)
from mptk.cli.progress import stages
from mptk.errors import MptkError
from mptk.files import write_json, write_text

app = typer.Typer(
    help="Structured pruning for language models: analyse, cut, prove, emit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)


def main() -> None:
    """Run the command line: a user's error is one line on stderr and exit code 1, an interrupt is exit code 130."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")
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
        from mptk.version import __version__

        typer.echo(f"mptk {__version__}")
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
    from mptk.io import packaged

    table = Table()
    for column in ("alias", "package", "licence", "fetched"):
        table.add_column(column)
    for alias, model in packaged.ALIASES.items():
        present = "yes" if packaged.cached(alias) else "no"
        table.add_row(alias, model.versions.replace(" ", "\n"), model.licence, present)
    out.print(table)


@app.command("ops")
def list_ops(json_file: Json = None) -> None:
    """List the ops that have an axis rule, each with the rule's file and axis equation."""
    from mptk.cli import report
    from mptk.driver import api

    rules = api.ops()
    write_json(json_file, {"format": report.OPS, "ops": rules})
    out.print(report.ops_view(rules))


@app.command()
def fetch(alias: Annotated[str, typer.Argument(help="An alias of `mptk models`.")]) -> None:
    """Bring a packaged model into the cache folder."""
    from mptk.io import packaged

    with stages(err) as progress:
        progress(f"fetch {alias}", 0, 0)
        path = packaged.fetch(alias)
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
    from mptk.cli import report
    from mptk.driver import api, budget
    from mptk.io import models

    with stages(err) as progress:
        progress("trace", 0, 0)
        skeleton = models.skeleton(model, trust_remote_code=trust_remote_code)
        analysis = api.analyze(skeleton)
        progress("legal widths", 0, 0)
        found = budget.find_target(analysis, skeleton, target, multiple_of)
    result = report.analysis_json(analysis, found.ladders, found.refused, model)
    write_json(json_file, result)
    out.print(report.analysis_view(result))


@app.command()
def prune(
    model: Model,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the result; replaced only if mptk made it.")],
    sparsity: Annotated[float, typer.Option(min=0.0, max=0.99, help="Share of the budget to remove.")] = 0.3,
    budget: Annotated[
        str, typer.Option(help="What sparsity is a share of: params (of blocks), flops, bytes or latency.")
    ] = "params",
    objective: Objective = "decode",
    max_decode_ms: MaxMs = None,
    max_prefill_ms: MaxMs = None,
    threads: Threads = 1,
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
    onnx: Onnx = True,
    logits: LogitsOption = "all",
    quantize: Quantize = "",
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
    teacher_cache: TeacherCache = None,
    precision: Precision = "no",
    gradient_checkpointing: Checkpointing = False,
    tracker: Tracker = "none",
    save_every: SaveEvery = 25,
    resume: Resume = False,
    seed: Annotated[int, typer.Option(help="Seed of the random choices.")] = 0,
    proof_length: ProofLength = 1024,
    trust_remote_code: Trust = False,
) -> None:
    """Cut a model, prove the result, and write it as a plain checkpoint folder and ONNX.

    maskprune learns what to cut and trains the small model after; a one-shot method trains only if --steps is given.
    """
    from mptk.cli import report
    from mptk.driver import prune as driver
    from mptk.driver.settings import Settings

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
        logits=parse_logits(logits),
        quantize=names(quantize),
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
            teacher_cache=None if teacher_cache is None else str(teacher_cache),
            precision=precision,
            gradient_checkpointing=gradient_checkpointing,
            tracker=tracker,
        ),
        resume=resume,
        proof_length=proof_length,
    )
    with stages(err) as progress:
        result = driver.prune(model, folder, settings, progress)
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
    onnx: Onnx = True,
    logits: LogitsOption = "all",
    quantize: Quantize = "",
    steps: Steps = None,
    batch: Batch = 8,
    micro: Micro = 4,
    lr: Rate = 1e-3,
    rank: Rank = 16,
    lm: Lm = 1.0,
    kl: Kl = 1.0,
    hidden: Hidden = 0.0,
    teacher: Teacher = "live",
    teacher_cache: TeacherCache = None,
    precision: Precision = "no",
    gradient_checkpointing: Checkpointing = False,
    tracker: Tracker = "none",
    save_every: SaveEvery = 25,
    resume: Resume = False,
    seed: Annotated[int, typer.Option(help="Seed of the random choices.")] = 0,
    model: Dense = None,
    proof_length: ProofLength = 1024,
    trust_remote_code: Trust = False,
) -> None:
    """Train a pruned folder against its dense model, prove the result, and write it to another folder."""
    from mptk.cli import report
    from mptk.driver import prune as driver
    from mptk.driver import recovery

    settings = learning(
        (driver.DEFAULT_STEPS if steps is None else steps, batch, micro, lr, save_every, seed),
        (lm, kl, hidden),
        rank=rank,
        teacher=teacher,
        teacher_cache=None if teacher_cache is None else str(teacher_cache),
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        tracker=tracker,
    )
    changes: dict[str, Any] = {"data": data, "eval_data": eval_data, "length": length, "seed": seed, "resume": resume}
    changes |= {"onnx": onnx, "logits": parse_logits(logits), "quantize": names(quantize), "proof_length": proof_length}
    changes |= {"model": model, "trust_remote_code": trust_remote_code}
    with stages(err) as progress:
        result = recovery.recover(folder, destination, settings, progress, **changes)
    if result:
        out.print(report.prune_view(result))
        out.print(f"written to {destination}", soft_wrap=True)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="The --out folder of `mptk prune`.")],
    model: Dense = None,
    proof_length: ProofLength = 1024,
    trust_remote_code: Trust = False,
) -> None:
    """Prove a pruned folder again: files, config, weights, and logits in torch and ONNX Runtime. Else exit code 1."""
    from mptk.cli import report
    from mptk.driver import verification

    with stages(err) as progress:
        progress("prove", 0, 0)
        proof = verification.verify(folder, model=model, trust_remote_code=trust_remote_code, proof_length=proof_length)
    out.print(report.proof_view([d.as_dict() for d in proof]), *proof.notes, sep="\n")


@app.command("export")
def export_onnx(
    model: Model,
    folder: Annotated[Path, typer.Option("--out", help="Folder for the result; replaced only if mptk made it.")],
    logits: LogitsOption = "all",
    quantize: Quantize = "",
    data: Annotated[str | None, typer.Option(help="Text that int4 is rounded for: file, folder or dataset.")] = None,
    objective: Objective = "decode",
    trust_remote_code: Trust = False,
) -> None:
    """Write any causal language model as ONNX with a KV cache, with its config and tokenizer."""
    from mptk.driver import api

    with stages(err) as progress:
        api.export_folder(
            model,
            folder,
            logits=parse_logits(logits),
            quantize=names(quantize),
            text=data,
            objective=objective,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    out.print(f"written to {folder}", soft_wrap=True)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="The --out folder of `prune` or `export`, or an .onnx file in it.")],
    prompts: Annotated[list[str], typer.Argument(help="Text to go on with; several are run as one batch.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token; else sampled.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among so many likeliest tokens; 0: all.")] = 50,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample among the likeliest of this share.")] = 1.0,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    threads: Threads = 0,
) -> None:
    """Generate text in ONNX Runtime: one prompt is streamed, several are run as one batch."""
    import numpy as np
    from transformers import TextStreamer

    from mptk.runtime.generation import Sampling, TextGenerator

    runner = TextGenerator(model, threads=threads)
    encoded = [runner.encode(prompt, chat=chat) for prompt in prompts]
    sampling = Sampling(temperature, top_k, top_p)
    steps = runner.stream(encoded, limit=max_new_tokens, sampling=sampling, seed=seed)
    if len(prompts) == 1:
        streamer = TextStreamer(runner.tokenizer, skip_special_tokens=True)
        for (token,) in steps:
            streamer.put(np.array([token]))
        streamer.end()
    else:
        for prompt, row in zip(prompts, zip(*steps, strict=True), strict=True):
            text = runner.tokenizer.decode([token for token in row if token is not None], skip_special_tokens=True)
            typer.echo(f"{prompt} ▸{text}\n")
    speed = runner.speed
    err.print(
        f"{speed.prompt_tokens} prompt tokens, first token after {speed.first_s * 1000:.0f} ms; "
        f"{speed.new_tokens} new tokens, {speed.rate:.1f} tokens/s",
        highlight=False,
    )


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Text for perplexity: file, folder or datasets id.")] = None,
    length: Annotated[int, typer.Option(min=8, help="Tokens in a window.")] = 512,
    windows: Annotated[int | None, typer.Option(min=1, help="First windows only.")] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, comma-separated.")] = "",
    include_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval task files.")] = None,
    limit: Annotated[int | None, typer.Option(help="Examples a task.")] = None,
    runtime: Annotated[str, typer.Option(help="torch, or onnx: a folder's ONNX or an .onnx file.")] = "torch",
    threads: Threads = 0,
    json_file: Json = None,
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity on a text, with its protocol, in torch or in ONNX Runtime, and lm-eval tasks."""
    from mptk.io import data as text
    from mptk.io import evaluation, models

    if data is None and not tasks:
        raise MptkError("nothing to evaluate; give --data TEXT for perplexity or --tasks NAMES for lm-eval")
    if runtime == "onnx":
        evaluate_onnx(model, data, length, windows, tasks, threads, json_file)
        return
    if runtime != "torch":
        raise MptkError(f"no runtime {runtime!r}; choose torch or onnx")
    with stages(err) as progress:
        progress("load", 0, 0)
        loaded = models.load(model, trust_remote_code=trust_remote_code, decoder=True)
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


def evaluate_onnx(
    model: str, data: str | None, length: int, windows: int | None, tasks: str, threads: int, json_file: Path | None
) -> None:
    """`mptk eval --runtime onnx`: perplexity of an exported graph, quantised ones among them."""
    from mptk.io import data as text
    from mptk.io import evaluation
    from mptk.runtime.generation import TextGenerator

    if tasks or data is None:
        raise MptkError("lm-eval tasks run in torch; give --data TEXT for perplexity with --runtime onnx")
    with stages(err) as progress:
        progress("load", 0, 0)
        runner = TextGenerator(model, threads=threads)
        measured = evaluation.perplexity(
            runner.decoder.torch_logits,
            text.evaluation_windows(runner.tokenizer, data, length, windows),
            data=data,
            progress=lambda done, total: progress("perplexity", done, total),
        )
    write_json(json_file, {"model": model, "perplexity": measured.value, "protocol": measured.protocol})
    out.print(f"perplexity {measured.value:.3f}  ({measured.protocol})", soft_wrap=True, highlight=False)


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(help="Models, folders or .onnx files; the first is the baseline.")],
    lengths: Annotated[str, typer.Option(help="Tokens of the prompt, or in the cache, comma-separated.")] = "128,512",
    batches: Annotated[str, typer.Option(help="Sequences at once, comma-separated.")] = "1",
    threads: Annotated[str, typer.Option(help="Thread counts, comma-separated.")] = "1",
    rounds: Annotated[int, typer.Option(min=2, help="Alternating rounds a case.")] = 7,
    json_file: Json = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the ratios into this file (.png, .svg).")] = None,
) -> None:
    """Prefill and decode in ONNX Runtime: all taking turns in one process, beside the ideal ratio and the peak."""
    from mptk.cli import report
    from mptk.cli.plot import draw_bench, require_matplotlib
    from mptk.driver import api
    from mptk.io.manifest import update_manifest

    if plot is not None:
        require_matplotlib()
    with stages(err) as progress:
        result = api.bench(
            models,
            progress=progress,
            lengths=parse_counts(lengths, "--lengths"),
            batches=parse_counts(batches, "--batches"),
            threads=parse_counts(threads, "--threads"),
            rounds=rounds,
        )
    write_json(json_file, result.to_json())
    for model in models[1:]:
        if (Path(model) / "report.json").is_file():
            write_json(Path(model) / "bench.json", result.to_json())
            update_manifest(Path(model), "bench.json")
    if markdown is not None:
        write_text(markdown, report.bench_markdown(result))
    if plot is not None:
        draw_bench(result, plot)
    out.print(report.bench_view(result))


@app.command("report")
def show_report(
    folder: Annotated[Path, typer.Argument(help="The --out folder of `mptk prune`.")],
    beside: Annotated[list[Path] | None, typer.Option(help="Another such folder to compare. May be repeated.")] = None,
) -> None:
    """Show what a pruned folder holds: widths, costs, perplexity, proof, timings, files."""
    from mptk.cli import report
    from mptk.driver import verification
    from mptk.runtime.bench import Bench

    result = verification.read_report(folder)
    out.print(report.prune_view(result))
    if (folder / "bench.json").is_file():
        out.print(report.bench_view(Bench.from_json(json.loads((folder / "bench.json").read_text()))))
    if beside:
        others = [verification.read_report(other) for other in beside]
        out.print(report.comparison_view([result, *others]))
    out.print(f"files in {folder}: {', '.join(result['files'])}", soft_wrap=True, highlight=False)
