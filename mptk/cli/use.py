"""use: commands that run a model, dense or pruned: export, generate, eval, bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.json import JSON
from rich.text import Text

from mptk.cli import choices
from mptk.cli.app import command, show
from mptk.cli.console import echo, err, out
from mptk.cli.idle import check_eval, check_generate, refuse
from mptk.cli.options import (
    Device,
    Json,
    Logits,
    Memory,
    Model,
    Objective,
    OnnxDtype,
    Out,
    Overwrite,
    Quantize,
    Strict,
    Threads,
    Trust,
    within,
)
from mptk.cli.parse import names, parse_counts, parse_size
from mptk.cli.places import file_to_write
from mptk.cli.progress import stages
from mptk.config.bounds import BOUNDS
from mptk.config.settings import Settings
from mptk.errors import MptkError
from mptk.files import write_json, write_text

if TYPE_CHECKING:
    from mptk.io.evaluation import Perplexity

PLOTS = (".png", ".svg", ".pdf")


@command("export", examples=("export smollm2-135m --quantize int8 --out runs/dense",))
def export_onnx(
    model: Model,
    folder: Out,
    logits: Logits = "all",
    quantize: Quantize = "",
    data: Annotated[str | None, typer.Option(help="Text for a decoder's int4: file, folder or datasets id.")] = None,
    objective: Objective = "decode",
    onnx_dtype: OnnxDtype = "auto",
    memory: Memory = None,
    device: Device = Settings.device,
    overwrite: Overwrite = False,
    strict: Strict = Settings.strict,
    trust_remote_code: Trust = False,
) -> None:
    """Write a model as ONNX, a decoder with its KV cache, with its config and tokenizer."""
    from mptk.api import compiler as api

    if "int4" not in names(quantize):
        refuse(("data",), "text is for int4 alone", "give --quantize int4, or leave it out")
    notes: list[str] = []
    with stages(err) as progress:
        settings = Settings(
            logits=logits,
            quantize=names(quantize),
            objective=objective,
            onnx_dtype=onnx_dtype,
            memory=parse_size(memory),
            device=device,
            strict=strict,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
        )
        api.export_folder(model, folder, settings, text=data, progress=progress, on_note=notes.append)
    out.print(f"written to {folder}", *notes, sep="\n", soft_wrap=True, highlight=False)


@command("gguf", examples=("gguf runs/free --like smollm2-135m --out runs/free.gguf",))
def write_gguf(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The --out folder of `prune` or `recover`.")],
    like: Annotated[str, typer.Option(metavar="FILE", help="The dense model's GGUF file, or its packaged alias.")],
    file: Annotated[
        Path, typer.Option("--out", metavar="FILE", callback=file_to_write(".gguf"), help="The file to write.")
    ],
) -> None:
    """Write a pruned LLaMA model as a GGUF file for llama.cpp, also one whose layers differ in width."""
    from mptk.api import compiler as api

    layers = api.gguf(folder, like, file)
    each = {
        "query heads": [x.heads for x in layers],
        "KV heads": [x.groups for x in layers],
        "ffn": [x.ffn for x in layers],
    }
    widths = ", ".join(f"{name} {counts[0] if len(set(counts)) == 1 else counts}" for name, counts in each.items())
    out.print(f"written to {file}: {len(layers)} layers, {widths}", soft_wrap=True, highlight=False)


@command(
    examples=(
        'generate runs/m30 "Once upon a time"',
        'generate runs/m30 "Why is the sky blue?" --chat --temperature 0.7',
    )
)
def generate(
    model: Annotated[str, typer.Argument(help="The --out folder of `prune` or `export`, or an .onnx file in it.")],
    prompts: Annotated[list[str], typer.Argument(help="Text to continue; several run as one batch.")],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to write after each prompt.", **within(1))] = 64,
    temperature: Annotated[
        float, typer.Option(**within(0, 1e6), help="0: take the likeliest token; above 0: sample.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(**within(0), help="Sample among this many likeliest tokens; 0: all.")] = 50,
    top_p: Annotated[
        float,
        typer.Option(**within(0, 1), help="Sample among the likeliest tokens that have this probability together."),
    ] = 1.0,
    cut: Annotated[
        bool,
        typer.Option("--cut", help="Cut what the model's positions do not hold: the prompt's start, the answer's end."),
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", **within(*BOUNDS["seed"]))] = 0,
    threads: Threads = 0,
    device: Device = Settings.device,
) -> None:
    """Generate text in ONNX Runtime. One prompt is streamed; several run as one batch."""
    import numpy as np
    from transformers import TextStreamer

    from mptk.ort.generation import Sampling, TextGenerator, fitting
    from mptk.protocols.execution import session_device

    class Streamer(TextStreamer):
        """Prints text as it comes."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            echo(text, end="\n" if stream_end else "")

    check_generate(temperature)
    runner = TextGenerator(model, threads=threads, device=session_device(device))
    encoded = [runner.encode(prompt, chat=chat) for prompt in prompts]
    sampling = Sampling(temperature, top_k, top_p)
    if cut:
        encoded, max_new_tokens = fitting(runner.positions, encoded, max_new_tokens)
    steps = runner.stream(encoded, limit=max_new_tokens, sampling=sampling, seed=seed)
    if len(prompts) == 1:
        streamer: Any = Streamer(runner.tokenizer, skip_special_tokens=True)
        for (token,) in steps:
            streamer.put(np.array([token]))
        streamer.end()
    else:
        for prompt, row in zip(prompts, zip(*steps, strict=True), strict=True):
            text = runner.tokenizer.decode([token for token in row if token is not None], skip_special_tokens=True)
            echo(f"{prompt} ▸{text}\n")
    speed = runner.speed
    err.print(
        f"{speed.prompt_tokens} prompt tokens, first token after {speed.first_s * 1000:.0f} ms; "
        f"{speed.new_tokens} new tokens, {speed.rate:.1f} tokens/s, {runner.decoder.providers[0]}",
        highlight=False,
    )


