"""ladder: ``mptk.ladder``, which prunes a model to several sizes in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mptk.api.pruned import Pruned, Shown, defaults, job_of, reporting
from mptk.api.samples import Data
from mptk.api.sources import GivenInputs, Model
from mptk.api.words import public
from mptk.chain.estimate import estimator
from mptk.chain.job import Finished
from mptk.chain.ladder import LadderRun, climb, rungs
from mptk.config.settings import Settings
from mptk.cost.estimate import Estimate, total
from mptk.distributed.processes import leads, once
from mptk.errors import MptkError
from mptk.ir.passes import Log, PassRecord
from mptk.protocols.report import Report
from mptk.protocols.values import Context


@public
def ladder(
    model: Model,
    out: str | Path,
    sparsities: Sequence[float],
    settings: Settings | None = None,
    *,
    progress: Shown = "auto",
    on_stage: Callable[[PassRecord], None] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    example_inputs: GivenInputs | None = None,
    data: Data | None = None,
    eval_data: Data | None = None,
    vocabulary: str | Path | Sequence[str] | None = None,
    **keywords: Any,
) -> list[Pruned]:
    """Prune a model to several sizes, each cut further from the next larger one, and prove each::

        small, smaller = mptk.ladder(model, "runs/m", [0.2, 0.4], method="wanda", data=texts)

    The units of a smaller model are among those of each larger one. A smaller model begins with the weights of the next
    larger one, trained if there are steps. The dense model is the teacher of all.

    Args:
        out: folder for the results, each in a folder named after its sparsity: ``runs/m/0.2``.
        sparsities: shares of the budget to remove, ascending.
        keywords: as in ``prune``, like all other arguments. All models together take ``steps`` or ``minutes``, in equal
            parts. ``resume`` goes on with the model that was interrupted; finished ones stay.

    Returns:
        The pruned models, the largest first. If several processes work on one run, only the first gets them.

    Raises:
        MptkError: as ``prune``; or the sparsities or the settings do not suit a ladder. Finished models stay.
    """
    if "sparsity" in keywords:
        raise MptkError("sparsities names the sizes of a ladder; leave out sparsity")
    inputs = tokenizer, example_inputs, data, eval_data, vocabulary
    job, chosen = job_of(model, defaults(settings, out, model, example_inputs), keywords, *inputs)
    place = Path(out)
    ready = job(place)
    steps = once(lambda: rungs(place, chosen, sparsities, ready.needs))
    with reporting(progress) as say:

        def context(rung: LadderRun) -> Context:
            say(f"sparsity {rung.out.name}", 0, 0)
            return Context(Log(on_record=on_stage), say)

        return [_pruned(rung, found) for rung, found in climb(ready, place, steps, context) if leads()]


def _pruned(rung: LadderRun, found: Finished | None) -> Pruned:
    report = Report.read(rung.out)
    compiled = found.compiled if found is not None and report.live else None  # else the folder says enough
    return Pruned(report, rung.out, compiled=compiled)


def needed(model: str, settings: Settings, sparsities: Sequence[float]) -> Estimate:
    """What a ladder needs. No model runs. Raises the errors of ``mptk.ladder``."""
    needs = estimator(model)
    return total([needs(rung.settings) for rung in rungs(Path(), settings, sparsities, needs)])
