"""onnx: the ``onnx`` folder of a checkpoint: the task's graphs in float, and quantised ones."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from mptk.config import Settings
from mptk.errors import MptkError, ProofError, TargetError, take_first_line
from mptk.files import make_scratch
from mptk.io import Loaded, find_position_limit, models, read_object, save_tokenizer
from mptk.ir import Log, Program, Samples, is_tokens
from mptk.ort.sessions import CPU
from mptk.protocols import (
    Checks,
    Compiled,
    Dense,
    Extra,
    OnnxForm,
    Prepared,
    SampleSets,
    Target,
    Use,
    describe_left_out,
)
from mptk.publish.manifest import list_files
from mptk.targets.beside import check_beside, compare, fail
from mptk.tasks.onnx_export import EXPORTER, VERSION, export_form
from mptk.tasks.onnx_proof import list_form_stages, make_runner, use_apart
from mptk.tasks.runtimes import write_entry
from passes.targets.onnx.check_quantized import check_quantized
from passes.targets.onnx.names import (
    ENDINGS,
    ONNX_FILE,
    ONNX_FOLDER,
    list_quantized_files,
    name_data_file,
    name_float_file,
    name_quantized_file,
)
from passes.targets.onnx.structure import compare_constants, compare_structures, compare_with_weights
from passes.targets.onnx.tensors import read_lazily
from passes.verify import Difference, Placed, StageOutputs

UNLIKE = ("source", EXPORTER, VERSION)
"""Entries of a graph's metadata that do not change what it computes, and depend on when and where it was made."""


class OnnxTarget(Target):
    """The task's own graphs (for a decoder, one decoding step) with the dense weights, cut to the same plan."""

    name = "onnx"
    summary = "ONNX, a decoder's with a KV cache, beside another target"

    def emit(self, compiled: Compiled, sets: SampleSets, folder: Path, log: Log) -> list[str]:
        # ONNX is written beside another target. If it fails, the folder is right without it.
        prepared, out = compiled.prepared, folder / ONNX_FOLDER
        out.mkdir()
        try:
            form = choose_onnx_form(prepared)
            notes = export_compiled(compiled, form, prepared.settings, sets.calibration, out, log)
        except MptkError as error:
            if prepared.settings.strict:
                raise
            shutil.rmtree(out)
            return [f"no ONNX: {error}"]
        if compiled.written is not None:
            generation = getattr(prepared.loaded.model, "generation_config", None)
            notes += describe_graphs(form, compiled.written.stock.config, generation, folder, prepared.settings.strict)
        else:
            notes.append(_write_alone(prepared.loaded, out))
        return notes

    def list_files(self, compiled: Compiled, folder: Path) -> frozenset[str]:
        form, there = compiled.prepared.task.onnx, folder / ONNX_FOLDER
        if form is None or not there.is_dir():
            return frozenset()
        # Any scheme's graphs may be there; ``list_extras`` checks those that are.
        names = [Path(name) for name in form.graphs]
        graphs = [
            str(each) for name in names for each in (name, *(name_quantized_file(name, scheme) for scheme in ENDINGS))
        ]
        data = [name_data_file(name) for name in graphs if (there / name).is_file()]
        beside: list[str] = []
        if compiled.written is None:  # transformers decides which files a tokenizer has
            with make_scratch() as place:
                _write_alone(compiled.prepared.loaded, place.folder)
                beside = list_files(place.folder)
        own = (f"{ONNX_FOLDER}/{name}" for name in (*graphs, *data, *beside))
        return frozenset([*own, *form.described])

    def has_written(self, folder: Path) -> bool:
        return next((folder / ONNX_FOLDER).glob("*.onnx"), None) is not None

    def make_checks(self, compiled: Compiled, folder: Path, crossed: Sequence[int]) -> Checks:
        form = compiled.prepared.task.onnx
        if form is None or not (folder / ONNX_FOLDER).is_dir():
            return Checks()
        loaded = compiled.prepared.loaded
        if compiled.written is None:
            check_beside(folder / ONNX_FOLDER, partial(_write_alone, loaded), all_known=loaded.tokenizer is not None)
        _check_weights(form, compiled, folder / ONNX_FOLDER)
        use = Use(crossed, count_model_positions(compiled))
        return list_form_stages(
            form, folder / ONNX_FOLDER, use, compiled.prepared.executor.device, compiled.prepared.settings
        )

    def compare_rounded(self, compiled: Compiled, folder: Path, batches: Sequence[Samples]) -> list[Difference]:
        """For a main graph in float16: the weights' error over the rounding limit, and the logits' in nats per token.

        Its float32 graph is written to a temporary folder.

        Raises:
            ProofError: the graph cannot be read or run, or a weight differs by more than rounding allows.
        """
        # Rounding is compared with the float32 graph, which this folder lacks.
        form, main = compiled.prepared.task.onnx, folder / ONNX_FOLDER / ONNX_FILE
        if form is None or not main.is_file() or not form.open(main, CPU).half:
            return []
        with make_scratch() as staging:
            settings = replace(compiled.prepared.settings, onnx_dtype="float32", quantize=())
            export_compiled(compiled, form, settings, batches[0], staging.folder, Log())
            pairs = [(main, staging.folder / ONNX_FILE)]
            return _compare_quantized(form, compiled.prepared.executor.device, pairs, "fp16", batches)

    def compare_remade(self, compiled: Compiled, folder: Path, batches: Sequence[Samples]) -> str:
        """Write the float graphs again and compare them with the folder's, node for node and weight for weight.

        Returns a note if they differ, but another version of an exporter wrote the folder's.

        Raises:
            ProofError: they differ.
        """
        form, graphs = compiled.prepared.task.onnx, folder / ONNX_FOLDER
        if form is None or not graphs.is_dir():
            return ""
        with make_scratch() as staging:
            export_compiled(
                compiled, form, replace(compiled.prepared.settings, quantize=()), batches[0], staging.folder, Log()
            )
            for name in form.graphs:
                found, again = read_lazily(graphs / name), read_lazily(staging.folder / name)
                # Exporters change from version to version, which is not a fault of the folder.
                written, now = found.metadata_props.get(EXPORTER), again.metadata_props[EXPORTER]
                apart = compare_structures(found, again, UNLIKE) or compare_constants(found, again)
                if apart and written != now:
                    return f"{name} is not what this exporter writes ({now}); it was written by {written}: {apart}"
                if apart:
                    raise ProofError(
                        f"the proof fails at '{name} written again': {apart}; do not use it, and prune the model again",
                        name=name,
                    )
        return ""

    def list_extras(self, compiled: Compiled, folder: Path, batches: Sequence[Samples]) -> list[Extra]:
        """The quantised graphs, with differences as in ``rounded``, and the files that describe the graphs."""
        form, device = compiled.prepared.task.onnx, compiled.prepared.executor.device
        if form is None:
            return []

        settings, reached = compiled.prepared.settings, count_model_positions(compiled)

        def check(scheme: str, files: Sequence[Path]) -> list[Difference]:
            # The weights against the float graph's, then each use of the graph against its own outputs.
            found = _compare_quantized(form, device, [(file, name_float_file(file)) for file in files], scheme, batches)
            use = Use((), reached, scheme)
            stages = list_form_stages(form, folder / ONNX_FOLDER, use, device, settings).stages
            return [*found, *_compare_use(scheme, [run for run, _ in stages.values()], batches)]

        graphs = list_quantized(folder / ONNX_FOLDER, form, check)
        described = [
            Extra(name, partial(_check_described, form, compiled, folder, name), (folder / name).unlink)
            for name in form.described
            if (folder / name).is_file()
        ]
        return [*graphs, *described]


