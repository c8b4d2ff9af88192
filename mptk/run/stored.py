"""stored: store the choice and the fitted weights of an unfinished run in its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor
from typing_extensions import TypedDict

from mptk.distributed.processes import is_leader
from mptk.errors import MptkError
from mptk.files import write_json
from mptk.ir.plan import Plan
from mptk.ir.resolved_plan import resolve_plan
from mptk.ir.weights import Weights
from mptk.protocols.chain import Chosen, Prepared
from mptk.protocols.run_folder import RunFolder
from mptk.protocols.values import SampleSets
from mptk.reading import Made, read_as
from mptk.run.run import Run
from mptk.staged.spool import spool_weights

KEPT_CHOICE, KEPT_FIT = "choice", "fitted"


def keep_choice(prepared: Prepared, sets: SampleSets, run: Run) -> Chosen:
    """The stored choice of the unfinished run; if there is none, the method's, which is stored.

    A choice that was trained is not stored: training writes its own checkpoints.
    """
    folder = run.folder
    if folder is not None and folder.holds(f"{KEPT_CHOICE}.json"):
        known = _known(folder, KEPT_CHOICE, KeptChoice)
        plan = Plan.from_json(known["plan"])
        changes = _stored(folder, KEPT_CHOICE, known["changes"], prepared)
        cut, trained, notes = resolve_plan(prepared.analysis, plan), tuple(known["trained"]), tuple(known["notes"])
        losses = {widths: math.inf if loss is None else loss for widths, loss in known["losses"].items()}
        return Chosen(plan, cut, changes, trained, losses, notes)
    chosen = prepared.method.choose(prepared, sets, run)
    if folder is not None and is_leader() and chosen.witness is None and not chosen.steps:
        said = {"plan": chosen.plan.to_json(), "changes": list(chosen.changes), "trained": chosen.trained}
        _save(folder, KEPT_CHOICE, chosen.changes, {**said, "losses": chosen.losses, "notes": chosen.notes})
    return chosen


def read_fit(prepared: Prepared, folder: RunFolder | None) -> Mapping[str, Tensor] | None:
    """The stored fitted weights of the unfinished run; None if there are none."""
    if folder is None or not folder.holds(f"{KEPT_FIT}.json"):
        return None
    return _stored(folder, KEPT_FIT, _known(folder, KEPT_FIT, KeptFit)["changes"], prepared)


def store_fit(weights: Mapping[str, Tensor], folder: RunFolder | None) -> None:
    """Store fitted weights, if the run keeps its stages. Only the main process does: the others compute their own."""
    if folder is not None and is_leader():
        _save(folder, KEPT_FIT, weights, {"changes": list(weights)})


class KeptFit(TypedDict):
    """The content of ``fitted.json``."""

    changes: Sequence[str]


class KeptChoice(KeptFit):
    """The content of ``choice.json``."""

    plan: Mapping[str, object]
    trained: Sequence[str]
    losses: Mapping[str, float | None]
    notes: Sequence[str]


def _known(folder: RunFolder, name: str, kind: type[Made]) -> Made:
    """The content of a stored file. Raises MptkError if it is damaged."""
    file, remedy = folder.path / f"{name}.json", "remove the folder, and start again"
    return read_as(kind, file, lambda why: MptkError(f"{file.name} in {folder.path} is damaged: {why}; {remedy}"))


def _save(folder: RunFolder, name: str, weights: Mapping[str, Tensor], known: Mapping[str, object]) -> None:
    """Write one file for each weight, so that one is in memory at a time, then the file that marks them complete."""
    for i, weight in enumerate(weights):
        folder.save(f"{name}-{i}", {weight: weights[weight]})
    write_json(folder.make() / f"{name}.json", known)


def _stored(folder: RunFolder, name: str, weights: Sequence[str], prepared: Prepared) -> Weights:
    """The stored weights, in a spool: the result of a run outlives the run's folder."""
    likes = prepared.analysis.program.state.likes
    read = ((each, folder.tensor(f"{name}-{i}", each).to(likes[each].dtype)) for i, each in enumerate(weights))
    return spool_weights(read, prepared.executor.borders)
