"""api: ``mptk.ladder``, which prunes a model to several sizes in one run, and ``mptk.rung``, which writes one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Unpack

from transformers import PreTrainedTokenizerBase

from mptk.api.changed import FirstRun
from mptk.api.pruned import Pruned, Shown, make_default_settings, report_progress, resolve_place, take_arguments
from mptk.api.words import wrap_public
from mptk.config import Settings
from mptk.cost.estimate import Estimate
from mptk.distributed.processes import is_leader
from mptk.errors import FileError, InputError
from mptk.features.ladder.estimate import LadderEstimator, sum_estimates
from mptk.features.ladder.keywords import LadderKeywords
from mptk.features.ladder.ladder import climb, divide_steps, list_settings, name_size, open_ladder, should_share_weights
from mptk.features.ladder.rungs import list_rung_sizes, restore_rung
from mptk.features.ladder.shared import prune_together
from mptk.files import make_scratch
from mptk.files.outputs import check_apart
from mptk.ir import Log, PassRecord
from mptk.protocols import Context, Report
from mptk.publish.folder import publish
from mptk.publish.manifest import check_manifest, check_whole, read_manifest
from mptk.run.estimate import read_estimator
from mptk.run.inputs import Data, GivenInputs
from mptk.run.minutes import complete_settings
from mptk.run.open import Model, name_start
from mptk.run.prune import Result
from mptk.trust import Trust, trust_by_caller


@wrap_public
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
    **keywords: Unpack[LadderKeywords],
) -> list[Pruned]:
    """Prune a model to several sizes, each cut further from the next larger one, and prove each::

        small, smaller = mptk.ladder(model, "runs/m", [0.2, 0.4], method="wanda", data=texts)

    The units of a smaller model are among those of each larger one. A smaller model begins with the weights of the next
    larger one, trained if there are steps. The dense model is the teacher of all.

    Args:
        out: folder for the results, each in a folder named after its sparsity: ``runs/m/0.2``.
        sparsities: shares of the budget to remove, ascending.
        keywords: as in ``prune``, like all other arguments. All models share ``steps`` or ``minutes``, in equal parts.
            With ``shared`` all are one set of weights: ``out`` is the largest's folder, and ``rung`` makes the others'.

    Returns:
        The pruned models, the largest first. If several processes work on one run, only the first gets them.

    Raises:
        MptkError: as ``prune``; or the sparsities or the settings do not suit a ladder. Finished models stay.
    """
    if "sparsity" in keywords:
        raise InputError("sparsities names the sizes of a ladder; leave out sparsity", name="sparsity")
    given = make_default_settings(settings, out, model, example_inputs)
    start, asked, inputs = take_arguments(model, given, tokenizer, example_inputs, data, eval_data, keywords)
    place, source = resolve_place(out), name_start(model)
    with (
        report_progress(progress) as say,
        open_ladder(start, source, place, asked, sparsities, inputs, Context(Log(on_record=on_stage), say)) as runs,
    ):
        # The smaller sizes lie inside the largest one's folder, and are made anew into temporary folders.
        if should_share_weights(asked):
            found = prune_together(start, runs[0])
            sizes = [rung(place, size, trust_remote_code=asked.trust_remote_code) for size in sparsities[1:]]
            return [_make_pruned(place, found, asked.trust), *sizes]
        # Only the first process has results, but all of them must climb.
        return [_make_pruned(run.out, found, asked.trust) for run, found in climb(start, place, runs) if is_leader()]


def _make_pruned(place: Path, found: Result | None, trust: Trust) -> Pruned:
    report = Report.read(place)
    # The sizes do not hold a dense model that has a name: it can be opened again.
    if found is None or not report.live:
        return Pruned(report, place, origin=FirstRun(trust=trust))
    return Pruned(report, place, compiled=found.compiled, origin=FirstRun(trust=trust, digests=found.run.origin))


def estimate_ladder(model: str, settings: Settings, sparsities: Sequence[float]) -> Estimate:
    """What a ladder needs. No model runs. Raises the errors of ``mptk.ladder``."""
    # As a run does it: numbers are chosen for the whole ladder, and each size is estimated with them.
    asked = divide_steps(settings, sparsities)
    estimator = read_estimator(model, settings.trust)
    places = [Path(name_size(sparsity)) for sparsity in sparsities]
    each = complete_settings(asked, LadderEstimator(**vars(estimator), sparsities=sparsities))[0]
    return sum_estimates([estimator.estimate(own) for own in list_settings(each, sparsities, places)])


@wrap_public
def rung(
    folder: str | Path,
    size: float,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Pruned:
    """A smaller size of a ladder whose sizes share weights, as the ordinary folder that the ladder proved::

        small = mptk.rung("runs/m", 0.4, "runs/small").model

    It is made from the largest size's weights and the size's own. No model runs; each file has the digest of the proven
    one.

    Args:
        folder: the ``out`` folder of ``ladder(…, shared=True)``.
        size: its sparsity, as the ladder was given it.
        out: the folder to write; None: a temporary one, which lives as long as the result.
        overwrite: as in ``Settings``.
        trust_remote_code: as in ``Pruned.open``.

    Raises:
        MptkError: the folder was changed, or has no such size; or ``out`` cannot be written.
    """
    place, name = Path(folder), name_size(size)
    sizes = list_smaller_sizes(place)
    if name not in sizes:
        raise InputError(f"{place} has no size {name}; give {' or '.join(sizes)}", name="size", nearest=sizes)
    kept = make_scratch() if out is None else None
    made = kept.folder / name if kept is not None else resolve_place(str(out))
    check_apart(made, place)
    with publish(made, overwrite=overwrite) as new:
        restore_rung(place, name, new)
    origin = FirstRun(trust=trust_by_caller(trust_remote_code))
    return Pruned(Report.read(made), made, kept=kept, origin=origin)


def list_smaller_sizes(folder: Path) -> list[str]:
    """The names of the smaller sizes in the folder of the largest. Raises MptkError if it was changed, or has none."""
    # What no ladder made is refused before its weights are read for their digests.
    check_whole(folder)
    read_manifest(folder)
    if not (sizes := list_rung_sizes(folder)):
        raise FileError(
            f"{folder} has one size; give the --out folder of `mptk prune --ladder 0.2,0.4 --shared`", name=folder
        )
    check_manifest(folder)
    return sizes
