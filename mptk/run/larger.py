"""larger: start a run from a larger pruned folder of the same dense model, and cut it further.

The run stays one on the dense model: its plan has the dense model's units, which are among those of the larger folder,
and the dense model is what the budget is a share of, the teacher, and the reference for quality and for the proof. Only
where units are chosen and fitted, ``take_larger`` gives the larger model in dense shapes, whose removed units are 0, in
the place of the dense model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from mptk.compile.cut import find_changes, without
from mptk.config import Settings
from mptk.conversions import list_conversions
from mptk.distributed.processes import holds
from mptk.errors import BudgetError, InputError, MptkError
from mptk.files import expand_path, format_json
from mptk.io import copy_without_weights
from mptk.ir import Analysis, Cut, FamilyPlan, Plan, Weights, collect_kept_units, resolve_plan
from mptk.methods.division.budget import find_widths
from mptk.proof.verification import read_folder_plan
from mptk.protocols import Analysed, Chosen, Conversion, Origin, Prepared, Report
from mptk.publish.manifest import check_manifest
from mptk.targets.stock_config import check_code
from passes.targets.legalize import Candidate
from passes.transforms.insert_masks import find_disturbance


def read_larger(
    settings: Settings, model: Analysed, conversions: tuple[Conversion, ...], origin: Origin
) -> Chosen | None:
    """The choice and the weights of the folder ``settings.larger``; None if there is none, or a plan is given.

    ``model``: the dense model after ``conversions``. ``origin``: of the run.

    Raises:
        MptkError: it is not a pruned folder, was changed, or was made from another model or by other conversions; or
            removed units cannot be replaced by zeros, so it cannot be cut further.
    """
    if settings.larger is None or settings.fixed:
        return None
    folder, analysis = expand_path(settings.larger), model.analysis
    report, plan = Report.read(folder), read_folder_plan(folder)
    check_manifest(folder)
    if report.model_sha256 != origin.model:
        raise InputError(
            f"{folder} was not pruned from this model; give a folder that was, or leave out --larger", name="larger"
        )
    if format_json(plan.conversions, sort_keys=True) != format_json(
        {c.name: c.entry for c in conversions}, sort_keys=True
    ):
        others = " or ".join(kind.label for kind in list_conversions())
        raise InputError(f"{folder} was made with {others}; give the same", name="larger")
    if not all(analysis.variable(name).uniform for name in plan.families):
        raise InputError(f"{folder} has layers of different widths, and a further cut needs equal ones", name="larger")
    if why := find_refusal(analysis, plan.families):
        raise InputError(
            f"{folder} cannot be cut further: {why}; cut the dense model to the smaller size", name="larger"
        )
    # What the plan and the report say is checked before weights are read.
    check_code(model.loaded.path, folder)
    cut = resolve_plan(analysis, plan)
    changes = find_changes(analysis, cut, folder, report, settings.trust) if holds() else {}
    return Chosen(plan, cut, changes, tuple(report.trained))


def find_refusal(analysis: Analysis, families: Iterable[str]) -> str | None:
    """The reason why a cut of these families cannot be cut further, or None.

    It can be if the dense shapes with zeros for the removed units compute the same.
    """
    for name in families:
        if analysis.variable(name).kind == "blocks":
            return f"{name} removes whole blocks"
        if find_disturbance(analysis, name) is not None:
            return f"zeros in the place of {name} would disturb a norm, a softmax or a top-k"
    return None


def keep_reachable(prepared: Prepared, sparsities: Sequence[float]) -> Prepared:
    """``prepared`` with the candidates from which each of ``sparsities`` can be reached by a further cut.

    Raises:
        MptkError: there is none.
    """
    if not sparsities:
        return prepared
    if why := find_refusal(prepared.analysis, prepared.families):
        raise BudgetError(
            f"a ladder cannot have these steps: {why}; name other --families, or prune once for each size",
            name="families",
        )
    refused: list[MptkError] = []

    def can_reach(candidate: Candidate) -> bool:
        sizes = {name: prepared.analysis.variable(name).size for name in candidate.widths}
        plan = Plan({name: FamilyPlan(width, sizes[name], {}) for name, width in candidate.widths.items()})
        start = Chosen(plan, Cut({}, {}))
        try:
            for sparsity in sparsities:
                find_widths(replace(prepared, start=start, settings=replace(prepared.settings, sparsity=sparsity)))
        except MptkError as error:
            refused.append(error)
            return False
        return True

    if found := tuple(filter(can_reach, prepared.candidates)):
        return replace(prepared, candidates=found)
    raise refused[0]


def take_larger(prepared: Prepared) -> Prepared:
    """The model that units are chosen from and fitted to: the larger one in dense shapes; else the dense one."""
    start, loaded, analysis = prepared.start, prepared.loaded, prepared.analysis
    if start is None:
        return prepared
    # The larger folder's weights, and zeros for what it lost. They go into a copy: the dense model stays the teacher.
    changed = analysis.with_weights(start.changes)
    weights = Weights(start.changes).with_entries(without(changed, start.cut))
    bare: PreTrainedModel = copy_without_weights(loaded.model)  # type: ignore[assignment]  # of the same class
    larger = replace(loaded, model=bare).with_changes(weights, analysis.program.aliases)
    model = replace(prepared.model, loaded=larger, analysis=analysis.with_weights(weights))
    fitted = tuple(replace(each, weights={}) for each in prepared.conversions)  # the larger model has their weights
    return replace(prepared, model=model, dense=replace(prepared.dense, conversions=fitted))


def join_larger(prepared: Prepared, chosen: Chosen) -> Chosen:
    """A choice from ``take_larger``, with the larger folder's weights for what the choice leaves as it is.

    Raises MptkError if the method chose units that are gone.
    """
    if (start := prepared.start) is None:
        return chosen
    folder, plan = prepared.settings.larger or "the next larger size", chosen.plan
    kept = collect_kept_units(prepared.analysis, chosen.cut, [name for name in prepared.stays if name in plan.families])
    for name, units in prepared.stays.items():
        if name not in kept or (kept[name] & ~units).any():
            raise InputError(
                f"{prepared.method.name} keeps units of {name} that {folder} has lost; use another --method",
                name="method",
            )
    changes = Weights(start.changes).with_entries(chosen.changes)
    # If either was trained, all count as trained: the folder then gets no file of corrected biases (`write_targets`).
    trained = tuple(changes) if start.trained or chosen.trained else ()
    note = f"cut further from {folder}, with whose weights the run began"
    return replace(chosen, changes=changes, trained=trained, notes=(*chosen.notes, note))
