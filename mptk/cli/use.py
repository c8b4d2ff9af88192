"""use: commands that use a model, dense or pruned: export, generate, eval, bench."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.json import JSON
from rich.text import Text

from mptk.cli.app import announce_reading, register_command, show_result
from mptk.cli.console import err, out, print_text, show_stages
from mptk.cli.options import (
    JsonOption,
    ModelArgument,
    make_choice_arguments,
    make_file_option,
    make_folder_option,
    make_number_option,
    parse_counts,
    parse_names,
    refuse,
)
from mptk.config import COMPARED_TYPES, SEED, Choices, Settings
from mptk.errors import InputError
from mptk.files import write_json, write_text
from mptk.files.outputs import TABLE_MARK
from mptk.ort.graph_files import find_onnx_file
from mptk.publish.folder import check_replaceable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mptk.ort.generation import PromptImages, Sampling, TextGenerator

PLOTS = (".png", ".svg", ".pdf")
EVAL = "mptk-eval/1"
RUNTIMES = make_choice_arguments(Choices(("torch", "onnx")))


def check_export_options(folder: Path, settings: Settings) -> None:
    """Check the options of ``export``, and that the result may have its folder."""
    check_replaceable(folder, settings.overwrite)
    if "int4" not in settings.quantize:
        refuse(("data",), "only int4 needs a text; add --quantize int4, or leave it out")


def check_generation(model: str, temperature: float) -> None:
    """Refuse what has no graph, and typed options that would do nothing, as nothing is sampled."""
    find_onnx_file(model)
    if not temperature:
        why = "temperature 0 takes the likeliest token; give --temperature, or leave it out"
        refuse(("top_k", "top_p", "seed"), why)


def check_eval(data: str | None, tasks: str, runtime: str) -> None:
    """Check the options of ``eval``."""
    if data is None:
        refuse(("length", "windows"), "it needs a text to measure on; give --data, or leave it out")
    if not tasks:
        refuse(("limit", "include_path"), "it is for lm-eval tasks; give --tasks, or leave it out")
    if runtime == "onnx":
        refuse(("trust_remote_code",), "ONNX Runtime runs a graph, not a model's code; leave it out")
    else:
        refuse(("threads",), "torch uses all cores; give --runtime onnx, or leave it out")
    if data is None and not tasks:
        raise InputError(
            "nothing to evaluate; give --data TEXT for perplexity or --tasks NAMES for lm-eval", name="data"
        )
    if tasks and runtime == "onnx":
        raise InputError(
            "lm-eval tasks run in torch; give --data TEXT for perplexity with --runtime onnx", name="tasks"
        )


def check_bench(models: Sequence[str], lengths: str, batches: str, threads: str, quantize: str) -> None:
    """Check the options of ``bench``."""
    parse_cases(lengths, batches, threads)
    Settings(quantize=parse_names(quantize))
    # Timings are named by model, so a model that is named twice could not be told apart.
    if twice := [model for model in models if models.count(model) > 1]:
        raise InputError(f"{twice[0]} is given twice; name it once", name=twice[0])


def parse_cases(lengths: str, batches: str, threads: str) -> dict[str, tuple[int, ...]]:
    """The numbers of the cases that ``bench`` times, by option."""
    return {
        name: parse_counts(text, f"--{name}")
        for name, text in (("lengths", lengths), ("batches", batches), ("threads", threads))
    }


@register_command(
    "export", check=check_export_options, examples=("export smollm2-135m --quantize int8 --out runs/dense",)
)
def export_onnx(
    model: ModelArgument,
    folder: Annotated[Path, make_folder_option("Folder for the result; an earlier result is replaced.")],
    settings: Settings,
    data: Annotated[str | None, typer.Option(help="Text for a decoder's int4: file, folder or datasets id.")] = None,
) -> None:
    """Write a model as ONNX, a decoder with its KV cache, with its config and tokenizer."""
    announce_reading(model)
    from mptk.api import graphs as api

    notes: list[str] = []
    with show_stages(err) as progress:
        api.export_folder(model, folder, settings, text=data, progress=progress, on_note=notes.append)
    out.print(f"written to {folder}", *notes, sep="\n", soft_wrap=True, highlight=False)


@register_command(
    "generate",
    check=check_generation,
    examples=(
        'generate runs/m30 "Once upon a time"',
        'generate runs/m30 "Why is the sky blue?" --chat --temperature 0.7',
        'generate runs/llava "What is it?" --image cat.png',
    ),
    base=Settings(threads=0),
)
def generate_text(
    model: Annotated[str, typer.Argument(help="The --out folder of `prune` or `export`, or an .onnx file in it.")],
    prompts: Annotated[list[str], typer.Argument(help="Text to continue; several run as one batch.")],
    settings: Settings,
    max_new_tokens: Annotated[int, make_number_option("Most new tokens for each prompt.", 1)] = 64,
    temperature: Annotated[float, make_number_option("0: take the likeliest token; above 0: sample.", 0, 1e6)] = 0.0,
    top_k: Annotated[int, make_number_option("Sample among this many of the likeliest tokens; 0: all.", 0)] = 50,
    top_p: Annotated[
        float, make_number_option("Sample among the likeliest tokens that together have this probability.", 0, 1)
    ] = 1.0,
    cut: Annotated[
        bool,
        typer.Option(
            "--cut", help="If the text exceeds the model's positions, cut the prompt's start and the answer's end."
        ),
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    seed: Annotated[int, make_number_option("Seed of the sampling.", *SEED)] = 0,
) -> None:
    """Generate text in ONNX Runtime. It streams the answer to one prompt; several prompts run as one batch."""
    from mptk.ort.generation import Sampling, encode_prompts, fit_prompts

    runner = open_generator(model, settings)
    encoded = encode_prompts(runner.tokenizer, prompts, chat=chat)
    if cut:
        encoded, max_new_tokens = fit_prompts(runner.positions, encoded, max_new_tokens)
    print_answers(runner, prompts, encoded, max_new_tokens, Sampling(temperature, top_k, top_p), seed)


def open_generator(model: str, settings: Settings) -> TextGenerator:
    """What generates text with a folder's graphs."""
    from mptk.ort.generation import TextGenerator
    from mptk.protocols import find_session_device

    return TextGenerator(model, threads=settings.threads, device=find_session_device(settings.device))


