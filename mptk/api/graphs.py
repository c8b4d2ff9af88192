"""graphs: write models as ONNX, and time ONNX graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mptk.api.compiler import check_plain_plan, trace
from mptk.api.pruned import Pruned, resolve_place
from mptk.api.words import wrap_public
from mptk.arguments import check_arguments
from mptk.compat.torch import forget_sources
from mptk.compile.trace import trace_loaded
from mptk.config import AUTO_SCHEME, COMPARED_TYPES, Settings
from mptk.errors import InputError, ModelError, TargetError
from mptk.files.outputs import check_apart, check_file
from mptk.io import (
    Loaded,
    build_private,
    check_positions,
    copy_processors,
    data,
    find_model_classes,
    find_position_limit,
    hash_model,
    locate_private_folder,
    models,
    save_tokenizer,
)
from mptk.ir import Log, Plan, make_token_samples
from mptk.ort.bench import LENGTHS, Bench, bench_graphs
from mptk.ort.graph_files import find_graph, find_model_folder, find_onnx_file
from mptk.ort.steps import find_phase_graphs
from mptk.plain import hash_text
from mptk.progress import Progress, enter_stage, show_nothing
from mptk.proof.proof import check_proof, prove_extras
from mptk.protocols import Dense, OnnxForm, Use, build_executor, find_session_device
from mptk.publish.folder import check_replaceable, publish
from mptk.run.inputs import GivenInputs, Inputs
from mptk.run.open import open_in_memory
from mptk.staged.staged import EXECUTOR
from mptk.targets.onnx import describe_graphs, list_quantized
from mptk.tasks import CAUSAL_LM, find_task_form, load_folder_inputs, open_task
from mptk.tasks.onnx_export import check_form, cut_to_plan, export_form
from mptk.tasks.onnx_proof import list_form_stages
from mptk.trust import NO_CODE
from mptk.version import __version__
from passes.frontend.trace_decoder import LogitsScope
from passes.targets.onnx.check_quantized import check_quantized
from passes.targets.onnx.names import (
    ONNX_FOLDER,
    list_quantized_files,
    name_float_file,
    name_quantized_file,
    read_scheme,
)
from passes.verify import Difference, prove

__all__ = ["bench", "export", "export_folder", "find_onnx_folder"]


@wrap_public
@forget_sources()
def export(
    model: nn.Module | Pruned,
    folder: str | Path,
    *,
    example_inputs: GivenInputs | None = None,
    plan: Plan | None = None,
    logits: LogitsScope = "all",
    quantize: Sequence[str] = (),
    text: Tensor | None = None,
    objective: str = "decode",
    onnx_dtype: str = "auto",
    overwrite: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **metadata: object,
) -> Path:
    """Write a model as ONNX, cut to ``plan`` if one is given. A causal language model gets a KV cache.

    A model of another kind gets the graphs of its task; ``logits``, ``text`` and ``objective`` are for decoders only.
    Names, dynamic axes and external data follow the ecosystem (``docs/onnx.md``). Returns the folder. The graph of a
    plain module, such as ``Pruned.model``, is compared with it in ONNX Runtime; its open sizes are open in the graph.

    Args:
        model: with real weights; of any float type. Of a ``Pruned`` its model, with the weights that it has now.
        folder: made if missing.
        example_inputs: as in ``prune``: only for a module that is not a transformers model, which needs them.
        logits: for ``"all"`` positions or only the ``"last"``, which saves a sixth of a small model's prefill.
        quantize: schemes of ``passes.pipelines.ONNX_SCHEMES`` to write too, each into its files of ``names.quantized``.
        text: token ids, int64 [windows, length], on which ``int4`` is calibrated; without it weights are only rounded.
        onnx_dtype: ``"auto"``, the model's type; or, for a model in float32, ``"float32"`` or ``"float16"``. In float16
            the logits and the rotary angles stay float32.
        objective: ``"decode"`` or ``"prefill"``: the phase in which the graph must be fast.
        overwrite: replace graphs in ``folder`` that mptk did not write, too.
        tokenizer: written beside the graphs of a transformers model, with its config, so that ``mptk.generate`` runs
            the folder.
        metadata: further entries of the graphs' metadata, strings.

    Raises:
        MptkError: ``folder`` lies in the ``Pruned``'s, or has graphs of somebody else; the model keeps a state that is
            not keys and values; torch.export or the exporter refuses it; there is no such scheme, objective or type;
            quantised graphs are asked for and the model is not float32; or an entry of the metadata is not a string.
        ProofError: ONNX Runtime computes something else than the module.
    """
    # What can be refused before anything is traced.
    check_plain_plan(plan)
    check_named_types(quantize)
    about = check_metadata(metadata)
    settings = Settings(
        logits=logits, quantize=tuple(quantize), objective=objective, onnx_dtype=onnx_dtype, strict=True
    )
    for file in Path(folder).glob("*.onnx"):
        check_file(file, "graph", overwrite)
    # A Pruned stands for its module with the present weights, and brings its example inputs.
    if isinstance(model, Pruned):
        check_apart(folder, model.proven)
        module, inputs = model.present, load_folder_inputs(model.proven, model.report)
        model, example_inputs = module, inputs if example_inputs is None else example_inputs
    place = resolve_place(folder)
    if not isinstance(model, PreTrainedModel):
        if tokenizer is not None:
            raise InputError(
                f"a {type(model).__name__} is not a transformers model and reads no texts; leave out tokenizer",
                name="tokenizer",
            )
        _export_module(model, place, example_inputs, plan, settings, about)
        return Path(folder)
    # The form of its task. A model of no task is treated as a decoder.
    form, name = find_task_form(model) or CAUSAL_LM.onnx, type(model).__name__
    assert form is not None
    if form is not CAUSAL_LM.onnx and model.dtype is not torch.float32:
        raise ModelError(f"the graphs of a {name} need a float32 model; call model.float()", name=name)
    # A decoder's form traces the model itself, with its cache.
    program = None if form is CAUSAL_LM.onnx else trace(model, dynamic=True)
    check_form(form, settings)
    dense = Dense(Loaded(model, None, name, Path()), settings, program, about=about)
    export_form(form, dense, plan, None if text is None else make_token_samples(text), place, Log())
    if tokenizer is not None:
        save_tokenizer(tokenizer, place)
        model.config.save_pretrained(place)
        if (generation := getattr(model, "generation_config", None)) is not None:
            generation.save_pretrained(place)
    return Path(folder)


def check_named_types(quantize: Sequence[str]) -> None:
    """Raise MptkError if a type is to be chosen: without a limit nothing can choose."""
    if AUTO_SCHEME in quantize:
        raise InputError(
            "--quantize auto is for `mptk prune` with a limit; name the types, as --quantize int8", name="quantize"
        )


def check_metadata(given: Mapping[str, object]) -> dict[str, str]:
    """Entries for a graph's metadata. Raises MptkError if one is not a string, as a misspelt keyword's value is not."""
    for name, value in given.items():
        if not isinstance(value, str):
            raise InputError(
                f"export has no keyword {name}, and what it does not know is metadata of the graph, which is a string; "
                f"leave {name} out, or give a string",
                name=name,
            )
    return {name: str(value) for name, value in given.items()}


def _export_module(
    module: nn.Module,
    folder: Path,
    example_inputs: GivenInputs | None,
    plan: Plan | None,
    settings: Settings,
    metadata: Mapping[str, str],
) -> None:
    """Write a plain module as ONNX, and compare ONNX Runtime with it."""
    # As in a run, though without a folder: open, trace, write, and prove the graph against the (cut) program.
    opened = open_in_memory(module, NO_CODE, Inputs(example_inputs=example_inputs))
    loaded, task = opened.loaded, opened.task
    form = task.onnx
    assert form is not None
    check_form(form, settings)
    program, samples = trace_loaded(loaded, task, EXECUTOR), task.make_example(loaded.model)
    dense = Dense(loaded, settings, program, about=metadata)
    export_form(form, dense, plan, samples, folder, Log())
    program = cut_to_plan(program, dense, plan, Log())  # as the form has cut it: the reference of the proof
    stages = list_form_stages(form, folder, Use(), EXECUTOR.device, settings).stages
    check_proof(prove(program, stages, samples), "do not use the graph")


@wrap_public
@forget_sources()
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
    # Open and trace the model, and read the text, before a folder is begun.
    say, settings = progress or show_nothing, settings or Settings()
    check_named_types(settings.quantize)
    check_replaceable(Path(out), settings.overwrite)
    check_apart(Path(out), model, *([] if text is None else [text]))
    say("load", 0, 0)
    dense, form = _load_dense(model, settings, text)
    loaded = dense.loaded
    positions = find_position_limit(loaded.model.config) or 256  # a model without a limit takes any length
    windows = (
        None
        if text is None
        else data.load_calibration_windows(loaded.model, loaded.tokenizer, text, 32, min(256, positions))
    )
    with publish(Path(out), overwrite=settings.overwrite) as folder:
        say("export ONNX", 0, 0)
        with enter_stage(say, "export ONNX"):
            samples = None if windows is None else make_token_samples(windows)
            notes = export_form(form, dense, None, samples, folder / "onnx", Log())
        for note in [*notes, *_check_quantized(folder / ONNX_FOLDER, form, say, settings.strict)]:
            on_note(note)
        # What other programs look for beside the graphs.
        loaded.model.config.save_pretrained(folder)
        copy_processors(loaded.path, folder, same_features=True)
        generation = getattr(loaded.model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        if loaded.tokenizer is not None:
            save_tokenizer(loaded.tokenizer, folder)
        for note in describe_graphs(form, loaded.model.config, generation, folder, settings.strict):
            on_note(note)
    return Path(out)


def _load_dense(model: str, settings: Settings, text: str | None) -> tuple[Dense, OnnxForm]:
    """The model, traced to be written as ONNX, and its form. Refuses models and options that no form takes."""
    resident, executor = build_executor(settings)
    loaded, task = open_task(model, resident, trust=settings.trust)
    if task.onnx is None:
        raise TargetError(f"mptk has no ONNX form of a {task.summary}; export {model} with optimum", name=model)
    check_form(task.onnx, settings)
    if text is not None and task.onnx is not CAUSAL_LM.onnx:
        raise InputError(
            f"only a decoder's int4 needs text, and {model} is a {task.summary}; leave out --data", name="data"
        )
    program = trace_loaded(loaded, task, executor, like=task.make_example(loaded.model))
    if (length := task.find_fixed_length(program)) is not None:
        raise TargetError(
            f"{model} can be traced only for {length} tokens, so its ONNX graph would take no other length; mptk "
            "writes none for it",
            name=model,
        )
    return Dense(loaded, settings, program, executor), task.onnx


def _check_quantized(folder: Path, form: OnnxForm, say: Progress, strict: bool) -> list[str]:
    """Compare the quantised graphs of a folder with its float graphs. Returns notes on graphs that are left out.

    ``strict``: raises ProofError instead.
    """

    def check(scheme: str, files: Sequence[Path]) -> list[Difference]:
        with enter_stage(say, f"check {scheme}"):
            for file in files:
                check_quantized(name_float_file(file), file, scheme)
        return []

    return prove_extras(list_quantized(folder, form, check), strict)[1]


@wrap_public
@forget_sources()
def bench(
    models: Sequence[str | Path],
    *,
    quantize: Sequence[str] = COMPARED_TYPES,
    device: str = Settings.device,
    progress: Progress | None = None,
    **settings: Any,
) -> Bench:
    """Time graphs in ONNX Runtime, all models taking turns in one process (``mptk.ort.bench``).

    A decoder's prefill and decode are timed, and a whole run of each graph of another model.

    Args:
        models: models, folders with ``onnx`` in them, or ``.onnx`` files, all of one kind; the first is the baseline.
            Quantised graphs of a folder are timed too. A model without ONNX is first exported into the cache folder.
        quantize: schemes in which such a model is exported, too: a cut is worth what it adds to a quantised model.
        device: as in ``Settings``; ONNX Runtime must have an execution provider for it.
        progress: called with the progress of each stage.
        settings: of ``mptk.ort.bench.bench_graphs``: ``lengths`` (tokens), ``batches``, ``threads``, ``rounds``.

    Returns:
        A ``Bench``: times in milliseconds, each with its ratio to the first graph's and the ideal ratio.

    Raises:
        MptkError: a model cannot be found or exported, has too few positions, or is of another kind than the first; or
            there is no such device.
    """
    check_arguments(bench_graphs, settings)
    check_named_types(quantize)
    types = Settings(quantize=tuple(quantize)).quantize
    if not models:
        raise InputError("no model is given; give models, folders or .onnx files", name="models")
    there, graphs = find_session_device(device), dict[str, Path]()
    # All models are checked before the first is exported, which takes minutes.
    longest = max(settings.get("lengths", LENGTHS))
    for model in map(str, models):
        check_lengths(model, longest)
    for model in map(str, models):
        file = Path(model) if model.endswith(".onnx") else find_onnx_file(find_onnx_folder(model, progress, types))
        graphs[model] = file
        # The quantised graphs beside it, unless a quantised one was named itself.
        rounded = {
            scheme: name_quantized_file(file, scheme)
            for scheme in list_quantized_files(file.parent)
            if not read_scheme(file)
        }
        graphs |= {f"{model} {scheme}": other for scheme, other in rounded.items()}
    return bench_graphs(graphs, device=there, progress=progress, **settings)


def check_lengths(model: str, longest: int) -> None:
    """Raise MptkError if a model, or the model that a graph was made from, has too few positions by its config."""
    # A graph does not say its positions. The config beside it does, if it is there.
    file = Path(model) if model.endswith(".onnx") else find_graph(model)
    folder = model if file is None else str(find_model_folder(file))
    if file is not None and not (Path(folder) / "config.json").is_file():
        return
    # A decoder is also timed with a cache of `longest` tokens, to which it adds one.
    config = models.load_config(folder)
    decodes = (
        CAUSAL_LM.explain_refusal(config, find_model_classes(config)) is None
        if file is None
        else "decode" in find_phase_graphs(file)
    )
    check_positions(
        find_position_limit(config), longest + decodes, f"{longest} tokens (and one more after a cache) of {model}"
    )


def find_onnx_folder(model: str, progress: Progress | None = None, quantize: Sequence[str] = ()) -> Path:
    """``MODEL`` or ``MODEL/onnx`` if it holds a main graph, else an export in the cache folder, in ``quantize``, too.

    The export's name comes from the content of the model's files and from the versions of what writes it, so a changed
    model is exported again. A changed export is replaced, too.
    """
    if (own := find_graph(model)) is not None:
        return own.parent
    say = progress or show_nothing

    def build(folder: Path) -> None:
        say(f"exporting {model} to ONNX", 0, 1)
        dense, form = _load_dense(model, Settings(quantize=tuple(quantize)), None)
        export_form(form, dense, None, None, folder, Log())
        say(f"exporting {model} to ONNX", 1, 1)

    made_of = (hash_model(model), __version__, torch.__version__, transformers.__version__, *quantize)
    stamp = hash_text(" ".join(made_of), 16)
    return build_private(locate_private_folder("onnx", stamp), build)
