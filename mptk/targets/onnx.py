"""onnx: the ``onnx`` folder of a checkpoint: the task's graphs in float, and quantised ones."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from mptk.errors import MptkError, ProofError
from mptk.files import scratch
from mptk.io import models
from mptk.io.checkpoint import save_tokenizer
from mptk.io.models import Loaded
from mptk.ir.passes import Log
from mptk.ir.samples import Samples
from mptk.run.chain import Compiled, Target
from mptk.run.onnx_form import Dense, OnnxForm
from mptk.run.settings import Settings
from mptk.run.values import Checks, SampleSets
from mptk.tasks.transformers_js import write_entry
from passes.targets.onnx.check_quantized import check_quantized
from passes.targets.onnx.names import FILE, FOLDER, quantized_files, scheme_of
from passes.verify import Difference


class OnnxTarget(Target):
    """The task's own graphs (for a decoder, one decoding step) with the dense weights, cut to the same plan."""

    name = "onnx"
    summary = "ONNX, a decoder's with a KV cache, beside another target"

    def emit(self, compiled: Compiled, sets: SampleSets, folder: Path, log: Log) -> list[str]:
        task = compiled.prepared.task
        if task.onnx is None:
            return [f"no ONNX: mptk has no ONNX form of a {task.summary}; export the folder with optimum"]
        if (length := task.only_length(compiled.prepared.analysis.program)) is not None:
            return [f"no ONNX: the trace holds for {length} tokens alone, and a graph would, too"]
        out = folder / FOLDER
        out.mkdir()
        try:
            notes = _export(compiled, task.onnx, compiled.prepared.settings, sets.calibration, out, log)
        except MptkError as error:
            shutil.rmtree(out)
            return [f"no ONNX: {error}"]
        if compiled.written is not None:
            generation = getattr(compiled.prepared.loaded.model, "generation_config", None)
            describe(task.onnx, compiled.written.stock.config, generation, folder)
        else:
            notes.append(_alone(compiled.prepared.loaded, out))
        return notes

    def wrote(self, folder: Path) -> bool:
        return next((folder / FOLDER).glob("*.onnx"), None) is not None

    def checks(self, compiled: Compiled, folder: Path, crossed: Sequence[int]) -> Checks:
        form = compiled.prepared.task.onnx
        if form is None or not (folder / FOLDER).is_dir():
            return Checks()
        return form.stages(folder / FOLDER, crossed, compiled.prepared.executor.device, compiled.prepared.settings)

    def rounded(self, compiled: Compiled, folder: Path, batches: Sequence[Samples]) -> list[Difference]:
        """For each quantised graph: the weights' error over the rounding limit, and the logits' error in nats a token.

        So has a main graph in float16. Its float32 graph is written to a temporary folder.

        Raises:
            ProofError: a graph cannot be read or run, or a weight differs by more than rounding allows.
        """
        form, main = compiled.prepared.task.onnx, folder / FOLDER / FILE
        if form is None:
            return []
        files = quantized_files(folder / FOLDER)
        quantized = partial(_quantized, form, compiled.prepared.executor.device)
        found = [d for file in files for d in quantized(file, main, scheme_of(file), batches)]
        if main.is_file() and form.half(folder / FOLDER):
            with scratch() as staging:
                settings = replace(compiled.prepared.settings, onnx_dtype="float32")
                _export(compiled, form, settings, batches[0], staging.folder, Log())
                found += quantized(main, staging.folder / main.name, "fp16", batches)
        return found


def describe(form: OnnxForm, config: PreTrainedConfig, generation: GenerationConfig | None, folder: Path) -> None:
    """Write what programs need that load the graphs of a checkpoint ``folder``."""
    form.describe(config, generation, folder, FOLDER)
    write_entry(folder, FOLDER)


def _alone(loaded: Loaded, folder: Path) -> str:
    """Write beside graphs that no checkpoint surrounds what a reader of text needs; returns a note on it."""
    if loaded.tokenizer is None or not isinstance(loaded.model, PreTrainedModel):
        return ""
    save_tokenizer(loaded.tokenizer, folder)
    models.config_in(loaded).save_pretrained(folder)
    if loaded.model.can_generate() and loaded.model.generation_config is not None:
        loaded.model.generation_config.save_pretrained(folder)
    return f"{FOLDER}/config.json is the dense model's: it says how text is read and ended, not how wide the graph is"


def _export(
    compiled: Compiled, form: OnnxForm, settings: Settings, samples: Samples, folder: Path, log: Log
) -> list[str]:
    prepared = compiled.prepared
    dense = Dense(prepared.loaded, settings, compiled.analysis.program, prepared.executor)
    return form.export(dense, compiled.chosen.plan, samples, folder, log)


def _quantized(
    form: OnnxForm, device: torch.device, file: Path, whole: Path, scheme: str, batches: Sequence[Samples]
) -> list[Difference]:
    """The differences of ``file`` from its float32 graph ``whole``."""
    try:
        share = check_quantized(whole, file, scheme)
        runs = [form.outputs(graph, device) for graph in (file, whole)]
        pairs = [(runs[0](batch), runs[1](batch)) for batch in batches]
    except MptkError:
        raise
    except Exception as error:  # ONNX and ONNX Runtime share no error class
        reason = str(error).strip().partition("\n")[0]
        raise ProofError(f"the proof fails at '{scheme} weights': {file.name} does not run ({reason})") from error
    return [Difference(f"{scheme} weights", share, share, 1.0), form.rounding(scheme, pairs)]
