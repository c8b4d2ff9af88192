"""The public API: each step of the compiler as a function, for use without the command line."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
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
from mptk.errors import MptkError
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
from mptk.proof.proof import proven_extras
from mptk.protocols.execution import execution, session_device
from mptk.protocols.onnx_form import Dense, OnnxForm
from mptk.protocols.values import Extra
from mptk.publish.folder import check_apart, check_replaceable, publish
from mptk.publish.manifest import check_manifest
from mptk.targets.gguf import GgufWeights, LayerWidths, Pattern
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
from passes.verify import Difference

__all__ = ["analyze", "bench", "export", "export_folder", "gguf", "rewrite", "rule", "show", "trace"]


@checked
@sources_forgotten()
def trace(
    model: nn.Module | str | Path, example_inputs: ExampleInputs | None = None, *, dynamic: bool = False
) -> Program:
    """Trace a model to a Program.

    Args:
        model: any ``nn.Module`` (its weights may be on the meta device), or the name of a model: a hub id, a local
            folder, a ``.gguf`` file or a packaged alias. Of a named model only the config is read.
        example_inputs: tensors for ``forward``, by position or by name; transformers models do not need them.
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
    """Find the families of coupled channels that can be cut in a model, and the axes that cannot be cut, with reasons.

    Takes what ``trace`` takes, or a Program. Needs no weights.

    Raises:
        MptkError: as ``trace``; or an op has no axis rule.
    """
    return group.analyze(model if isinstance(model, Program) else trace(model, example_inputs))


