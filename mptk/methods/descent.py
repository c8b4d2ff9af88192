"""descent: choose the few large units of a layer (KV groups, query heads) by the measured loss.

A score sees one layer of the dense model. What a head is worth depends on what all other layers have left, and a model
has so few heads that this can be measured. This is coordinate descent on the kept units: from the first layer to the
last, each exchange of a kept unit for a removed one is tried in the model as it is cut, with the layer's consumers
fitted to it. The best one is made if the loss falls by more than its error of measurement. Only the stages from that
layer on run again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, fx

from mptk.distributed.sharing import sharing
from mptk.ir.plan import FamilyPlan, Plan
from mptk.ir.program import Program
from mptk.ir.resolved_plan import resolve_plan
from mptk.ir.samples import Samples
from mptk.ir.weights import Weights
from mptk.methods.criteria.observe import find_sites
from mptk.methods.reconstruct import consumers, emptied, gather_products, kept_units, stored
from mptk.progress import Count
from mptk.protocols.chain import Prepared, reconstructs
from mptk.protocols.run_folder import RunFolder, kept
from mptk.staged.partition import Flow, blocks
from mptk.staged.spool import Spool
from mptk.staged.staged import StagedRun
from passes.transforms.insert_masks import MaskSite
from passes.transforms.masked_reference import mask

FEW = 16
"""Most units in a row of a family whose choice is measured."""
TOKENS = 1024
"""Calibration tokens for a loss, if ``PARTS`` samples have no more."""
PARTS = 8
"""Parts of these tokens, from whose losses the standard error comes."""
MARGIN = 2.0
"""Standard errors by which an exchange must lower the loss."""
UNBOUNDED = 1e9
"""Stands for a loss that is not finite."""
LOSSES = "losses"
"""Name of the losses beside the rows of a stage."""

Kept = Mapping[str, Tensor]
"""Family → kept units, boolean [layers, scopes, size]."""
Row = tuple[str, int, int]
"""A choice of units: family, layer, scope."""


def few(prepared: Prepared, plan: Plan) -> list[str]:
    """The families of ``plan`` with few units, which go if the columns of their consumers go."""
    places: dict[str, set[str]] = {}
    for site in prepared.mask_sites:
        places.setdefault(site.family, set()).add(site.where)
    return [
        name
        for name, family in plan.families.items()
        if family.width < family.of <= FEW and places.get(name) == {"input"}
    ]


def descended(
    prepared: Prepared, plan: Plan, calibration: Samples, progress: Count, folder: RunFolder | None = None
) -> tuple[Plan, str]:
    """``plan`` with better units in its families of few units, by the loss on the first samples of ``calibration``.

    Consumers are fitted if the run fits them. ``folder`` stores the choices of each stage. Also returns a note.
    """
    names = few(prepared, plan)
    analysis, executor = prepared.analysis, prepared.calibrator
    sites = [site for site in prepared.mask_sites if site.family in plan.families]
    start = kept_units(analysis, resolve_plan(analysis, plan), list({site.family: None for site in sites}))
    fitted: Callable[[Kept], Weights] = partial(emptied, analysis.program, sites)
    if reconstructs(prepared.settings, prepared.method):
        fitted = gather_products(analysis, sites, calibration, executor=executor).fitted
    others = Plan({name: family for name, family in plan.families.items() if name not in names})
    program = mask(analysis, resolve_plan(analysis, others))
    program = program.with_state(_made(fitted(start), program, executor.borders))
    parts = calibration[: max(PARTS, TOKENS // calibration.positions)].chunk(PARTS)
    descent = _Descent(prepared, program, [site for site in sites if site.family in names], start, fitted, parts)
    descent.sweep(progress, folder)
    found = {name: _planned(prepared, plan, name, descent.kept) for name in names}
    differs = torch.cat([(descent.kept[name] != start[name]).any(-1).flatten() for name in names])
    note = f"the measured loss changed {int(differs.sum())} of {len(differs)} choices of {', '.join(names)}"
    return replace(plan, families={**plan.families, **found}), note


def _made(weights: Weights, program: Program, bound: float) -> Weights:
    """The weights, each made only once."""
    shelf = Spool(bound)
    for name in weights:
        shelf.add(name, weights[name])
    return shelf.weights({name: program.state.like(name) for name in weights})


def _planned(prepared: Prepared, plan: Plan, name: str, kept: Kept) -> FamilyPlan:
    """The entry of the family ``name`` in ``plan``, with the units ``kept``."""
    layers = zip(prepared.analysis.family(name).groups, kept[name], strict=True)
    keep = {group.layer: tuple(tuple(row.nonzero().flatten().tolist()) for row in rows) for group, rows in layers}
    return replace(plan.families[name], keep=keep)


class _Descent:
    """The present choice ``kept``, its ``losses`` on all parts of the text, and a run of ``program``, stage by stage.

    ``sites``: of the families whose units are exchanged. ``start``: the units to which the consumers of ``program`` are
    fitted. ``fitted``: kept units → consumers' weights.
    """

    def __init__(
        self,
        prepared: Prepared,
        program: Program,
        sites: Sequence[MaskSite],
        start: Kept,
        fitted: Callable[[Kept], Weights],
        samples: Sequence[Samples],
    ) -> None:
        self.kept, self.fitted, self.task, self.parts = start, fitted, prepared.task, len(samples)
        self.losses: Tensor | None = None
        self.share, self.device, self.summed = sharing(len(samples)), prepared.calibrator.device, consumers(sites)
        self.own = [batch.to(self.device) for batch in self.share.own(samples)]
        analysis = prepared.analysis
        inner = [s.node for s in find_sites(analysis) if stored(analysis.program, s.weight) in self.summed]
        part = blocks(Flow(analysis.program), inner)
        self.run = StagedRun(prepared.calibrator, Flow(program), part, [b.tensors for b in self.own], keep=True)
        self.rows = self._rows(sites)

    def _rows(self, sites: Sequence[MaskSite]) -> list[list[Row]]:
        """The choices of each stage: those of the consumers that no other stage reads."""
        names = self.run.program.weights
        reads = [{names[node.name] for node in stage.weights} for stage in self.run.stages]
        places: dict[tuple[str, int], set[int]] = {}
        for site in sites:
            found = {k for k, read in enumerate(reads) if site.weights[0][0] in read}
            places.setdefault((site.family, site.layer), set()).update(found)
        rows = {at: [(*at, scope) for scope in range(self.kept[at[0]].shape[1])] for at in places}
        return [[row for at in places if places[at] == {k} for row in rows[at]] for k in range(len(reads))]

    def sweep(self, progress: Count, folder: RunFolder | None) -> None:
        """Go once through the stages, as far as they have choices."""
        done, total = 0, sum(map(len, self.rows))
        for k, rows in enumerate(self.rows):
            if done == total:
                return
            if rows:
                found = kept(folder, f"descent-{k}", partial(self._stage, k, rows))
                self.losses = found[LOSSES]
                for i, row in enumerate(rows):
                    self.kept = self._with(row, found[str(i)])
            self.run.advance(k, weights=self._weights(k, self.kept))
            done += len(rows)
            progress(done, total)

    def _stage(self, k: int, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The best units of each row, by number, and the losses with them."""
        losses = self._losses(k, [self.kept])[0] if self.losses is None else self.losses
        for row in rows:
            now = self._units(row)
            tried = [self._with(row, _exchanged(now, out, back)) for out in _where(now) for back in _where(~now)]
            found = self._losses(k, tried)
            gains = losses - found
            best = int(gains.mean(1).argmax())
            if gains[best].mean() > MARGIN * gains[best].std() / math.sqrt(self.parts):
                self.kept, losses = tried[best], found[best]
        return {str(i): self._units(row) for i, row in enumerate(rows)} | {LOSSES: losses}

    def _units(self, row: Row) -> Tensor:
        family, layer, scope = row
        return self.kept[family][layer, scope]

    def _with(self, row: Row, units: Tensor) -> Kept:
        """The present choice with other units in ``row``."""
        family, layer, scope = row
        changed = self.kept[family].clone()
        changed[layer, scope] = units
        return {**self.kept, family: changed}

    def _losses(self, k: int, tried: Sequence[Kept]) -> Tensor:
        """The loss of each choice on each part of the text, [tried, parts]. The choices differ in stage ``k`` only."""
        results = self.run.onward(k, [self._weights(k, each) for each in tried])
        found = torch.zeros(len(tried), self.parts, dtype=torch.float64)
        for each in found:
            for part, batch in zip(self.share.own(range(self.parts)), self.own, strict=True):
                each[part] = float(self.task.loss(next(results), batch))
        return self.share.total(found.to(self.device)).cpu().nan_to_num(UNBOUNDED, UNBOUNDED)

    def _weights(self, k: int, kept: Kept) -> dict[fx.Node, Tensor]:
        """The weights of stage ``k``, with its consumers fitted to ``kept``."""
        names, changed = self.run.program.weights, self.fitted(kept)
        own = {
            node: changed[names[node.name]] for node in self.run.stages[k].weights if names[node.name] in self.summed
        }
        return self.run.read(k) | {node: weight.to(self.device) for node, weight in own.items()}


def _where(units: Tensor) -> list[int]:
    found: list[int] = units.nonzero().flatten().tolist()
    return found


def _exchanged(units: Tensor, out: int, back: int) -> Tensor:
    changed = units.clone()
    changed[out], changed[back] = False, True
    return changed
