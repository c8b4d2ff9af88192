"""shapes: ``mptk.shapes``, which ranks the legal ways to divide a budget and cuts none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mptk.api.pruned import Shown, reporting
from mptk.api.sources import Data, Inputs, Model, given, names_of, source_of, with_inputs
from mptk.arguments import checked
from mptk.chain.job import Job, held
from mptk.chain.prepare import announce, check_settings, prepare, settled
from mptk.chain.prune import SAMPLES, apart, begin, described, wanted
from mptk.compat.accelerate import own_state
from mptk.compat.torch import sources_forgotten
from mptk.compile.dense_outputs import with_outputs
from mptk.config.keywords import with_keywords
from mptk.config.recipe import command
from mptk.config.settings import Settings
from mptk.conversions import fitted
from mptk.errors import explained
from mptk.files import scratch, write_json
from mptk.ir.passes import Log
from mptk.ir.samples import Samples
from mptk.methods.division.shape_search import search_shapes
from mptk.protocols.chain import Prepared
from mptk.protocols.execution import find_device
from mptk.protocols.origin import check_samples
from mptk.protocols.run_folder import GIVEN, check_unfinished
from mptk.protocols.shapes import Shapes
from mptk.protocols.values import Context, SampleSets
from mptk.publish.publish import publish

FILE = "shapes.json"


@checked
@sources_forgotten()
def shapes(
    model: Model,
    out: str | Path | None = None,
    settings: Settings | None = None,
    *,
    progress: Shown = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    example_inputs: Inputs | None = None,
    data: Data | None = None,
    **keywords: Any,
) -> Shapes:
    """Rank the legal ways to divide a budget among families, blocks included::

        mptk.shapes(model, sparsity=0.3, data=texts, search_tokens=0).best.widths

    Args:
        model, progress, tokenizer, example_inputs, data: as in ``mptk.prune``.
        out: folder for ``shapes.json``. With it, an unfinished search can be gone on with (``resume=True``). None:
            nothing is kept.
        settings: what is asked for; by default units are chosen by ``wanda`` and consumers are reconstructed.
        keywords: fields of ``Settings`` and of what is in it, as in ``mptk.prune``. ``search_shapes``,
            ``search_finalists`` and ``search_tokens`` say how much is tried.

    Returns:
        The shapes, the best first, with their widths, costs and losses.

    Raises:
        MptkError: the model cannot be loaded, traced or cut; no legal widths meet the budget; there is no such keyword;
            or the tokens do not suffice to train the finalists.
    """
    base = settings or Settings(method="wanda", reconstruct=True)
    chosen = with_keywords(base, {**names_of(data=data), **keywords, "search": True, "onnx": False})
    chosen, inputs = with_inputs(chosen, example_inputs)
    source = source_of(model, trust=chosen.trust_remote_code, tokenizer=tokenizer, example_inputs=inputs)
    if source.plain and chosen.target == "stock":
        chosen = replace(chosen, target="graph")
    kept = scratch() if out is None else None
    place = kept.folder / "shapes" if kept is not None else Path(str(out))
    job = Job(source.name, place, source.load, needs=source.needs, samples=given(data, None))
    say_command = partial(command, str(model), chosen) if isinstance(model, str | Path) else lambda widths: ""
    find_device(chosen.device)
    with reporting(progress) as say, own_state(chosen.device), explained(), held(job, chosen.overwrite):
        return searched(job, settled(chosen), Context(Log(), say), say_command, write=out is not None)


def searched(
    job: Job, settings: Settings, context: Context, say_command: Callable[[Mapping[str, int]], str], write: bool
) -> Shapes:
    """The stages of a search. ``write``: whether the job's output is written."""
    check_settings(settings)
    settings = replace(settings, learning=replace(settings.learning, steps=0))  # those of a run after it
    check_unfinished(job.out, described(job, settings), settings.resume, but=("sparsity", GIVEN))  # a latency sets it
    if job.needs is not None:
        announce(job.needs(settings), job, context)
    prepared = prepare(job, settings, context)
    context = begin(job, prepared, context)
    assert context.folder is not None
    try:
        sets = samples_of(job, prepared, context)
        found = search_shapes(fitted(prepared, sets.calibration, context), sets, context)
    except Exception:
        context.folder.remove_unless(SAMPLES)
        raise
    found = replace(found, command=say_command(found.best.widths))
    if write:
        with publish(job.out, overwrite=settings.overwrite) as folder:
            write_json(folder / FILE, found.to_json())
    context.folder.remove()
    return found


def samples_of(job: Job, prepared: Prepared, context: Context) -> SampleSets:
    """Samples to calibrate and train on, and to measure shapes on. They are kept in the folder of the search."""
    s, task, folder = prepared.settings, prepared.task, context.folder
    assert folder is not None
    with context.stage("calibration data"):
        kept = folder.tensors(SAMPLES)
        own = None if job.samples is None else job.samples(prepared).training
        if kept is not None and own is not None:
            check_samples(kept, own.saved("training"), folder.path)
        if kept is None:
            say = partial(context.progress, "calibration data")
            kept = (own or task.samples(prepared.loaded, s, wanted(s), say)).saved("training")
            folder.save(SAMPLES, kept)
    samples = Samples.restored(kept, list(task.example(prepared.loaded.model).inputs), "training")
    assert samples is not None
    training, held_out = apart(samples, s)
    calibration = training[: s.samples]
    with context.stage("dense outputs") if task.compares else nullcontext():
        calibration = with_outputs(prepared, calibration) if task.compares else calibration
    return SampleSets(training, calibration, calibration, s.data, task.sequences, held_out)