def count_model_positions(compiled: Compiled) -> int:
    """How many positions the model has; 0 if it is not known."""
    model = compiled.prepared.loaded.model
    return (find_position_limit(model.config) or 0) if isinstance(model, PreTrainedModel) else 0


def choose_onnx_form(prepared: Prepared) -> OnnxForm:
    """How to write the model as ONNX. Raises MptkError if that is impossible."""
    # Both refusals cost nothing: they come before any export.
    task = prepared.task
    if task.onnx is None:
        raise TargetError(f"mptk has no ONNX form of a {task.summary}; export the folder with optimum", name="onnx")
    if (length := task.find_fixed_length(prepared.analysis.program)) is not None:
        raise TargetError(
            f"the trace holds only for {length} tokens, so a graph would take no other length; leave out ONNX",
            name="onnx",
        )
    return task.onnx


def describe_graphs(
    form: OnnxForm, config: PreTrainedConfig, generation: GenerationConfig | None, folder: Path, strict: bool = True
) -> list[str]:
    """Write the files that programs need to load the graphs of a checkpoint ``folder``; returns notes on missing ones.

    Raises MptkError if a file cannot be written and ``strict``.
    """
    write_entry(folder, ONNX_FOLDER)
    notes = []
    for name, write in form.described.items():
        try:
            write(config, generation, folder, f"{ONNX_FOLDER}/{form.graphs[0]}")
        except MptkError as error:
            if strict:
                raise
            notes.append(describe_left_out(name, error))
    return notes


def list_quantized(
    folder: Path, form: OnnxForm, check: Callable[[str, Sequence[Path]], list[Difference]]
) -> list[Extra]:
    """The quantised graphs of an ``onnx`` folder, those of one scheme together.

    ``check``: compares a scheme's graphs, the main one first, with the float ones.
    """
    found = list[Extra]()
    for scheme, files in list_quantized_files(folder).items():
        # The main graph first: it names the scheme's entry in a report, and it is the one that is compared by outputs.
        files.sort(key=lambda file: name_float_file(file).name != form.graphs[0])
        found.append(
            Extra(f"{folder.name}/{files[0].name}", partial(check, scheme, files), partial(remove_graphs, files))
        )
    return found


