"""The public API: each step of the compiler as a function, for use without the command line."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

import passes.frontend.trace
from mptk.arguments import check_arguments, checked
from mptk.compat.torch import sources_forgotten
from mptk.compile.changes import stored_weights
from mptk.compile.trace import traced
from mptk.config.settings import Settings
from mptk.conversions import planned
from mptk.errors import MptkError, ProofError
from mptk.files import path_of, write_result
from mptk.io import data, models
from mptk.io.cache import build_private, private_place
from mptk.io.checkpoint import copy_processors, save_tokenizer
from mptk.io.data import check_positions, positions_of
from mptk.io.dense import fingerprint
from mptk.io.live import unwrapped
from mptk.io.models import Loaded
from mptk.ir.families import Analysis
from mptk.ir.passes import Log, Pass, PassResult, run, shapes
from mptk.ir.plan import Plan
from mptk.ir.program import Program
from mptk.ir.resolved_plan import Cut, removed_blocks, resolve_plan
from mptk.ir.samples import next_tokens
from mptk.ir.text import program_text
from mptk.ort.bench import LENGTHS, Bench, bench_decoders
from mptk.ort.decoder import model_folder
from mptk.progress import Progress, silent, within
from mptk.protocols.execution import execution, session_device
from mptk.protocols.onnx_form import Dense
from mptk.protocols.values import left_out
from mptk.publish.folder import check_apart, check_replaceable, publish
from mptk.publish.manifest import check_manifest
from mptk.targets.gguf import Conversion, LayerWidths, Pattern
from mptk.targets.onnx import describe, remove_graph
from mptk.tasks import CAUSAL_LM, check_decoder, example_of, form_of, load_decoder, open_task
from mptk.version import __version__
from passes.analysis import group
from passes.analysis.rules import rule
from passes.check_cut import Unmoved, awake, check_cut, in_fine_types
from passes.frontend.eager import compared
from passes.frontend.trace import ExampleInputs
from passes.frontend.trace_decoder import LogitsScope
from passes.pipelines import cutting, passes_until
from passes.targets.onnx.check_quantized import check_quantized
from passes.targets.onnx.names import ONNX_FILE, quantized_files, scheme_of
from passes.transforms.rewrite import Rewrite

__all__ = ["analyze", "bench", "export", "export_folder", "gguf", "rewrite", "rule", "show", "trace"]


@checked
@sources_forgotten()
def trace(
    model: nn.Module | str | Path, example_inputs: ExampleInputs | None = None, *, dynamic: bool = False
) -> Program:
    """Trace a model to a Program.

    Args:
        model: any ``nn.Module`` (its weights may lie on the meta device), or what ``io.models`` can find: a hub id,
            a local folder, a ``.gguf`` file or a packaged alias; of those only the config is read.
        example_inputs: tensors for ``forward``, by position or by name; may be left out for transformers models.
        dynamic: leave batch size and sequence length symbolic, so that the program runs at any.

    Raises:
        MptkError: the model is not found, or torch.export cannot trace it.
    """
    module = unwrapped(model) if isinstance(model, nn.Module) else models.skeleton(str(model))
    example = example_of(module) if example_inputs is None else example_inputs
    return passes.frontend.trace.trace(module, example, dynamic=dynamic)


@checked
@sources_forgotten()
def analyze(model: nn.Module | str | Path | Program, example_inputs: ExampleInputs | None = None) -> Analysis:
    """Find what can be cut in a model: its families of coupled channels, and what cannot be cut and why.

    Takes what ``trace`` takes, or a Program. Needs no weights.

    Raises:
        MptkError: as ``trace``; or an op has no axis rule.
    """
    return group.analyze(model if isinstance(model, Program) else trace(model, example_inputs))


@checked
@sources_forgotten()
def rewrite(analysis: Analysis, plan: Plan, *, check: bool = True) -> Program:
    """Cut the analysed program to ``plan``: smaller weights, right shape constants, the same function as when masked.

    Args:
        check: prove it: the traced program equals the module, run as Python; on seeded inputs of the traced shapes
            the cut program equals the masked one, and the mask moves the output. Costs a few forward passes; a program
            without weights cannot be proven. Where a head of zeros hides what the mask does, the same is proven of a
            copy with random numbers in its place.

    Raises:
        MptkError: the plan does not fit the model; the module keeps state in Python; or the mask does not move the
            output, so that nothing is proven.
        ProofError: the cut program is another one than the masked; with the stage and the size of the difference.
    """
    _check_whole(plan)
    steps = cutting(analysis, cut := resolve_plan(analysis, plan))
    if check and analysis.program.has_values and analysis.program.source is not None:
        analysis = replace(analysis, program=compared(analysis.program))
    results = run(analysis.program, steps, Log())
    if check and results[-1].program.has_values:
        fine = in_fine_types(analysis)
        try:
            _prove(fine, cut, steps, results if fine is analysis else run(fine.program, steps, Log()))
        except Unmoved:
            woken = awake(fine)
            _prove(woken, cut, steps, run(woken.program, steps, Log()))
    return replace(results[-1].program, source=None)


def _prove(analysis: Analysis, cut: Cut, steps: Sequence[Pass], proven: Sequence[PassResult]) -> None:
    """Compare what each of ``steps`` made of the analysed program with the masked one."""
    stages = {step.name: result.program for step, result in zip(steps, proven, strict=True)}
    if removed_blocks(analysis, cut):
        del stages[Rewrite.name]  # it leaves the blocks to the pass after it
    check_cut(analysis, cut, stages)


@checked
def show(
    model: nn.Module | str | Path | Program,
    example_inputs: ExampleInputs | None = None,
    *,
    after: str | None = None,
    plan: Plan | None = None,
    source: bool = False,
) -> str:
    """A program as text, one line a value, each dimension by the names of its axes (``mptk.ir.text``).

    Takes what ``trace`` takes, or a Program. Needs no weights. Sizes of the inputs are symbolic if the model allows it.

    Args:
        after: a pass of the cutting or the reference pipeline, after which the program is shown; else the traced one.
        plan: what that pass cuts to.
        source: add the line of the model's source to each call.

    Raises:
        MptkError: as ``analyze``; the plan does not fit; there is no such pass; or only one of pass and plan is given.
    """
    if (after is None) != (plan is None):
        raise MptkError(
            "a program is shown after a pass only with the plan that it cuts to; give both --after and --plan"
        )
    program = model if isinstance(model, Program) else trace(model, example_inputs, dynamic=True)
    analysis = group.analyze(program)
    if after is None or plan is None:
        return program_text(program, analysis, source=source)
    _check_whole(plan)
    cut = resolve_plan(analysis, plan)
    result = run(program, passes_until(after, analysis, cut), Log())[-1].program
    sizes = {} if shapes(result) == shapes(program) else cut.sizes
    return program_text(result, analysis, sizes, source=source)


@checked
@sources_forgotten()
def export(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    plan: Plan | None = None,
    logits: LogitsScope = "all",
    quantize: Sequence[str] = (),
    text: Tensor | None = None,
    objective: str = "decode",
    onnx_dtype: str = "auto",
    **metadata: str,
) -> Path:
    """Write a model as ONNX, cut to ``plan`` if one is given: a causal language model with its KV cache.

    A model of another kind has the graphs of its task; ``logits``, ``text`` and ``objective`` are a decoder's. Names,
    dynamic axes and external data follow the ecosystem (``docs/onnx.md``). Returns the folder.

    Args:
        model: with real weights; of any float type.
        folder: made if missing.
        logits: of ``"all"`` positions or the ``"last"`` alone, which saves a sixth of a small model's prefill.
        quantize: ``passes.pipelines.SCHEMES`` to write as well, each in its file of ``names.QUANTIZED``.
        text: token ids, int64 [windows, length], that ``int4`` is rounded for; else each weight is rounded by itself.
        onnx_dtype: ``"auto"``, the model's type; or ``"float32"`` or ``"float16"`` of a model in float32. In float16
            the logits and the rotary angles stay float32.
        objective: ``"decode"`` or ``"prefill"``: which phase the graph is to be fast in, where they differ.

    Raises:
        MptkError: the model keeps another state than keys and values; torch.export or the exporter refuses it; there
            is no such scheme, objective or type; or graphs are to be quantised that are not float32.
    """
    _check_whole(plan)
    settings = Settings(
        logits=logits, quantize=tuple(quantize), objective=objective, onnx_dtype=onnx_dtype, strict=True
    )
    form, program = form_of(model) or CAUSAL_LM.onnx, None
    assert form is not None
    if form is not CAUSAL_LM.onnx:
        if model.dtype is not torch.float32:
            raise MptkError(f"the graphs of a {type(model).__name__} are made of a float32 model; call model.float()")
        program = trace(model, example_of(model), dynamic=True)
    form.check(model, settings)
    dense = Dense(Loaded(model, None, type(model).__name__, Path()), settings, program, about=metadata)
    form.export(dense, plan, None if text is None else next_tokens(text), Path(folder), Log())
    return Path(folder)


def _check_whole(plan: Plan | None) -> None:
    """Raise MptkError if a plan converts the model first: then a cut starts from another model."""
    for kind, _ in () if plan is None else planned(plan):
        raise MptkError(f"this plan {kind.does}, which only mptk.prune(plan=...) does; give it the plan's file")


@checked
def gguf(folder: str | Path, like: str | Path, out: str | Path) -> list[LayerWidths]:
    """Write a pruned LLaMA model as the GGUF file ``out`` for llama.cpp; returns the widths of each layer.

    Args:
        folder: an ``out`` folder of ``prune`` or ``recover``, of the stock or the graph target.
        like: the dense model's GGUF file, or an alias of a packaged one: its vocabulary and settings are taken.

    Raises:
        MptkError: one of both cannot be read; they are not of one LLaMA model; or ``out`` cannot be written.
        ProofError: what was written is not what the folder has.
    """
    place, pattern = path_of(folder), models.locate(str(like))
    if pattern.is_dir():
        raise MptkError(f"{like} is no GGUF file; give the .gguf file of the dense model")
    check_apart(Path(out), place, pattern)
    check_manifest(place)
    plan = Plan.load(place / "plan.json")
    made = Conversion(stored_weights(place, trust=False), plan, Pattern(pattern))
    write_result(path_of(out), made.write)
    return made.layers


@checked
@sources_forgotten()
def export_folder(
    model: str,
    out: str | Path,
    settings: Settings | None = None,
    *,
    text: str | None = None,
    progress: Progress | None = None,
    on_note: Callable[[str], object] = warnings.warn,
) -> Path:
    """Write a model of any task as a folder that ONNX consumers take: config, tokenizer and ``onnx/``.

    The graph of an image model takes images of its config's size.

    ``settings``: of its fields those count that say how graphs are written and what of the machine is used. ``text``: a
    file, folder or dataset of which a decoder's ``int4`` gets 32 windows of 256 tokens, or of all positions.
    ``on_note`` is given a line on each optional file that is left out.

    Raises:
        MptkError: as ``export``; or ``out`` exists and was not made by mptk, or holds other files.
        ProofError: it is ``strict``, and a quantised weight is further from the float one than rounding brings it.
    """
    say, settings = progress or silent, settings or Settings()
    trust, overwrite = settings.trust_remote_code, settings.overwrite
    check_replaceable(Path(out), overwrite)
    check_apart(Path(out), model, *([] if text is None else [text]))
    say("load", 0, 0)
    resident, executor = execution(settings)
    loaded, task = open_task(model, resident, trust_remote_code=trust)
    if task.onnx is None:
        raise MptkError(f"mptk has no ONNX form of a {task.summary}; export {model} with optimum")
    task.onnx.check(loaded.model, settings)
    if text is not None and task.onnx is not CAUSAL_LM.onnx:
        raise MptkError(f"text is for a decoder's int4, and {model} is a {task.summary}; leave out --data")
    program = traced(loaded, task, executor, like=task.example(loaded.model))
    if (length := task.only_length(program)) is not None:
        raise MptkError(f"{model} is traced for {length} tokens alone, which its ONNX would hold; there is none for it")
    dense = Dense(loaded, settings, program, executor)
    positions = positions_of(loaded.model.config) or 256
    windows = None if text is None else data.calibration(loaded.model, loaded.tokenizer, text, 32, min(256, positions))
    with publish(Path(out), overwrite=settings.overwrite) as folder:
        say("export ONNX", 0, 0)
        with within(say, "export ONNX"):
            samples = None if windows is None else next_tokens(windows)
            notes = task.onnx.export(dense, None, samples, folder / "onnx", Log())
        for note in [*notes, *_checked(folder / "onnx", say, settings.strict)]:
            on_note(note)
        loaded.model.config.save_pretrained(folder)
        copy_processors(loaded.path, folder, same_features=True)
        generation = getattr(loaded.model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        if loaded.tokenizer is not None:
            save_tokenizer(loaded.tokenizer, folder)
        for note in describe(task.onnx, loaded.model.config, generation, folder, settings.strict):
            on_note(note)
    return Path(out)


def _checked(folder: Path, say: Progress, strict: bool) -> list[str]:
    """Compare the quantised graphs of a folder with its float graph; notes on those that are left out.

    Raises:
        ProofError: one is further from it than rounding brings it, and it is ``strict``.
    """
    notes = []
    for file in quantized_files(folder):
        try:
            with within(say, f"check {scheme_of(file)}"):
                check_quantized(folder / ONNX_FILE, file, scheme_of(file))
        except ProofError as error:
            if strict:
                raise
            remove_graph(file)
            notes.append(left_out(f"{folder.name}/{file.name}", error))
    return notes


@checked
@sources_forgotten()
def bench(
    models: Sequence[str | Path], *, device: str = Settings.device, progress: Progress | None = None, **settings: Any
) -> Bench:
    """Time prefill and decode in ONNX Runtime, all graphs taking turns in one process (``mptk.ort.bench``).

    Args:
        models: models, folders with ``onnx`` in them, or ``.onnx`` files; the first is what the others are compared
            with. Quantised graphs of a folder are taken as well. A model that has no ONNX is exported first, into the
            cache folder.
        device: as in ``Settings``; ONNX Runtime must have an execution provider for it.
        progress: called with stages.
        settings: of ``mptk.ort.bench.bench_decoders``: ``lengths`` (tokens), ``batches``, ``threads``, ``rounds``.

    Returns:
        A ``Bench``: times in milliseconds, each with its ratio to the first graph's and the ideal ratio.

    Raises:
        MptkError: a model cannot be found or exported, has too few positions, or there is no such device.
    """
    check_arguments(bench_decoders, settings)
    if not models:
        raise MptkError("there is nothing to time; give models, folders or .onnx files")
    there, graphs = session_device(device), dict[str, Path]()
    longest = max(settings.get("lengths", LENGTHS))
    for model in map(str, models):
        check_positions(positions_named(model), longest + 1, f"{longest} tokens and one more in the cache of {model}")
    for model in map(str, models):
        file = Path(model) if model.endswith(".onnx") else onnx_folder(model, progress) / ONNX_FILE
        graphs[model] = file
        if file.name == ONNX_FILE:
            graphs |= {f"{model} {scheme_of(other)}": other for other in quantized_files(file.parent)}
    return bench_decoders(graphs, device=there, progress=progress, **settings)


def positions_named(model: str) -> int | None:
    """The positions of a model, or of the one that a graph was made of, by its config; None if it is not known."""
    there = Path(model)
    if not model.endswith(".onnx") and not any((folder / ONNX_FILE).is_file() for folder in (there, there / "onnx")):
        check_decoder(model)
        return positions_of(models.load_config(model))
    folder = model_folder(there)
    return positions_of(models.load_config(str(folder))) if (folder / "config.json").is_file() else None


def onnx_folder(model: str, progress: Progress | None = None) -> Path:
    """``MODEL`` or ``MODEL/onnx`` if it holds ``model.onnx``, else an export kept in the cache folder.

    Its name there is made of what the model's files hold, so that a model that changed is exported again. So is one
    whose export was changed.
    """
    for own in (Path(model), Path(model) / "onnx"):
        if (own / "model.onnx").is_file():
            return own
    say = progress or silent

    def build(folder: Path) -> None:
        say(f"exporting {model} to ONNX", 0, 1)
        export(load_decoder(model).model, folder)
        say(f"exporting {model} to ONNX", 1, 1)

    made_of = (fingerprint(model), __version__, torch.__version__, transformers.__version__)
    stamp = hashlib.sha256(" ".join(made_of).encode()).hexdigest()[:16]
    return build_private(private_place("onnx", stamp), build)