@checked
@sources_forgotten()
def rewrite(analysis: Analysis, plan: Plan, *, check: bool = True) -> Program:
    """Cut the analysed program to ``plan``: it gets smaller weights and shape constants, and equals the masked program.

    Args:
        check: prove the cut with a few forward passes. The traced program must equal the module, run as Python. On
            seeded inputs of the traced shapes the cut program must equal the masked one, and the mask must change the
            output. If a head of zeros hides the mask's effect, a copy with random numbers in place of the zeros is
            proven. A program without weights cannot be proven.

    Raises:
        MptkError: the plan does not fit the model; the module keeps state in Python; or the mask does not change the
            output, so that nothing is proven.
        ProofError: the cut program differs from the masked one; the message has the stage and the difference.
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
            if (woken := awake(fine)) is None:
                raise
            _prove(woken, cut, steps, run(woken.program, steps, Log()))
    return replace(results[-1].program, source=None)


def _prove(analysis: Analysis, cut: Cut, steps: Sequence[Pass], proven: Sequence[PassResult]) -> None:
    """Compare the result of each of ``steps`` with the masked program."""
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
    """A program as text: one line for each value, with the names of its axes (``mptk.ir.text``).

    Takes what ``trace`` takes, or a Program. Needs no weights. Sizes of the inputs are symbolic if the model allows it.

    Args:
        after: the pass of the cutting or the reference pipeline after which the program is shown; default: as traced.
        plan: the plan that the pass cuts to.
        source: add the line of the model's source code to each call.

    Raises:
        MptkError: as ``analyze``; the plan does not fit; there is no such pass; or a pass is given without a plan or a
            plan without a pass.
    """
    if (after is None) != (plan is None):
        raise MptkError("a pass needs the plan that it cuts to, and a plan the pass; give both --after and --plan")
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
    """Write a model as ONNX, cut to ``plan`` if one is given. A causal language model gets a KV cache.

    A model of another kind gets the graphs of its task; ``logits``, ``text`` and ``objective`` are for decoders only.
    Names, dynamic axes and external data follow the ecosystem (``docs/onnx.md``). Returns the folder.

    Args:
        model: with real weights; of any float type.
        folder: made if missing.
        logits: for ``"all"`` positions or only the ``"last"``, which saves a sixth of a small model's prefill.
        quantize: schemes of ``passes.pipelines.SCHEMES`` to write too, each into its file of ``names.QUANTIZED``.
        text: token ids, int64 [windows, length], on which ``int4`` is calibrated; without it each weight is rounded by
            itself.
        onnx_dtype: ``"auto"``, the model's type; or, for a model in float32, ``"float32"`` or ``"float16"``. In float16
            the logits and the rotary angles stay float32.
        objective: ``"decode"`` or ``"prefill"``: the phase in which the graph must be fast.

    Raises:
        MptkError: the model keeps a state that is not keys and values; torch.export or the exporter refuses it; there
            is no such scheme, objective or type; or quantised graphs are asked for and the model is not float32.
    """
    _check_whole(plan)
    settings = Settings(
        logits=logits, quantize=tuple(quantize), objective=objective, onnx_dtype=onnx_dtype, strict=True
    )
    form, program = form_of(model) or CAUSAL_LM.onnx, None
    assert form is not None
    if form is not CAUSAL_LM.onnx:
        if model.dtype is not torch.float32:
            raise MptkError(f"the graphs of a {type(model).__name__} need a float32 model; call model.float()")
        program = trace(model, example_of(model), dynamic=True)
    form.check(model, settings)
    dense = Dense(Loaded(model, None, type(model).__name__, Path()), settings, program, about=metadata)
    form.export(dense, plan, None if text is None else next_tokens(text), Path(folder), Log())
    return Path(folder)


def _check_whole(plan: Plan | None) -> None:
    """Raise MptkError if a plan converts the model first: the cut would then start from another model."""
    for kind, _ in () if plan is None else planned(plan):
        raise MptkError(
            f"this plan {kind.does}, which only mptk.prune can do; call mptk.prune(plan=...) with the plan's file"
        )


@checked
def gguf(folder: str | Path, like: str | Path, out: str | Path) -> list[LayerWidths]:
    """Write a pruned LLaMA model as the GGUF file ``out`` for llama.cpp; returns the widths of each layer.

    Args:
        folder: an ``out`` folder of ``prune`` or ``recover``, of the stock or the graph target.
        like: the dense model's GGUF file, or the alias of a packaged one; vocabulary and settings come from it.

    Raises:
        MptkError: ``folder`` or ``like`` cannot be read; they do not belong to one LLaMA model; or ``out`` cannot be
            written.
        ProofError: the written file differs from the folder.
    """
    place, pattern = path_of(folder), models.locate(str(like))
    if pattern.is_dir():
        raise MptkError(f"{like} is not a GGUF file; give the .gguf file of the dense model")
    check_apart(Path(out), place, pattern)
    check_manifest(place)
    plan = Plan.load(place / "plan.json")
    made = GgufWeights(stored_weights(place, trust=False), plan, Pattern(pattern))
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
    """Write a model of any task as a folder for ONNX consumers: config, tokenizer and ``onnx/``.

    The graph of an image model takes images of its config's size.

    ``settings``: only the fields for graphs and for the machine count. ``text``: a file, folder or dataset to calibrate
    a decoder's ``int4`` on, in 32 windows of at most 256 tokens. ``on_note`` gets a line for each optional file that is
    left out.

    Raises:
        MptkError: as ``export``; or ``out`` exists and was not made by mptk, or holds other files.
        ProofError: the settings are ``strict``, and a quantised weight differs by more than rounding allows.
    """
    say, settings = progress or silent, settings or Settings()
    check_replaceable(Path(out), settings.overwrite)
    check_apart(Path(out), model, *([] if text is None else [text]))
    say("load", 0, 0)
    dense, form = _dense(model, settings, text)
    loaded = dense.loaded
    positions = positions_of(loaded.model.config) or 256
    windows = None if text is None else data.calibration(loaded.model, loaded.tokenizer, text, 32, min(256, positions))
    with publish(Path(out), overwrite=settings.overwrite) as folder:
        say("export ONNX", 0, 0)
        with within(say, "export ONNX"):
            samples = None if windows is None else next_tokens(windows)
            notes = form.export(dense, None, samples, folder / "onnx", Log())
        for note in [*notes, *_checked(folder / "onnx", say, settings.strict)]:
            on_note(note)
        loaded.model.config.save_pretrained(folder)
        copy_processors(loaded.path, folder, same_features=True)
        generation = getattr(loaded.model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        if loaded.tokenizer is not None:
            save_tokenizer(loaded.tokenizer, folder)
        for note in describe(form, loaded.model.config, generation, folder, settings.strict):
            on_note(note)
    return Path(out)


def _dense(model: str, settings: Settings, text: str | None) -> tuple[Dense, OnnxForm]:
    """The model as it is written as ONNX, and its form. Errors are those of ``export_folder``."""
    resident, executor = execution(settings)
    loaded, task = open_task(model, resident, trust_remote_code=settings.trust_remote_code)
    if task.onnx is None:
        raise MptkError(f"mptk has no ONNX form of a {task.summary}; export {model} with optimum")
    task.onnx.check(loaded.model, settings)
    if text is not None and task.onnx is not CAUSAL_LM.onnx:
        raise MptkError(f"only a decoder's int4 needs text, and {model} is a {task.summary}; leave out --data")
    program = traced(loaded, task, executor, like=task.example(loaded.model))
    if (length := task.only_length(program)) is not None:
        raise MptkError(
            f"{model} can be traced only for {length} tokens, so its ONNX graph would take no other length; mptk "
            "writes none for it"
        )
    return Dense(loaded, settings, program, executor), task.onnx


def _checked(folder: Path, say: Progress, strict: bool) -> list[str]:
    """Compare the quantised graphs of a folder with its float graph. Returns notes on graphs that are left out.

    Raises:
        ProofError: ``strict``, and a graph differs by more than rounding allows.
    """

    def check(file: Path) -> list[Difference]:
        with within(say, f"check {scheme_of(file)}"):
            check_quantized(folder / ONNX_FILE, file, scheme_of(file))
        return []

    extras = [
        Extra(f"{folder.name}/{file.name}", partial(check, file), partial(remove_graph, file))
        for file in quantized_files(folder)
    ]
    return proven_extras(extras, strict)[1]


@checked
@sources_forgotten()
def bench(
    models: Sequence[str | Path], *, device: str = Settings.device, progress: Progress | None = None, **settings: Any
) -> Bench:
    """Time prefill and decode in ONNX Runtime, all graphs taking turns in one process (``mptk.ort.bench``).

    Args:
        models: models, folders with ``onnx`` in them, or ``.onnx`` files; the first is the baseline. Quantised graphs
            of a folder are timed too. A model without ONNX is first exported into the cache folder.
        device: as in ``Settings``; ONNX Runtime must have an execution provider for it.
        progress: called with the progress of each stage.
        settings: of ``mptk.ort.bench.bench_decoders``: ``lengths`` (tokens), ``batches``, ``threads``, ``rounds``.

    Returns:
        A ``Bench``: times in milliseconds, each with its ratio to the first graph's and the ideal ratio.

    Raises:
        MptkError: a model cannot be found or exported, has too few positions, or there is no such device.
    """
    check_arguments(bench_decoders, settings)
    if not models:
        raise MptkError("no model is given; give models, folders or .onnx files")
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
    """The positions of a model, or of the model that a graph was made from, by its config; None if unknown."""
    there = Path(model)
    if not model.endswith(".onnx") and not any((folder / ONNX_FILE).is_file() for folder in (there, there / "onnx")):
        check_decoder(model)
        return positions_of(models.load_config(model))
    folder = model_folder(there)
    return positions_of(models.load_config(str(folder))) if (folder / "config.json").is_file() else None


def onnx_folder(model: str, progress: Progress | None = None) -> Path:
    """``MODEL`` or ``MODEL/onnx`` if it holds ``model.onnx``, else an export in the cache folder.

    The export's name comes from the content of the model's files, so a changed model is exported again. A changed
    export is replaced, too.
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
