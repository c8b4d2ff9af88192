"""api: ``mptk.shapes``: rank the ways to divide a budget, and cut nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Unpack

from transformers import PreTrainedTokenizerBase

from mptk.api.pruned import Shown, report_progress, resolve_place
from mptk.api.words import wrap_public
from mptk.config import Settings, format_command, with_keywords
from mptk.conversions import fit_conversions
from mptk.features.width_search.keywords import ShapesKeywords
from mptk.features.width_search.search import search_shapes
from mptk.features.width_search.shapes import Shapes
from mptk.files import make_scratch, write_json
from mptk.ir import Log
from mptk.protocols import Context
from mptk.publish.folder import publish
from mptk.run.inputs import Data, GivenInputs, Inputs, name_given
from mptk.run.open import Model, name_start, take_model
from mptk.run.prepare import prepare
from mptk.run.prune import keep_stages_on_failure
from mptk.run.run import Run, Start, open_run
from mptk.run.samples import add_dense_outputs, read_samples

SHAPES_FILE = "shapes.json"


@wrap_public
def shapes(
    model: Model,
    out: str | Path | None = None,
    settings: Settings | None = None,
    *,
    progress: Shown = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    example_inputs: GivenInputs | None = None,
    data: Data | None = None,
    **keywords: Unpack[ShapesKeywords],
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
    chosen = with_keywords(base, {**name_given(data=data), **keywords, "search": True, "onnx": False})
    inputs = Inputs.of(tokenizer=tokenizer, example_inputs=example_inputs, data=data)
    start, chosen, inputs = take_model(model, chosen, inputs)
    # A search keeps its stages in a folder beside its output, so it needs a place even if nothing is to stay.
    kept = make_scratch() if out is None else None
    place = kept.folder / "shapes" if kept is not None else resolve_place(str(out))
    source = name_start(model)
    with (
        report_progress(progress) as say,
        open_run(start, source, place, chosen, inputs, Context(Log(), say), trains=False) as run,
    ):
        return search_and_rank(start, run, chosen, writes=kept is None)


def search_and_rank(model: Start, run: Run, asked: Settings, *, writes: bool) -> Shapes:
    """Rank the legal ways to divide a budget, with the command that cuts to the best, if the model has a name.

    ``asked``: the settings that the command repeats. ``writes``: into the run's output.
    """
    prepared, run = prepare(model, run)
    with keep_stages_on_failure(prepared, run):
        # A search compares shapes on held-out samples of the training data: there is no result to measure.
        sets, run = read_samples(prepared, run, measures=False)
        sets = add_dense_outputs(prepared, sets, run)
        found = search_shapes(fit_conversions(prepared, sets.calibration, run), sets, run)
        if isinstance(model, str):
            # As asked, not as completed: the command's own run completes its numbers for its own work.
            found = replace(found, command=format_command(model, asked, found.best.widths))
        if writes:
            with publish(run.out, overwrite=run.settings.overwrite) as folder:
                write_json(folder / SHAPES_FILE, found.to_json())
        run.remove_folder()
    return found