def remove_graphs(files: Sequence[Path]) -> None:
    """Remove graphs from the ``onnx`` folder of a checkpoint and from its config's entries."""
    for file in files:
        file.unlink()
        file.with_name(name_data_file(file.name)).unlink(missing_ok=True)
    checkpoint = files[0].parent.parent
    if (checkpoint / "config.json").is_file():
        write_entry(checkpoint, ONNX_FOLDER)


def _check_described(form: OnnxForm, compiled: Compiled, folder: Path, name: str) -> list[Difference]:
    """Raise ProofError unless a file that describes the graphs agrees with config, plan and graphs."""
    written = compiled.written
    if written is None:
        fail(f"{name} is there, but graphs without a checkpoint have no such file")
    # Write it again, for the folder's own graphs, and compare.
    generation = getattr(compiled.prepared.loaded.model, "generation_config", None)
    with make_scratch() as place:
        (place.folder / ONNX_FOLDER).symlink_to((folder / ONNX_FOLDER).absolute())
        form.described[name](written.stock.config, generation, place.folder, f"{ONNX_FOLDER}/{form.graphs[0]}")
        if not (place.folder / name).is_file():
            fail(f"{name} is there, but these graphs have no such file")
        compare(name, read_object(folder / name), read_object(place.folder / name))
    return []


def _write_alone(loaded: Loaded, folder: Path) -> str:
    """Write config and tokenizer beside graphs without a checkpoint; returns a note on them."""
    if loaded.tokenizer is None or not isinstance(loaded.model, PreTrainedModel):
        return ""
    save_tokenizer(loaded.tokenizer, folder)
    models.read_stored_config(loaded).save_pretrained(folder)
    if loaded.model.can_generate() and loaded.model.generation_config is not None:
        loaded.model.generation_config.save_pretrained(folder)
    return f"{ONNX_FOLDER}/config.json is the dense model's: use it for text and its end, not for the graph's widths"


def export_compiled(
    compiled: Compiled, form: OnnxForm, settings: Settings, samples: Samples, folder: Path, log: Log
) -> list[str]:
    """Write the cut model as ONNX into ``folder``, as the settings ask. Returns notes for the report."""
    prepared = compiled.prepared
    dense = Dense(prepared.loaded, settings, compiled.analysis.program, prepared.executor)
    return export_form(form, dense, compiled.chosen.plan, samples, folder, log)


def _check_weights(form: OnnxForm, compiled: Compiled, folder: Path) -> None:
    """Raise ProofError if a table in a float graph has some rows of a weight, and others that are not the weight's."""
    for name in form.graphs:
        if not (folder / name).is_file():
            continue  # the stages say so
        matrices = ((key, t.detach().float().cpu().numpy()) for key, t in compiled.program.state.items() if t.ndim == 2)
        if wrong := compare_with_weights(read_lazily(folder / name), matrices):
            raise ProofError(f"the proof fails at 'ONNX weights' of {name}: {wrong}; do not use it", name=name)


def _compare_use(scheme: str, runs: Sequence[Program | StageOutputs], batches: Sequence[Samples]) -> list[Difference]:
    """Compare how a quantised graph is used with its own outputs for whole samples, which the first run gives.

    Nothing if the graph gives only some of these.
    """
    # The first run gives whole rows; the others use caches and padding. A graph of last positions has no whole rows.
    pairs = list[tuple[Tensor | Placed, Tensor]]()
    for batch in batches:
        plain, *others = (_run_outputs(run, batch) for run in runs)
        wholes = [each.outputs if isinstance(each, Placed) else each for each in plain]
        if any(isinstance(each, Placed) and each.places.shape[1] != _find_length(batch) for each in plain):
            return []
        pairs += [pair for other in others for pair in zip(other, wholes, strict=True)]
    return [use_apart(scheme, pairs)] if pairs else []


def _run_outputs(run: Program | StageOutputs, batch: Samples) -> Sequence[Tensor | Placed]:
    assert not isinstance(run, Program)
    found = run(batch)
    return [found] if isinstance(found, Tensor | Placed) else found


def _find_length(batch: Samples) -> int:
    return max((tensor.shape[1] for tensor in batch.tensors if is_tokens(tensor)), default=0)


def _compare_quantized(
    form: OnnxForm,
    device: torch.device,
    files: Sequence[tuple[Path, Path]],
    scheme: str,
    batches: Sequence[Samples],
) -> list[Difference]:
    """Compare graphs, the main one first, with the float32 graphs beside them, and what they compute together."""
    # Weights of every graph, outputs of the main one.
    file = files[0][0]
    try:
        share = max(check_quantized(whole, file, scheme) for file, whole in files)
        runs = [make_runner(form, graph, device) for graph in files[0]]
        pairs = [(runs[0](batch), runs[1](batch)) for batch in batches]
    except MptkError:
        raise
    except Exception as error:  # ONNX and ONNX Runtime share no error class
        raise ProofError(
            f"the proof fails at '{scheme} weights': {file.name} does not run ({take_first_line(error)})",
            name=file.name,
        ) from error
    return [Difference(f"{scheme} weights", share, share, 1.0), form.judge(scheme, pairs)]