@command("eval", examples=("eval runs/m30 --data wikitext2 --windows 40", "eval runs/m30 --tasks arc_easy --limit 100"))
def evaluate(
    model: Model,
    data: Annotated[str | None, typer.Option(help="Text to measure on (or images, sounds, inputs).")] = None,
    length: Annotated[int, typer.Option(**within(8), help="Tokens in a window.")] = 512,
    windows: Annotated[int | None, typer.Option(**within(1), help="Use only the first windows.")] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, comma-separated.")] = "",
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with lm-eval task files; needs --trust-remote-code.")
    ] = None,
    limit: Annotated[int | None, typer.Option(**within(1), help="Examples of each task.")] = None,
    runtime: Annotated[str, typer.Option(help="onnx: a folder's ONNX or an .onnx file.", **choices.RUNTIME)] = "torch",
    threads: Threads = 0,
    device: Device = Settings.device,
    json_file: Json = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure how good a model is, by its kind: a decoder's perplexity, in torch or ONNX Runtime, and lm-eval tasks."""
    from mptk.api import use

    check_eval(data, tasks, runtime)
    if data is None and not tasks:
        raise MptkError("nothing to evaluate; give --data TEXT for perplexity or --tasks NAMES for lm-eval")
    if runtime == "onnx":
        evaluate_onnx(model, data, length, windows, tasks, threads, device, json_file)
        return
    if not tasks and not use.reads_text(model, trust_remote_code=trust_remote_code):
        with stages(err) as progress:
            found = use.evaluate(
                model,
                data,
                windows=windows or Settings.eval_windows,
                length=length,
                device=device,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        show(json_file, {"model": model, **found}, quality_view(found))
        return
    evaluate_torch(
        model, data, length, windows, names(tasks), include_path, limit, device, json_file, trust_remote_code
    )


def evaluate_torch(
    model: str,
    data: str | None,
    length: int,
    windows: int | None,
    tasks: Sequence[str],
    include_path: Path | None,
    limit: int | None,
    device: str,
    json_file: Path | None,
    trust_remote_code: bool,
) -> None:
    """`mptk eval` of a decoder in torch: perplexity, lm-eval tasks, or both."""
    from mptk.io import data as text
    from mptk.io import evaluation
    from mptk.protocols.execution import find_device
    from mptk.tasks import load_decoder

    evaluation.check_trusted(include_path, trust_remote_code)
    with stages(err) as progress:
        progress("load", 0, 0)
        there = find_device(device)
        loaded = load_decoder(model, trust_remote_code=trust_remote_code)
        module: Any = loaded.model.to(there)  # type: ignore[arg-type]
        result: dict[str, object] = {"model": model}
        if data is not None:
            text.check_length(loaded.model, length)
            held_out = text.evaluation_windows(loaded.tokenizer, data, length, windows)
            text.check_ids(loaded.model, held_out)
            measured = evaluation.perplexity(
                lambda ids: module(ids.to(there), use_cache=False).logits,
                held_out,
                data=text.protocol_name(data),
                progress=lambda done, total: progress("perplexity", done, total),
            )
            result |= {"perplexity": measured.value, "protocol": measured.protocol}
        if tasks:
            progress("lm-eval", 0, 0)
            result["tasks"] = evaluation.zero_shot(
                loaded, tasks, include_path=include_path, limit=limit, trust_remote_code=trust_remote_code
            )
    views = [] if data is None else [perplexity_view(measured)]
    show(json_file, result, Group(*views, *([JSON.from_data(result["tasks"])] if tasks else [])))


def evaluate_onnx(
    model: str,
    data: str | None,
    length: int,
    windows: int | None,
    tasks: str,
    threads: int,
    device: str,
    json_file: Path | None,
) -> None:
    """`mptk eval --runtime onnx`: perplexity of an exported graph, plain or quantised."""
    from mptk.io import data as text
    from mptk.io import evaluation
    from mptk.ort.generation import TextGenerator
    from mptk.protocols.execution import session_device

    if tasks or data is None:
        raise MptkError("lm-eval tasks run in torch; give --data TEXT for perplexity with --runtime onnx")
    with stages(err) as progress:
        progress("load", 0, 0)
        runner = TextGenerator(model, threads=threads, device=session_device(device))
        text.check_positions(runner.positions, length, f"windows of {length} tokens")
        held_out = text.evaluation_windows(runner.tokenizer, data, length, windows)
        runner.check_ids(held_out.flatten().tolist())
        measured = evaluation.perplexity(
            runner.decoder.torch_logits,
            held_out,
            data=text.protocol_name(data),
            progress=lambda done, total: progress("perplexity", done, total),
        )
    content = {"model": model, "perplexity": measured.value, "protocol": measured.protocol}
    show(json_file, content, perplexity_view(measured))


def quality_view(found: Mapping[str, Any]) -> Text:
    """How good models are, by their metric, with its protocol."""
    values = [(name, value) for name, value in found.items() if isinstance(value, float)]
    said = ", ".join(f"{value:.4f} {name}" for name, value in values)
    return Text(f"{found['metric']} {said}  ({found['protocol']})")


def perplexity_view(measured: Perplexity) -> Text:
    """A perplexity and its protocol."""
    return Text(f"perplexity {measured.value:.3f}  ({measured.protocol})")


@command(examples=("bench smollm2-135m runs/m30 --threads 1,4 --plot bench.png",))
def bench(
    models: Annotated[list[str], typer.Argument(help="Models, folders or .onnx files; the first is the baseline.")],
    lengths: Annotated[str, typer.Option(help="Tokens of the prompt or in the cache, comma-separated.")] = "128,512",
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1",
    threads: Annotated[str, typer.Option(help="Thread counts, comma-separated.")] = "1",
    rounds: Annotated[int, typer.Option(**within(2, 10_000), help="Alternating rounds of each case.")] = 7,
    device: Device = Settings.device,
    json_file: Json = None,
    markdown: Annotated[
        Path | None, typer.Option(callback=file_to_write(), help="Also write the table to this file.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(callback=file_to_write(*PLOTS), help="Also plot the ratios to this file (.png, .svg, .pdf)."),
    ] = None,
) -> None:
    """Time prefill and decode in ONNX Runtime, in turns in one process. Shows ideal ratios and the peak, too."""
    from mptk.api import compiler as api
    from mptk.cli.plot import draw_bench, require_matplotlib
    from mptk.publish.manifest import update_manifest
    from mptk.publish.publish import amend
    from mptk.report import terminal as report

    counts = {
        name: parse_counts(text, f"--{name}")
        for name, text in (("lengths", lengths), ("batches", batches), ("threads", threads))
    }
    if twice := [model for model in models if models.count(model) > 1]:
        raise MptkError(f"{twice[0]} is given twice, and would be compared with itself; name it once")
    if plot is not None:
        require_matplotlib()
    with stages(err) as progress:
        result = api.bench(
            models,
            device=device,
            progress=progress,
            rounds=rounds,
            **counts,
        )
    for model in models[1:]:
        if (Path(model) / "report.json").is_file():
            with amend(Path(model).resolve()) as new:
                write_json(new / "bench.json", result.to_json())
                update_manifest(new, "bench.json")
    if markdown is not None:
        write_text(markdown, report.bench_markdown(result))
    if plot is not None:
        draw_bench(result, plot)
    show(json_file, result.to_json(), report.bench_view(result))


@command(examples=("push runs/m30 me/smollm2-pruned --private",))
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that mptk wrote.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made if missing.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a new repository. Default: as your account makes them."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch; made if missing. Default: the main one.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Upload a folder, model card included, to the hub. It must be as mptk wrote it.

    report.json and run.yaml name the dense model and the data as you gave them, local paths included.
    """
    from mptk.publish.push import push as upload

    with stages(err) as progress:
        progress("upload", 0, 0)
        echo(upload(folder, repo, private=private, revision=revision, message=message))
