"""widths: what ``prune``'s budget counts, and the legal widths that meet it, before any work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from mptk.cost.latency import Latency
from mptk.cost.model import LATENCY, CostModel, is_layered
from mptk.cost.operator_times import kept_times
from mptk.driver.settings import MASKPRUNE, Settings
from mptk.errors import MptkError
from mptk.ir.families import Analysis
from mptk.ir.plan import Plan
from mptk.methods.processes import processes
from passes.targets import legalize
from passes.targets.onnx.quantize import BLOCKS
from passes.targets.stock.rehome import find_home
from passes.transforms.insert_masks import disturbed

SPLITS = 6
"""How many ways to divide the budget among families a one-shot method tries on calibration text."""


def budgeted(analysis: Analysis, settings: Settings, progress: Callable[..., None]) -> tuple[CostModel, Settings]:
    """The cost model of the settings' budget, and the settings with milliseconds turned into a sparsity.

    A latency comes from operators that are timed now or were before (``mptk/cost/operator_times.py``).

    Raises:
        MptkError: no such budget; no latency can be predicted; or the dense model takes no longer than ``max_ms``.
    """
    s = settings
    if s.budget != LATENCY:
        return CostModel(analysis, s.budget), s
    ladders = {name: legalize.aligned(analysis.family(name), multiples(s)) for name in _variable(analysis, s)}
    with processes().main_process_first():  # the others read what the first has kept, so that all plan alike
        latency = Latency(analysis, ladders, s.objective, lambda ops: kept_times(ops, s.threads, progress))
    cost = CostModel(analysis, s.budget, latency)
    if s.max_ms is None or s.plan is not None:
        return cost, s
    dense = latency({})
    if dense <= s.max_ms:
        raise MptkError(f"{s.objective} of the dense model is predicted to take {dense:.2f} ms; ask for less than that")
    return cost, replace(s, sparsity=1 - s.max_ms / dense + s.tolerance)


def _variable(analysis: Analysis, settings: Settings) -> list[str]:
    """Families that the settings may cut, for targets to narrow."""
    s, there = settings, {f.name: f for f in analysis.families}
    if s.plan is not None:
        names = list(Plan.load(s.plan).families)
    else:
        derived = legalize.derived_families(analysis) if s.target == "stock" else {}
        names = [*(s.families or [n for n, f in there.items() if is_layered(f) and n not in derived]), *s.widths]
    return [name for name in dict.fromkeys(names) if name in there and name not in s.keep]


def multiples(settings: Settings) -> tuple[int, ...]:
    """What contractions stay multiples of, where they are: the settings' number, and the blocks of its quantisers."""
    return (settings.multiple, *(BLOCKS[scheme] for scheme in settings.quantize if scheme in BLOCKS))


