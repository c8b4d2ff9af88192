"""advice: what is measured before any cut is made: how far a model can be cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mptk.api.pruned import Shown, report_progress
from mptk.api.words import wrap_public
from mptk.config import MOST_SPARSITY, Settings, format_command, with_keywords
from mptk.errors import MptkError
from mptk.files import make_scratch
from mptk.io import list_source_names
from mptk.ir import Log
from mptk.protocols import ADVICE, CALIBRATION_STEPS, SPARSITIES, Advice, Context, Opened, Point
from mptk.run.advise import measure_cuts
from mptk.run.inputs import Data, GivenInputs, Inputs, is_in_memory, name_given
from mptk.run.open import Model, name_start, take_model
from mptk.run.run import open_run

FAMILIES = 1.5
"""Cuts for each sparsity in the estimate, which is made before families are known: a division, and at every second
sparsity a cut of blocks."""
ANY = 1.0
"""The tolerance of the budget until cuts are chosen: a model with only coarse widths must not be refused before."""


@wrap_public
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
        data: as in ``mptk.prune``. Each source of a name with several, such as ``"A,B"``, is measured by itself.
        keywords: fields of ``Settings``, as in ``mptk.prune``. ``samples``: windows to fit to, of all texts together;
            ``eval_windows``: windows of each text to measure on.

    Raises:
        MptkError: the model cannot be loaded, traced or cut; a sparsity or the tolerance is out of bounds; there is no
            such keyword; there is too little text; or a model that is not of transformers is to be trained.
    """
    # For its checks and stages an advice is a search, of one shape and without trials.
    check_sparsities(sparsities, tolerance)
    chosen = with_keywords(settings or ADVICE, {**name_given(data=data), **keywords, "search": True, "onnx": False})
    chosen = replace(chosen, sparsity=max(sparsities), tolerance=ANY, search_tokens=0, search_shapes=1)
    if calibrate:  # the number of steps belongs to the measurement, so no time limit may choose it
        steps = chosen.steps or CALIBRATION_STEPS
        chosen = with_keywords(chosen, {"steps": steps, "samples": chosen.windows, "minutes": None})
    inputs = Inputs.of(tokenizer=tokenizer, example_inputs=example_inputs, data=data)
    start, chosen, inputs = take_model(model, chosen, inputs)
    if calibrate and isinstance(start, Opened) and start.plain:
        raise MptkError("mptk trains only transformers models; leave out calibrate")
    # For the estimate of what the run needs.
    texts = 1 if is_in_memory(data) else len(list_source_names(chosen.data))
    advises = round(FAMILIES * len(sparsities)), texts
    with (
        make_scratch() as kept,
        report_progress(progress) as say,
        open_run(
            start,
            name_start(model),
            kept.folder / "advice",
            chosen,
            inputs,
            Context(Log(), say),
            advises=advises,
            trains=calibrate,
        ) as run,
    ):
        found, settings = measure_cuts(start, run, sorted(set(sparsities)), tolerance)
    return add_commands(found, str(model), settings) if isinstance(model, str | Path) else found


def add_commands(found: Advice, model: str, settings: Settings) -> Advice:
    """The advice with the commands of the cuts that it recommends. ``settings``: of the run."""

    def write_command(own: Settings, best: Point | None) -> str:
        """The command that cuts to ``best``; empty if there is none."""
        if best is None:
            return ""
        return format_command(model, replace(own, sparsity=round(best.sparsity, 4)), best.widths)

    # The recommended cut is safe without training; another one may be after it.
    plain = replace(settings, learning=replace(settings.learning, steps=0))
    if found.recovery is not None:  # the settings have its steps
        trained = write_command(settings, found.recommended_after)
        found = replace(found, recovery=replace(found.recovery, command=trained))
    return replace(found, command=write_command(plain, found.recommended))


def check_sparsities(sparsities: Sequence[float], tolerance: float) -> None:
    """Raise MptkError if a sparsity or the tolerance is out of bounds."""
    if not sparsities or not all(0 < s <= MOST_SPARSITY for s in sparsities):
        raise MptkError(f"sparsities must lie above 0 and be at most {MOST_SPARSITY}; give some, as 0.1,0.2,0.3")
    if not 0 < tolerance <= 10:
        raise MptkError(f"a tolerance of {tolerance} is not above 0 and at most 10; give a share, as 0.05")
