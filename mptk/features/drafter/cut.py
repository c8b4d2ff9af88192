"""cut: cut a model's multi-token-prediction layers with the model, and prove the cut.

The class builds these layers with the widths of the model's config. So the plan decides their widths: each gets the
width of the model's layers with the same weights. The hidden channels that stay are the model's. Magnitude decides
which units of its own a layer keeps: it needs no text, so verification finds the same units.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from mptk.errors import MptkError, ProofError, TargetError
from mptk.features.drafter.drafter import MTP_BLOCK, MTP_HEADS, OpenDrafter, open_drafter
from mptk.io import Resident, models
from mptk.ir import Analysis, Family, FamilyPlan, Group, Keep, Log, Plan, Samples, build_renumbering, resolve_plan
from mptk.methods.criteria import score_units
from mptk.protocols import Companion, Compiled, Stage, Written
from mptk.targets.graph import compare_stored
from passes.analysis import group
from passes.frontend.trace import trace_to_program
from passes.pipelines import cut_program
from passes.transforms.masked_reference import mask
from passes.transforms.weight_types import Store
from passes.verify import TOLERANCE, Difference, prove

_LAYER = re.compile(r".*?layers\.\d+\.")
"""Starts the names of a decoder layer's weights in a model."""
STAGE = "multi-token prediction"


@dataclass(frozen=True)
class Heads(Companion):
    """The multi-token-prediction layers after the cut. ``difference``: of their outputs from the masked ones."""

    difference: Difference | None = None

    def check(self, written: Written, folder: Path) -> list[Difference]:
        """Of their stored weights from the cut ones, and of these layers' outputs from the masked ones'."""
        if self.difference is None:
            return []
        opened = open_drafter(
            models.open_weights(str(folder), Resident(0), trust=written.loaded.trust), folder, Resident(0)
        )
        if opened is None:
            raise ProofError(
                f"the proof fails at 'config': {folder} has no multi-token-prediction layers; prune again",
                name="config",
            )
        found = opened.weights.select_names({opened.names[name]: name for name in opened.weights})
        found = found.with_entries(opened.copies).cast(written.dtype)
        stored = compare_stored(found, self.weights.cast(written.dtype))
        return [replace(stored, stage=f"{STAGE}, stored weights"), self.difference]


class CutHeads(Stage):
    """Cuts the multi-token-prediction layers of the dense checkpoint, if it has any.

    If they cannot be cut or proven, a note says so, and the result has none.
    """

    def complete(self, compiled: Compiled) -> Compiled:
        prepared, written = compiled.prepared, compiled.written
        if written is None or not prepared.target.companions or prepared.loaded.live:
            return compiled
        try:
            opened = open_drafter(prepared.loaded, prepared.loaded.path, Resident(0))
            if opened is None:
                return compiled
            found = cut_heads(compiled, opened)
        except MptkError as error:
            found = Heads(f"the multi-token-prediction layers are left out: {error}")
        return replace(compiled, written=replace(written, companions=(*written.companions, found)))


CUT_HEADS = CutHeads()


def cut_heads(compiled: Compiled, opened: OpenDrafter) -> Heads:
    """The layers of ``opened``, cut as the plan cuts the model. Raises MptkError if they cannot be cut or proven."""
    prepared, own = compiled.prepared, compiled.analysis

    # What the layers cannot follow: another class, merged KV heads, names that count the model's layers.
    if compiled.written is not None and compiled.written.note:
        raise TargetError("the result is of another class")
    if any(each.fits for each in prepared.conversions):
        raise TargetError("merged KV heads are not theirs")
    if build_renumbering(own, compiled.chosen.cut).kept and any(_LAYER.match(n) for n in opened.tables):
        raise TargetError("their names have the number of the model's layers, of which some were removed")
    _check_tables(compiled, opened)

    # The layers read the model's hidden states, so model and layers are analysed and cut as one program.
    samples = Samples({"input_ids": prepared.task.make_example(prepared.loaded.model).inputs["input_ids"]})
    program = trace_to_program(opened.module, samples.tensors, dynamic=True)
    stored = Store(prepared.dtype).run(opened.with_weights(program, own.program.state_dict())).program
    analysis = group.analyze_program(stored)
    cut = resolve_plan(analysis, plan_with_heads(own, analysis, compiled.chosen.plan))
    small = cut_program(analysis, cut, Log(), prepared.dtype)

    masked = mask(analysis, cut)
    (difference,) = prove(masked, {STAGE: (small.exact, TOLERANCE)}, samples, executor=prepared.executor)
    if not difference.ok:
        raise TargetError(f"their outputs differ from the masked ones by {difference.relative:.1e} of the largest")

    # The layers' copies of the model's tables are written as the cut model has them: a method may have trained these.
    state, model = small.program.state_dict(), compiled.program.state_dict()
    weights = state.select_names({opened.names[name]: name for name in opened.weights})
    return Heads("", weights.with_entries(model.select_names(opened.tables)), difference)