@dataclass(frozen=True)
class WidthSearch:
    """Legal widths of an analysed model. ``candidates`` gives those that meet the settings, most alike first."""

    analysis: Analysis
    cost: CostModel
    model: Any
    settings: Settings

    def candidates(self) -> list[legalize.Candidate]:
        """Candidates that the model's own class holds or, if it holds none and ``rehome`` is set, another class.

        Raises:
            MptkError: no legal widths meet the budget (the message names the nearest), or a family cannot be cut.
        """
        s = self.settings
        try:
            return self._within(find_target(self.analysis, self.model, s.target, multiples(s)))
        except MptkError as error:
            candidates, home = self._elsewhere()
            if home is None:
                raise
            if not s.rehome:
                raise MptkError(f"{error}; or give --rehome: {home} holds them with equal logits") from error
            return candidates

    def _elsewhere(self) -> tuple[list[legalize.Candidate], str | None]:
        """Candidates that only another class than the model's own would hold, and that class's name."""
        s = self.settings
        if s.target != "stock":
            return [], None
        try:
            candidates = self._within(legalize.stock_target(self.analysis, self.model, multiples(s), rehome=True))
        except MptkError:
            return [], None
        return candidates, find_home(self.analysis, self.model, candidates[0].widths)

    def _within(self, target: legalize.Target) -> list[legalize.Candidate]:
        s = self.settings
        names = list(s.families) or self._default_families(target)
        names = [name for name in names if name not in s.keep]
        if not names and not s.widths:
            wide = ", ".join(name for name, ladder in target.ladders.items() if len(ladder) > 1) or "none"
            raise MptkError(
                f"no family that repeats over layers can be cut for target {s.target}; name --families: {wide}"
            )
        for name in [*names, *s.keep, *s.widths]:
            if name not in target.ladders:
                raise MptkError(f"no family {name!r}; there are {', '.join(target.ladders)}")
            if s.method == MASKPRUNE and name not in s.keep and (refusal := disturbed(self.analysis, name)) is not None:
                raise MptkError(refusal)
            if len(target.ladders[name]) == 1 and name not in s.keep:
                why = target.refused.get(name, "no narrower width is legal")
                raise MptkError(f"{name} cannot be cut for target {s.target}: {why}; try --target graph")
        target = fixed(target, s.widths)
        if s.budget == LATENCY:
            target = legalize.unbeaten(self.cost, target, names)
        candidates = legalize.find_candidates(self.cost, target, [*dict.fromkeys([*names, *s.widths])], s.sparsity)
        if set(names) <= set(s.widths):
            if not candidates:
                raise MptkError(f"the stock class refuses these widths together: {target.accepts(s.widths)}")
            return candidates[:1]
        if s.max_ms is not None:
            self._check_reached(candidates)
        splits = len(candidates) if s.method == MASKPRUNE else SPLITS
        return legalize.choose_candidates(candidates, s.sparsity, s.tolerance, splits)

    def _check_reached(self, candidates: Sequence[legalize.Candidate]) -> None:
        """Raise MptkError, with the nearest there are, unless a candidate takes ``max_ms`` or little less."""
        s, dense = self.settings, self.cost.dense.latency_ms or 0.0
        if any(abs(c.sparsity - s.sparsity) <= s.tolerance for c in candidates):
            return
        nearest = [f"{(1 - c.sparsity) * dense:.2f} ms with {legalize.describe(c.widths)}" for c in candidates[:3]]
        raise MptkError(
            f"no legal widths {s.objective} in {s.max_ms:.2f} ms; nearest: {'; '.join(nearest) or 'none'}. "
            "Ask for one of these, name other --families, or use --target graph"
        )

    def _default_families(self, target: legalize.Target) -> list[str]:
        """What is cut if nothing else is said; of families that cannot fade out, masks learn none."""
        names = legalize.default_families(self.analysis, target)
        learns = self.settings.method == MASKPRUNE
        return [n for n in names if disturbed(self.analysis, n) is None] if learns else names


def find_target(analysis: Analysis, model: Any, target: str, multiple: int | Sequence[int]) -> legalize.Target:
    """Legal widths for ``stock`` (the model's own transformers class) or ``graph`` (what the graph's ops accept)."""
    if target == "graph" or not isinstance(model, PreTrainedModel):
        return legalize.graph_target(analysis, multiple)
    if target != "stock":
        raise MptkError(f"no target {target!r}; choose stock or graph")
    return legalize.stock_target(analysis, model, multiple)


def fixed(target: legalize.Target, widths: Mapping[str, int]) -> legalize.Target:
    """The target with some families' widths given. Raises MptkError for one that is not legal."""
    for name, width in widths.items():
        if width not in target.ladders[name]:
            legal = target.ladders[name]
            near = sorted(legal, key=lambda w: abs(w - width))[:3]
            raise MptkError(f"{name} cannot have width {width}; the nearest legal ones are {sorted(near)}")
    ladders = {n: (widths[n],) if n in widths else ladder for n, ladder in target.ladders.items()}
    return legalize.Target(ladders, target.refused, target.accepts)