def print_answers(
    runner: TextGenerator,
    prompts: Sequence[str],
    encoded: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    images: PromptImages | None = None,
) -> None:
    """Print what a model writes after each prompt. ``encoded``: their token ids. ``images``: of the only prompt."""
    # One prompt streams; the rows of a batch end at different steps, so they are printed when all are done.
    steps = runner.stream(encoded, limit=max_new_tokens, sampling=sampling, seed=seed, images=images)
    if len(prompts) == 1:
        print_stream(runner.tokenizer, (token for (token,) in steps))
    else:
        for prompt, row in zip(prompts, zip(*steps, strict=True), strict=True):
            text = runner.tokenizer.decode([token for token in row if token is not None], skip_special_tokens=True)
            print_text(f"{prompt} ▸{text}\n")
    # To the standard error, so that a pipe gets only the text.
    speed = runner.speed
    err.print(
        f"{speed.prompt_tokens} prompt tokens, first token after {speed.first_s * 1000:.0f} ms; "
        f"{speed.new_tokens} new tokens, {speed.rate:.1f} tokens/s, {runner.decoder.providers[0]}",
        highlight=False,
    )


def print_stream(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int | None]) -> None:
    """Print text as its tokens arrive."""
    import numpy as np
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """Prints through the console."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print_text(text, end="\n" if stream_end else "")

    # transformers' streamer holds a word back until its last token has come: tokens may be parts of a letter.
    streamer: Any = Streamer(tokenizer, skip_special_tokens=True)
    for token in tokens:
        streamer.put(np.array([token]))
    streamer.end()


@register_command(
    "eval",
    check=check_eval,
    examples=("eval runs/m30 --data wikitext2 --windows 40", "eval runs/m30 --tasks arc_easy --limit 100"),
    base=Settings(threads=0),
)
def evaluate_models(
    model: ModelArgument,
    settings: Settings,
    data: Annotated[str | None, typer.Option(help="Text to measure on (or images, sounds, inputs).")] = None,
    length: Annotated[int, make_number_option("Tokens in a window.", 8)] = 512,
    windows: Annotated[int | None, make_number_option("Use only the first windows.", 1)] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, comma-separated.")] = "",
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with lm-eval task files; needs --trust-remote-code.")
    ] = None,
    limit: Annotated[int | None, make_number_option("Examples of each task.", 1)] = None,
    runtime: Annotated[str, typer.Option(help="onnx: a folder's ONNX graph or an .onnx file.", **RUNTIMES)] = "torch",
    json_file: JsonOption = None,
) -> None:
    """Measure a model's quality by its kind, as a decoder's perplexity in torch or ONNX Runtime, and lm-eval tasks."""
    announce_reading(model, json_file=json_file)
    from mptk.api import use

    # Three ways to measure: a graph in ONNX Runtime, a decoder in torch, and any other kind by its task's metric.
    views = list[RenderableType]()
    result: dict[str, object] = {"format": EVAL, "model": model}
    measured, scores = None, None
    with show_stages(err) as progress:
        if runtime == "onnx":
            measured = use.of_graph(model, str(data), settings, progress, length, windows)
        elif tasks or use.is_text_decoder(model, trust=settings.trust):
            measured, scores = use.of_model(
                model, data, settings, progress, length, windows, parse_names(tasks), include_path, limit
            )
        else:
            found = use.evaluate(
                model,
                data,
                windows=windows or Settings.eval_windows,
                length=length,
                device=settings.device,
                trust_remote_code=settings.trust_remote_code,
                progress=progress,
            )
            result["quality"] = found  # it has a ``model``, too
            views.append(build_quality_text(found))
    # The JSON and what is printed, by what was measured.
    if measured is not None:
        result |= {"perplexity": measured.value, "protocol": measured.protocol}
        views.append(Text(f"perplexity {measured.value:.3f}  ({measured.protocol})"))
    if scores is not None:
        result["tasks"] = scores
        views.append(JSON.from_data(scores))
    show_result(json_file, result, Group(*views))


def build_quality_text(found: Mapping[str, object]) -> Text:
    """The quality of models, with metric, protocol and further figures."""
    from mptk.report.sections import list_further_figures

    values = [(name, value) for name, value in found.items() if isinstance(value, float)]
    said = ", ".join(f"{value:.4f} {name}" for name, value in values)
    return Text("\n".join([f"{found['metric']} {said}  ({found['protocol']})", *list_further_figures(found)]))


@register_command("bench", check=check_bench, examples=("bench smollm2-135m runs/m30 --threads 1,4 --plot bench.png",))
def bench_models(
    models: Annotated[list[str], typer.Argument(help="Models, folders or .onnx files; the first is the baseline.")],
    settings: Settings,
    lengths: Annotated[
        str, typer.Option(help="Tokens of the prompt, in the cache, or of a text, comma-separated.")
    ] = "128,512",
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1",
    threads: Annotated[str, typer.Option(help="Thread counts, comma-separated.")] = "1",
    rounds: Annotated[int, make_number_option("Rounds of each case, in which the models take turns.", 2, 10_000)] = 7,
    quantize: Annotated[
        str, typer.Option(help="Also time a MODEL that is no folder with ONNX in these types; '' for none.")
    ] = ",".join(COMPARED_TYPES),
    json_file: JsonOption = None,
    markdown: Annotated[Path | None, make_file_option("Also write the table to this file.", "table")] = None,
    plot: Annotated[
        Path | None, make_file_option("Also plot the ratios into this file (.png, .svg, .pdf).", "plot", *PLOTS)
    ] = None,
) -> None:
    """Time models of one kind in ONNX Runtime, in turns in one process. Also shows ideal ratios and the peak.

    A decoder's prefill and decode are timed, and a whole run of each graph of another model.
    """
    announce_reading(*models, json_file=json_file)
    from mptk.api import graphs as api
    from mptk.publish.folder import amend
    from mptk.publish.manifest import update_manifest
    from mptk.report.page.charts import write_bench_plot
    from mptk.report.sections import build_bench_view
    from mptk.report.view import render_markdown

    counts = parse_cases(lengths, batches, threads)
    with show_stages(err) as progress:
        result = api.bench(
            models, quantize=parse_names(quantize), device=settings.device, progress=progress, rounds=rounds, **counts
        )
    # A pruned folder keeps its timings, and its report then shows them. The first model is only the baseline.
    for model in models[1:]:
        if (Path(model) / "report.json").is_file():
            with amend(Path(model).resolve()) as new:
                write_json(new / "bench.json", result.to_json())
                update_manifest(new, "bench.json")
    if markdown is not None:
        write_text(markdown, f"{render_markdown(build_bench_view(result))}\n\n<!-- {TABLE_MARK} -->\n")
    if plot is not None:
        write_bench_plot(result, plot)
    show_result(json_file, result.to_json(), build_bench_view(result))
