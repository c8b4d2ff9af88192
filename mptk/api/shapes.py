"""shapes: ``mptk.shapes``, which ranks the legal ways to divide a budget without cutting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mptk.api.pruned import Shown, reporting
from mptk.api.sources import Data, GivenInputs, Model, given, names_of, source_for
from mptk.api.words import public
from mptk.chain.job import Job
from mptk.chain.prune import started
from mptk.chain.samples import compared, read_samples
from mptk.config.recipe import command
from mptk.config.setting import with_keywords
from mptk.config.settings import Settings
from mptk.conversions import fitted
from mptk.files import scratch, write_json
from mptk.ir.passes import Log
from mptk.methods.division.search import search_shapes
from mptk.protocols.chain import Prepared
from mptk.protocols.shapes import Shapes
from mptk.protocols.values import Context
from mptk.publish.folder import publish

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
    **keywords: Any,
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
    if source.plain and chosen.target == "stock":
        chosen = replace(chosen, target="graph")
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
