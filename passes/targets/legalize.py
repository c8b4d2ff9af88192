"""legalize: find the widths that a target accepts and that meet a budget, before the cut."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from transformers import PreTrainedModel

from mptk.cost.model import CostModel, is_layered
from mptk.errors import BudgetError, MptkError
from mptk.ir import (
    Alignment,
    Analysis,
    Family,
    Term,
    Variables,
    compute_size,
    encode_ranges,
    list_axes,
    name_op,
    split_layer,
)
from passes.analysis.rules.contract import ROW_BYTES
from passes.frontend.trace import Flat
from passes.targets.choose_blocks import choose_blocks
from passes.targets.derived import find_derived_families
from passes.targets.stock.learn import Stock
from passes.targets.stock.travel import find_breaking_cuts
from passes.targets.width_choices import (
    WidthChoices,
    Widths,
    keep_complete_families,
    list_proportional_widths,
    list_width_choices,
)
from passes.transforms.fold_norms import find_epsilons

DEFAULT_ALIGNMENT = Alignment()
NO_RATIO = "it and its partners have no common legal width"
COMBINATIONS = 20_000
LADDER_POINTS = 12

Accepts = Callable[[Mapping[str, int]], str | None]
NEAREST = 0.02
"""The nearest legal cut is taken if it is off the budget by at most this share of the model."""


@dataclass(frozen=True)
class LegalWidths:
    """What a target allows.

    Attributes:
        ladders: variable → its legal widths, the dense one last. A target gives them for families; ``tie``, for others.
        refused: variable that cannot be cut → the reason.
        accepts: widths → the reason why their combination is refused, or None.
        stock: what the model's own config class can express; None for a target without a stock class.
        left: family that ``keep_portable_families`` leaves out of the default cut → the reason.
        together: sets of families that can only be cut together.
    """

    ladders: Mapping[str, tuple[int, ...]]
    refused: Mapping[str, str]
    accepts: Accepts
    stock: Stock | None = None
    left: Mapping[str, str] = field(default_factory=dict)
    together: tuple[frozenset[str], ...] = ()

    @cached_property
    def breaks(self) -> Mapping[str, str]:
        """Family → programs, other than transformers, that break if it is cut (``stock/travel.py``)."""
        return {} if self.stock is None else find_breaking_cuts(self.stock, self.ladders)

    def tie(self, variables: Variables) -> LegalWidths:
        """The legal widths of ``variables``: each has those of its family."""
        every = variables.values()
        ladders = {v.name: ladder for name, ladder in self.ladders.items() for v in every if v.family.name == name}
        refused = {v.name: why for name, why in self.refused.items() for v in every if v.family.name == name}
        return replace(self, ladders=ladders, refused=refused)

    def keep_whole(self, names: Iterable[str]) -> LegalWidths:
        """The same, but that the variables ``names`` have only their dense width."""
        return replace(self, ladders={**self.ladders, **{name: self.ladders[name][-1:] for name in names}})


@dataclass(frozen=True)
class Candidate:
    """Widths (variable → units kept), their sparsity, and the unevenness of the cut across families (0: even)."""

    widths: Mapping[str, int]
    sparsity: float
    unevenness: float


def find_graph_widths(analysis: Analysis, alignment: Alignment = DEFAULT_ALIGNMENT) -> LegalWidths:
    """Legal widths for the rewritten graph: all widths that its ops accept and that are aligned."""
    ladders = {f.name: list_aligned_widths(f, alignment) for f in analysis.all_families}
    return LegalWidths(ladders, {}, lambda widths: None)


def find_stock_widths(
    analysis: Analysis, stock: Stock, alignment: Alignment = DEFAULT_ALIGNMENT, *, rehome: bool = False
) -> LegalWidths:
    """Legal widths for a stock transformers checkpoint: all widths that the model's own config class can express.

    Args:
        analysis: of the model.
        stock: the result of ``discover``.
        alignment: see ``list_aligned_widths``.
        rehome: also allow widths that only the class's validators refuse; another class may hold such a model
            (``stock/rehome.py``).
    """
    together = tuple(stock.together)
    refused = {n: r.to_sentence(n) for n, r in stock.refusals.items() if not any(n in group for group in together)}
    refused |= stock.derived
    depths = {family.name: family for family in analysis.depths}

    @functools.cache
    def shorter(name: str, width: int) -> str | None:
        family = depths[name]
        try:
            choose_blocks(family.stack, [0.0] * family.size, width, stock)
        except MptkError as error:
            return str(error)
        return None

    def accepts(widths: Mapping[str, int]) -> str | None:
        for family in analysis.depths:
            width = widths.get(family.name, family.size)
            if width < family.size and (why := shorter(family.name, width)) is not None:
                return why
        refusal = stock.check_widths(widths)
        return None if refusal is None or (rehome and refusal.config is not None) else str(refusal)

    ladders, rows = {}, find_grouped_rows(analysis)
    for family in analysis.families:
        narrower = (
            [] if family.name in refused else [w for w in list_aligned_widths(family, alignment) if w < family.size]
        )
        widths = [w for w in narrower if _keeps_multiples(family, w, rows)]
        joint = any(family.name in group for group in together)
        ladders[family.name] = (*(w for w in widths if joint or accepts({family.name: w}) is None), family.size)
    joint_ladders = _find_joint_widths(ladders, together, accepts)
    refused |= {name: NO_RATIO for name, ladder in joint_ladders.items() if len(ladder) == 1}
    ladders |= joint_ladders
    for family in analysis.depths:
        why = accepts({family.name: family.size - 1})
        counted = why is None or stock.find_pattern(family.groups[0].layer, family.size - 1) is not None
        ladders[family.name] = list_aligned_widths(family, alignment) if counted else (family.size,)
        refused |= {} if counted else {family.name: str(why)}
    found = LegalWidths(ladders, refused, accepts, stock, together=together)
    return refuse_breaking(found, alignment.engines) if alignment.engines else found


def refuse_breaking(target: LegalWidths, engines: Collection[str]) -> LegalWidths:
    """Refuse the families whose cut breaks one of ``engines``."""
    assert target.stock is not None
    why = {
        name: f"cutting it breaks {what}"
        for name, what in find_breaking_cuts(target.stock, target.ladders, engines).items()
    }
    return replace(target.keep_whole(why), refused={**target.refused, **why})


def find_grouped_rows(analysis: Analysis) -> list[tuple[Term, int]]:
    """The rows of products of experts, and a number that their lengths must stay multiples of.

    A trace in float32 shows transformers' own op for them, and the class calls torch's, whose rows are multiples of 16
    bytes. A checkpoint may be loaded in a type of two bytes.
    """
    nodes = [n for n in analysis.facts.results if name_op(n) == "transformers.grouped_mm_fallback.default"]
    terms = [analysis.facts.dims(n.all_input_nodes[operand])[-1] for n in nodes for operand in (0, 1)]
    return [(term, math.gcd(term.size, ROW_BYTES // 2)) for term in terms]


def _keeps_multiples(family: Family, width: int, rows: Sequence[tuple[Term, int]]) -> bool:
    """Whether rows keep their multiples if the family is cut to a width."""
    sizes = {group.axis: width for group in family.groups}
    return all(compute_size(term, sizes) % step == 0 for term, step in rows)


def _find_joint_widths(
    ladders: Mapping[str, tuple[int, ...]], together: Sequence[frozenset[str]], accepts: Accepts
) -> dict[str, tuple[int, ...]]:
    """For families in ``ladders`` that are only cut together: the widths that occur in a cut of their group."""
    found: dict[str, set[int]] = {}
    for group in together:
        for widths in list_proportional_widths(ladders, sorted(group)):
            if accepts(widths) is None:
                for name, width in widths.items():
                    found.setdefault(name, {ladders[name][-1]}).add(width)
    return {name: tuple(sorted(widths)) for name, widths in found.items()}


def discover(analysis: Analysis, model: PreTrainedModel) -> Stock:
    """Learn which families the stock class of ``model`` can express."""
    families = {f.name: f.size for f in analysis.families}
    own = {g.axis for f in analysis.families for g in f.groups}
    others = {leaf.size for dims in analysis.weights.values() for d in dims for leaf in list_axes(d) if leaf not in own}
    norms = {family.name: find_epsilons(analysis, family) for family in analysis.families}
    derived = find_derived_families(analysis)

    shapes = functools.partial(cut_shapes, analysis)

    def forward(built: PreTrainedModel) -> None:
        given, _ = analysis.program.exported.example_inputs or ((), {})
        Flat(built, analysis.program.inputs)(*(tensor.to("meta") for tensor in given))

    return Stock(model, families, sorted(others), shapes, derived=derived, norms=norms, forward=forward)


def cut_shapes(analysis: Analysis, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """State-dict name → shape after a cut to ``widths``, tied names included."""
    sizes, aliases = analysis.sizes(widths), analysis.program.aliases
    shapes = {}
    for name, like in analysis.program.state_dict().likes.items():
        dims = analysis.weights.get(aliases.get(name, name))
        shapes[name] = tuple(like.shape) if dims is None else tuple(compute_size(d, sizes) for d in dims)
    return shapes


def list_aligned_widths(family: Family, alignment: Alignment = DEFAULT_ALIGNMENT) -> tuple[int, ...]:
    """Widths that the graph accepts and that keep the dense sums' alignment. Whole units stay on each device.

    Units that several devices hold at once, as KV heads fewer than devices, are not cut.
    """
    members = [m for g in family.groups[:1] for m in g.members if m.role == "consumer"]
    devices = alignment.devices if is_layered(family) else 1  # all hold the residual width whole
    steps = alignment.find_divisors(family.name, devices)
    kept = [(m.term, step) for m in members for step in steps if m.term.size % step == 0]
    if devices > 1:
        units = [(m.term, family.groups[0].positions(m).shape[-1]) for m in members]  # and a unit's length in the sum
        if any(devices % (term.size // length) == 0 for term, length in units):
            return (family.size,)
        shared = ((term, length * devices) for term, length in units)
        kept += [(term, step) for term, step in shared if term.size % step == 0]
    axis = family.groups[0].axis
    first = -(-family.minimum // family.multiple) * family.multiple
    return tuple(
        w
        for w in range(first, family.size + 1, family.multiple)
        if w == family.size or all(compute_size(t, {axis: w}) % step == 0 for t, step in kept)
    )


def keep_portable_families(analysis: Analysis, target: LegalWidths, named: Collection[str] = ()) -> LegalWidths:
    """Leave out of the default cut the families whose cut breaks a program, if that leaves any family.

    ``named``: families that the settings name, which are not left out.
    """
    cut = [name for name in choose_default_families(analysis.make_variables(), target) if name not in named]
    left = {name: f"cutting it breaks {target.breaks[name]}" for name in cut if name in target.breaks}
    return (
        replace(target, left=left)
        if keep_complete_families([n for n in cut if n not in left], target.together)
        else target
    )


def choose_default_families(variables: Variables, target: LegalWidths) -> list[str]:
    """What is cut by default: channels inside layers, if the target can express them; else all channels."""
    channels = [v for v in variables.values() if v.kind == "channels"]
    cut = [v for v in channels if len(target.ladders[v.name]) > 1 and v.name not in target.left]
    layered = keep_complete_families([v.name for v in cut if is_layered(v.family)], target.together)
    return layered or keep_complete_families([v.name for v in cut], target.together)


def drop_useless_widths(cost: CostModel, target: LegalWidths, families: Sequence[str]) -> LegalWidths:
    """Remove widths of ``families`` that save nothing over a wider one while all other families are uncut."""
    ladders = dict(target.ladders)
    joint: frozenset[str] = frozenset().union(*target.together)
    for name in families:
        kept: list[int] = []
        for width in reversed(ladders[name]):
            if name in joint or not kept or cost.share({name: width}) < cost.share({name: kept[-1]}):
                kept.append(width)
        ladders[name] = tuple(reversed(kept))
    return replace(target, ladders=ladders)


def find_candidates(cost: CostModel, target: LegalWidths, families: Sequence[str], sparsity: float) -> list[Candidate]:
    """Legal widths sorted by their distance to ``sparsity``, which is at most one step of the finest family.

    All combinations of the other families are enumerated. Each is completed by the finest family's two widths around
    the budget.
    """
    if not families:
        return []
    finest, rest = _split_finest(target, families)
    choices = [_reduce_ladder(ladder) for ladder in rest]
    while choices and math.prod(map(len, choices)) > COMBINATIONS:
        choices = [c[::2] if c[-1] in c[::2] else [*c[::2], c[-1]] for c in choices]
    found: dict[tuple[int, ...], Candidate] = {}
    for combination in itertools.product(*choices):
        widths = {name: width for chosen in combination for name, width in chosen.items()}
        for chosen in _find_nearest_choices(cost, widths, finest, sparsity):
            full = widths | chosen
            key = tuple(full[name] for name in families)
            if key not in found and target.accepts(full) is None:
                found[key] = Candidate(full, cost.compute_sparsity(full), _compute_unevenness(cost, full))
    return sorted(found.values(), key=lambda c: abs(c.sparsity - sparsity))


def find_finest_families(target: LegalWidths, families: Sequence[str]) -> list[str]:
    """The families with the most legal widths; they bring a combination of the others to the budget.

    One of ``families``, or several that can only be cut together.
    """
    return [*_split_finest(target, families)[0][-1]]


def _split_finest(target: LegalWidths, families: Sequence[str]) -> tuple[WidthChoices, list[WidthChoices]]:
    """The entry with the most choices, and the others."""
    found = list_width_choices(target.ladders, target.together, families)
    finest = max(range(len(found)), key=lambda i: len(found[i]))
    return found[finest], [ladder for i, ladder in enumerate(found) if i != finest]


def choose_candidates(
    candidates: Sequence[Candidate],
    sparsity: float,
    tolerance: float,
    finest: Collection[str],
    count: int | None = None,
    others: str = "name other --families, or use --target graph",
) -> list[Candidate]:
    """The candidates within ``tolerance`` of the budget, the most even first; else the nearest, if within ``NEAREST``.

    With a ``count``, each combination of the families other than ``finest`` occurs once, with the width nearest to the
    budget, and ``pick_candidates`` takes ``count`` of them. No candidate is dropped only for being uneven. ``others``:
    a further remedy in the error, beside the nearest widths.

    Raises:
        MptkError: no candidate is that near. The message names the nearest ones.
    """
    least = min((abs(c.sparsity - sparsity) for c in candidates), default=1.0)
    near = [c for c in candidates if abs(c.sparsity - sparsity) <= max(tolerance, least)]
    if least <= max(tolerance, NEAREST):
        kept = near if count is None else pick_candidates(_drop_repeats(near, finest), count)
        return sorted(kept, key=lambda c: c.unevenness)
    nearest = "; ".join(f"{c.sparsity:.3f} with {describe_widths(c.widths)}" for c in candidates[:3])
    raise BudgetError(
        f"no legal widths give sparsity {sparsity:.3f}; nearest: {nearest or 'none, nothing can be cut'}. "
        f"Ask for one of these; or {others}",
        name="sparsity",
        nearest=(c.sparsity for c in candidates[:3]),
    )


def _drop_repeats(candidates: Sequence[Candidate], finest: Collection[str]) -> list[Candidate]:
    """The first candidate of each combination of the families other than ``finest``."""
    found: dict[tuple[int, ...], Candidate] = {}
    for candidate in candidates:
        found.setdefault(tuple(width for name, width in candidate.widths.items() if name not in finest), candidate)
    return list(found.values())


def pick_candidates(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """At most ``count`` candidates, as different as possible.

    The most even one is taken first, then always the one whose widths, as shares of the widest, are farthest from all
    that are taken (Gonzalez 1985). So the extremes come early.
    """
    if len(candidates) <= count:
        return list(candidates)
    widths = np.array([list(c.widths.values()) for c in candidates], dtype=float)
    shares = widths / widths.max(0)
    taken = [min(range(len(candidates)), key=lambda i: candidates[i].unevenness)]
    distance = np.full(len(candidates), np.inf)
    while len(taken) < count:
        distance = np.minimum(distance, np.square(shares - shares[taken[-1]]).sum(1))
        taken.append(int(distance.argmax()))
    return [candidates[i] for i in taken]


def describe_widths(widths: Mapping[str, int]) -> str:
    """``heads=6, ffn.3-26=1024``: layers of one width together."""
    found: dict[tuple[str, int], list[int]] = {}
    for name, width in widths.items():
        family, layer = split_layer(name)
        found.setdefault((family, width), []).extend([int(layer)] if layer else [])
    return ", ".join(
        f"{name}{'.' if layers else ''}{encode_ranges(tuple(layers))}={width}"
        for (name, width), layers in found.items()
    )


def _find_nearest_choices(cost: CostModel, widths: Widths, finest: WidthChoices, sparsity: float) -> WidthChoices:
    """The two choices of ``finest`` around the budget, by bisection, since sparsity falls with width."""
    low, high = 0, len(finest) - 1
    if cost.compute_sparsity(widths | finest[low]) <= sparsity:
        return [finest[low]]
    while high - low > 1:
        middle = (low + high) // 2
        if cost.compute_sparsity(widths | finest[middle]) > sparsity:
            low = middle
        else:
            high = middle
    return [finest[low], finest[high]]


def _reduce_ladder(ladder: WidthChoices) -> WidthChoices:
    """At most ``LADDER_POINTS`` evenly spread choices, with the dense one."""
    if len(ladder) <= LADDER_POINTS:
        return ladder
    step = (len(ladder) - 1) / (LADDER_POINTS - 1)
    return [ladder[round(i * step)] for i in range(LADDER_POINTS)]


def _compute_unevenness(cost: CostModel, widths: Mapping[str, int]) -> float:
    """The largest minus the smallest kept share. Families with common weights (attention's) count as one share."""
    kept: dict[frozenset[str], float] = {}
    for name, width in widths.items():
        variable = cost.variables[name]
        weights = frozenset(m.weight for m in variable.groups[0].members) or frozenset((name,))
        same = next((k for k in kept if k & weights), weights)
        kept[same | weights] = kept.pop(same, 1.0) * width / variable.size
    return max(kept.values()) - min(kept.values())
