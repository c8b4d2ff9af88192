"""advice: what is measured before any cut is made: how far a model can be cut, and the ways to divide a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mptk.api.pruned import Shown, reporting
from mptk.api.samples import Data, given, in_memory, names_of
from mptk.api.sources import GivenInputs, Model, source_for
from mptk.api.words import public
from mptk.chain.job import Job
from mptk.chain.prune import started
from mptk.chain.samples import compared, domains, read_samples
from mptk.config.choices import MOST_SPARSITY
from mptk.config.recipe import command
from mptk.config.setting import with_keywords
from mptk.config.settings import Settings
from mptk.conversions import fitted
from mptk.errors import MptkError
from mptk.files import scratch, write_json
from mptk.io.data import source_names
from mptk.ir.passes import Log
from mptk.methods.division.advice import advised
from mptk.methods.division.search import search_shapes
from mptk.protocols.advice import ADVICE, CALIBRATION_STEPS, SPARSITIES, Advice, Point
from mptk.protocols.chain import Prepared
from mptk.protocols.shapes import Shapes
from mptk.protocols.values import Context
from mptk.publish.folder import publish

FAMILIES = 1.5
"""Cuts for each sparsity, as estimated before the families are known: the division, and blocks at half of them."""
ANY = 1.0
"""The tolerance of a budget for the first candidates, which are not measured."""


@public
def advise(
    model: Model,
    settings: Settings | None = None,
    *,
    sparsities: Sequence[float] = SPARSITIES,
    tolerance: float = 0.05,
    calibrate: bool = False,
    progress: Shown = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    example_inputs: GivenInputs | None = None,
    data: Data | None = None,
    **keywords: object,
) -> Advice:
    """Say how far a model can be cut: measure cuts of several sizes, and recommend the largest that is safe::

        advice = mptk.advise("smollm2-135m", data="code.jsonl,prose.txt", tolerance=0.1)
        print(advice.recommended, advice.command)

    Units are scored once, consumers are fitted, and nothing is written. Only ``calibrate`` trains.

    Args:
        model, progress, tokenizer, example_inputs: as in ``mptk.prune``.
        settings: the settings; by default ``wanda`` chooses units, and consumers are reconstructed.
        sparsities: shares of the budget to remove; the nearest legal cuts are measured.
        tolerance: the largest change that is safe, as a share: of the perplexity or, of a model without one, of samples
            with another top-1 class, or the largest mean loss.
        calibrate: train two of the cuts, each for ``steps`` (16) steps, to say what each cut costs after recovery.
        data: as in ``mptk.prune``. Each source of a name with several, as ``"A,B"``, is measured by itself.
        keywords: fields of ``Settings``, as in ``mptk.prune``. ``samples``: windows to fit to, of all texts together;
            ``eval_windows``: windows of each text to measure on.

    Raises:
        MptkError: the model cannot be loaded, traced or cut; a sparsity or the tolerance is out of bounds; there is no
            such keyword; there is too little text; or a model that is not of transformers is to be trained.
    """
    check_asked(sparsities, tolerance)
    chosen = with_keywords(settings or ADVICE, {**names_of(data=data), **keywords, "search": True, "onnx": False})
    chosen = replace(chosen, sparsity=max(sparsities), tolerance=ANY, search_tokens=0, search_shapes=1)
    source, chosen = source_for(model, training(chosen) if calibrate else chosen, tokenizer, example_inputs)
    if calibrate and source.plain:
        raise MptkError("mptk trains only transformers models; leave out calibrate")
    said = partial(command, str(model)) if isinstance(model, str | Path) else None
    work = partial(_measured, said, sorted(set(sparsities)), tolerance)
    kept = scratch()
    job = source.job(kept.folder / "advice", given(data, None))
    if job.needs is not None:
        texts = 1 if in_memory(data) else len(source_names(chosen.data))
        job = replace(job, needs=partial(job.needs, cuts=round(FAMILIES * len(sparsities)), texts=texts))
    with reporting(progress) as say:
        return started(work, job, chosen, Context(Log(), say), trains=calibrate)


def training(settings: Settings) -> Settings:
    """The settings of an advice that trains."""
    steps = settings.steps or CALIBRATION_STEPS
    return with_keywords(settings, {"steps": steps, "samples": settings.windows, "minutes": None})


def check_asked(sparsities: Sequence[float], tolerance: float) -> None:
    """Raise MptkError if a sparsity or the tolerance is out of bounds."""
    if not sparsities or not all(0 < s <= MOST_SPARSITY for s in sparsities):
        raise MptkError(f"sparsities must lie above 0 and be at most {MOST_SPARSITY}; give some, as 0.1,0.2,0.3")
    if not 0 < tolerance <= 10:
        raise MptkError(f"a tolerance of {tolerance} is not above 0 and at most 10; give a share, as 0.05")


def _measured(
    said: Callable[[Settings, Mapping[str, int]], str] | None,
    sparsities: Sequence[float],
    tolerance: float,
    job: Job,
    prepared: Prepared,
    context: Context,
) -> Advice:
    """The advice. ``said``: settings and widths → the command that cuts to them."""
    prepared = replace(prepared, settings=replace(prepared.settings, tolerance=Settings.tolerance))
    sets, texts = domains(job, prepared, context)
    found = advised(prepared, sets, texts, sparsities, tolerance, context)
    assert context.folder is not None
    context.folder.remove()
    if said is None:
        return found
    trained = prepared.settings
    plain = replace(trained, learning=replace(trained.learning, steps=0))
    if found.recovery is not None:
        recovery = replace(found.recovery, command=_command(said, trained, found.recommended_after))
        found = replace(found, recovery=recovery)
    return replace(found, command=_command(said, plain, found.recommended))


def _command(said: Callable[[Settings, Mapping[str, int]], str], settings: Settings, best: Point | None) -> str:
    """The command that cuts to ``best``; empty if there is none."""
    return "" if best is None else said(replace(settings, sparsity=round(best.sparsity, 4)), best.widths)


SHAPES_FILE = "shapes.json"


@public
def shapes(
    model: Model,
    out: str | Path | None = None,
    settings: Settings | None = None,
    *,
    progress: Shown = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    example_inputs: GivenInputs | None = None,
    data: Data | None = None,
    **keywords: object,
) -> Shapes:
    """Rank the legal ways to divide a budget among families and blocks::

        mptk.shapes(model, sparsity=0.3, data=texts, search_tokens=0).best.widths

    Args:
        model, progress, tokenizer, example_inputs, data: as in ``mptk.prune``.
        out: folder for ``shapes.json``. With a folder, ``resume=True`` continues an unfinished search. None: nothing is
            kept.
        settings: the settings; by default ``wanda`` chooses units and consumers are reconstructed.
        keywords: fields of ``Settings`` and of the records in it, as in ``mptk.prune``. ``search_shapes``,
            ``search_finalists`` and ``search_tokens`` set the effort of the search.

    Returns:
        The shapes, the best first, with their widths, costs and losses.

    Raises:
        MptkError: the model cannot be loaded, traced or cut; no legal widths meet the budget; there is no such keyword;
            or there are too few tokens to train the finalists.
    """
    base = settings or Settings(method="wanda", reconstruct=True)
    chosen = with_keywords(base, {**names_of(data=data), **keywords, "search": True, "onnx": False})
    source, chosen = source_for(model, chosen, tokenizer, example_inputs)
    kept = scratch() if out is None else None
    place = kept.folder / "shapes" if kept is not None else Path(str(out))
    job = source.job(place, given(data, None))
    said = partial(command, str(model), chosen) if isinstance(model, str | Path) else None
    work = partial(_ranked, said, kept is None)
    with reporting(progress) as say:
        return started(work, job, chosen, Context(Log(), say), trains=False)  # a run after it does


def _ranked(
    said: Callable[[Mapping[str, int]], str] | None, written: bool, job: Job, prepared: Prepared, context: Context
) -> Shapes:
    """The ranking. ``said``: widths → the command that cuts to them. ``written``: whether it is to stay in a folder."""
    sets = compared(prepared, read_samples(job, prepared, context, measures=False), context)
    found = search_shapes(fitted(prepared, sets.calibration, context), sets, context)
    if said is not None:
        found = replace(found, command=said(found.best.widths))
    if written:
        with publish(job.out, overwrite=prepared.settings.overwrite) as folder:
            write_json(folder / SHAPES_FILE, found.to_json())
    assert context.folder is not None
    context.folder.remove()
    return found