def _check_tables(compiled: Compiled, opened: OpenDrafter) -> None:
    """Raise MptkError unless the checkpoint's copies of the model's tables are equal to these."""
    dense = compiled.prepared.given.weights
    assert dense is not None
    for name, table in opened.tables.items():
        if not opened.copies[name].float().equal(dense[table]):
            raise TargetError(f"{name} is not the model's {table}", name=name)


def plan_with_heads(model: Analysis, drafter: Analysis, plan: Plan) -> Plan:
    """The plan of a model's cut as one of the drafter's.

    Raises:
        MptkError: units of the model are coupled in another way if the layers are there.
    """
    # A group of the model is known by its weights; one of a layer by its kind, which a layer of the model shares.
    variables = {name: model.variable(name) for name in plan.families}
    known = {_find_model_weights(g): (name, g.layer) for name, v in variables.items() for g in v.groups}
    kinds = {_describe_kind(v.family, g, _LAYER): name for name, v in variables.items() for g in v.groups}
    own = [family for family in drafter.families if any(_is_own(g) for g in family.groups)]
    scores = score_units(drafter, "magnitude", families=[family.name for family in own]) if own else {}
    made = {}
    for family in (*drafter.families, *drafter.depths):
        entries = list[tuple[str, str, Keep]]()
        for i, each in enumerate(family.groups):
            # Units that the model has: the plan says which stay. Units of only the layers: as many, by magnitude.
            if not _is_own(each) and (found := known.pop(_find_model_weights(each), None)) is not None:
                name, layer = found
                entries.append((name, each.layer, plan.families[name].keep[layer]))
            elif _is_own(each) and (twin := kinds.get(_describe_kind(family, each, MTP_BLOCK))) is not None:
                best = scores[family.name][i].sort(dim=-1, descending=True, stable=True).indices
                kept = best[:, : plan.families[twin].width].sort(dim=-1).values.tolist()
                entries.append((twin, each.layer, tuple(map(tuple, kept))))
        if entries:
            width = plan.families[entries[0][0]].width
            made[family.name] = FamilyPlan(width, family.size, {layer: keep for _, layer, keep in entries})
    if known:  # groups of the plan that no group of the drafter matches
        raise TargetError(f"they couple the units of {next(iter(known.values()))[0]} in another way")
    return Plan(made)


def _is_own(each: Group) -> bool:
    """Whether a group is of the multi-token-prediction layers only."""
    return not _find_model_weights(each)


def _find_model_weights(each: Group) -> frozenset[tuple[str, int]]:
    """The weights of the model that hold a group's units, and the dimensions."""
    if not each.members:  # of blocks
        return frozenset([(each.layer, 0)])
    return frozenset((m.weight, m.dim) for m in each.members if not m.weight.startswith(f"{MTP_HEADS}."))


def _describe_kind(family: Family, each: Group, start: re.Pattern[str]) -> tuple[str, int, frozenset[tuple[str, int]]]:
    """What a group of a layer is: the kind of its family, its size, and its weights and their dimensions."""
    stem = family.name.partition(".")[0]
    return stem, each.size, frozenset((start.sub("", m.weight, count=1), m.dim) for m in each.members)
