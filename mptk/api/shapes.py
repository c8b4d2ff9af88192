"""shapes: ``mptk.shapes``, which ranks the legal ways to divide a budget and cuts none of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mptk.api.pruned import Shown, reporting
from mptk.api.sources import Data, Inputs, Model, given, names_of, source_of, with_inputs
from mptk.arguments import checked
from mptk.chain.job import Job, held
from mptk.chain.prepare import check_settings, given_plan, settled
from mptk.chain.prune import compared, prepared_for, read_samples
from mptk.compat.accelerate import own_state
from mptk.compat.torch import sources_forgotten
from mptk.config.recipe import command
from mptk.config.setting import with_keywords
from mptk.config.settings import Settings
from mptk.conversions import fitted
from mptk.errors import explained
from mptk.files import scratch, write_json
from mptk.ir.passes import Log
from mptk.methods.division.search import search_shapes
from mptk.protocols.chain import Prepared
from mptk.protocols.execution import find_device
from mptk.protocols.shapes import Shapes
from mptk.protocols.values import Context
from mptk.publish.folder import publish

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

    def ranked(job: Job, prepared: Prepared, context: Context) -> Shapes:
        sets = compared(prepared, read_samples(job, prepared, context, measures=False), context)
        found = search_shapes(fitted(prepared, sets.calibration, context), sets, context)
        if isinstance(model, str | Path):
            found = replace(found, command=command(str(model), chosen, found.best.widths))
        if out is not None:
            with publish(job.out, overwrite=chosen.overwrite) as folder:
                write_json(folder / FILE, found.to_json())
        assert context.folder is not None
        context.folder.remove()
        return found

    find_device(chosen.device)
    with reporting(progress) as say, own_state(chosen.device), explained(), held(job, chosen.overwrite):
        settings = settled(chosen)
        job = replace(job, plan=given_plan(settings))
        check_settings(settings, job.plan, job.vocabulary)
        settings = replace(settings, learning=replace(settings.learning, steps=0))  # those of a run after it
        return prepared_for(ranked, job, settings, Context(Log(), say))
