"""stock_config: the config with which a stock transformers class has exactly the shapes of a cut model.

Nothing here knows a model or a field by name: the config's integers are set to products of the cut's axis sizes, the
class is built on the meta device, and its shapes are compared. ``probe_config`` does so for one cut. ``Stock`` learns
from a few trial cuts which families a class can express and as which products, so that later it tells in about two
milliseconds whether the class accepts given widths.

Shapes alone do not prove equal logits. Numbers that a module derives (an attention scale, rotary tables) are compared
too, and ``check`` may compare logits; the verify pass has the last word.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from passes.targets.stock.probe import Assignment, Build, Field, Prober, Refusal, Shapes, starred
from passes.targets.stock.search import (
    ConfigSearch,
    Expression,
    Expressions,
    SizeSlot,
    differences,
    evaluate,
    implied,
    strange_constants,
)

__all__ = ["Refusal", "Stock", "StockConfig", "probe_config"]

Check = Callable[["StockConfig", Mapping[str, int]], float]
"""Largest absolute logit difference between the stock class with this config and the cut model of these widths."""


@dataclass(frozen=True)
class StockConfig:
    """A stock class and the config that gives it the cut model's shapes.

    ``changes``: field → (old, new); old is None for a field that the config had not spelled out; per-layer lists as
    whole lists. ``expressions``: field → the product (family names and fixed sizes) that it is.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    changes: Mapping[str, tuple[Any, Any]]
    expressions: Mapping[str, Expression] = field(default_factory=dict)


def probe_config(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    target_shapes: Shapes,
    widths: Mapping[str, tuple[int, int]],
    fixed: Sequence[int],
    *,
    scalars: Mapping[float, float] | None = None,
) -> StockConfig | Refusal:
    """Find the config with which ``model_class`` has exactly ``target_shapes``.

    Args:
        model_class: the stock class, e.g. ``type(model)``.
        config: its config before the cut (not changed).
        target_shapes: state-dict name → shape after the cut, tied names included.
        widths: family → (old, new) width, for every leaf axis that the cut touches.
        fixed: sizes of the other leaf axes; a field may be a product of up to three of all these sizes.
        scalars: old → new values of float fields (a norm's eps after a cut of its axis); every float field of the
            old value gets the new one.

    Returns:
        The config, with the fewest changes found, or the refusal.
    """
    prober = Prober(model_class, config)
    families = {name: old for name, (old, _) in widths.items()}
    new = {name: width for name, (_, width) in widths.items()}
    expressions = Expressions([*prober.fields], families, fixed)
    return _solve(prober, expressions, target_shapes, new, scalars or {})[0]


def _solve(
    prober: Prober,
    expressions: Expressions,
    target: Shapes,
    widths: Mapping[str, int],
    scalars: Mapping[float, float],
    *,
    shapes_only: bool = False,
) -> tuple[StockConfig | Refusal, dict[Field, int], ConfigSearch | None]:
    """ConfigSearch for the target; ``shapes_only`` accepts what a validator refuses (to learn expressions)."""
    if (refusal := _same_names(prober.full.shapes, target)) is not None:
        return refusal, {}, None
    if not _representative(prober, target):
        prober = prober.at_full_depth()
    search = ConfigSearch(prober, target, expressions.candidates(widths))
    found: list[tuple[StockConfig, dict[Field, int], dict[Field, int]]] = []

    def accept(assignment: dict[Field, int]) -> Refusal | None:
        solution = implied(prober, search, expressions, widths, assignment)
        if odd := strange_constants(prober, search, expressions, widths, solution):
            return Refusal("numeric", odd[0].split(" ")[0], f"not the same function: {odd[0]}")
        minimal = _minimise(prober, search.target, solution)
        result = _finish(prober, minimal, target, scalars, shapes_only=shapes_only)
        if isinstance(result, Refusal):
            return result
        found.append((result, minimal, solution))
        return None

    outcome = search.run(accept)
    if isinstance(outcome, Refusal):
        return outcome, {}, search
    result, minimal, solution = found[-1]
    learned = copy.copy(expressions)
    learned.alive = dict(expressions.alive)
    learned.observe(widths, solution)
    return replace(result, expressions=_shortest(learned, minimal)), solution, search


def _same_names(stock: Shapes, target: Shapes) -> Refusal | None:
    for name in [*stock, *target]:
        if name not in target:
            return Refusal("names", name, "the stock class has this weight, the cut model has not")
        if name not in stock:
            return Refusal("names", name, "the cut model has this weight, the stock class has not")
    return None


def _representative(prober: Prober, target: Shapes) -> bool:
    """Do the layers that remain in the lowered model show every (place, old shape, new shape) of the whole?"""
    old = prober.full.shapes
    kinds = {(starred(n), old[n], tuple(target[n])) for n in old}
    return kinds == {(starred(n), old[n], tuple(target[n])) for n in prober.base.shapes}


def _minimise(prober: Prober, target: Shapes, solution: dict[Field, int]) -> dict[Field, int]:
    """Leave out every change, and every pin, without which shapes and constants stay the same."""
    whole = prober.build(solution)
    assert isinstance(whole, Build)
    kept = dict(solution)
    for f in list(solution):
        fewer = {other: value for other, value in kept.items() if other != f}
        built = prober.build(fewer)
        if isinstance(built, Build) and built.shapes == target and built.constants == whole.constants:
            kept = fewer
    return kept


def _finish(
    prober: Prober,
    assignment: Assignment,
    target: Shapes,
    scalars: Mapping[float, float],
    *,
    shapes_only: bool = False,
) -> StockConfig | Refusal:
    """Build all layers with validation; the config must be accepted and every shape must be the target's."""
    built = prober.build(assignment, full=True)
    if isinstance(built, Refusal):
        return built
    if built.refused is not None and not shapes_only:
        return replace(built.refused, config=_with_scalars(built.config, scalars))
    if wrong := differences(built.shapes, target):
        name = wrong[0][0]
        return Refusal("shape", name, f"it would be {built.shapes[name]}, but the cut leaves {tuple(target[name])}")
    return StockConfig(
        prober.model_class,
        _with_scalars(built.config, scalars),
        _changes(prober, assignment) | _scalar_changes(built.config, scalars),
    )


def _changes(prober: Prober, assignment: Assignment) -> dict[str, tuple[Any, Any]]:
    changes: dict[str, tuple[Any, Any]] = {}
    for f, value in assignment.items():
        old: Any = None if f.implicit else f.value
        new: Any = value
        name = ".".join(f.path)
        if f.items:
            old = prober.lookup(f.path)
            current = changes[name][1] if name in changes else old
            new = [value if i in f.items else entry for i, entry in enumerate(current)]
        changes[name] = (old, new)
    return changes


def _floats(config: PreTrainedConfig, old: float) -> Iterable[tuple[PreTrainedConfig, str, str]]:
    """Every float attribute of ``config`` and its inner configs whose value is ``old``: owner, attribute, path."""
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from ((owner, name, f"{key}.{path}") for owner, name, path in _floats(value, old))
        elif isinstance(value, float) and value == old:
            yield config, key, key


def _with_scalars(config: PreTrainedConfig, scalars: Mapping[float, float]) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    found = [(owner, name, new) for old, new in scalars.items() for owner, name, _ in _floats(config, old)]
    for owner, name, new in found:
        setattr(owner, name, new)
    return config


def _scalar_changes(config: PreTrainedConfig, scalars: Mapping[float, float]) -> dict[str, tuple[Any, Any]]:
    return {path: (old, new) for old, new in scalars.items() for _, _, path in _floats(config, old)}


def _shortest(expressions: Expressions, assignment: Assignment) -> dict[str, Expression]:
    """The first (shortest) expression left for each field that is set."""
    return {f.name: expressions.alive[f][0] for f in assignment if expressions.alive.get(f)}


class Stock:
    """What a stock class can express of a model's families, learned by trial cuts.

    ``refusals``: family → why it cannot be cut alone in the stock class. ``together``: sets of families that the class
    can only cut together (one field serves them all), e.g. the heads of an encoder and of its decoder.
    ``expressions``: field → product, for every field that a family reaches.
    """

    def __init__(self, prober: Prober, expressions: Expressions, shapes: Callable[[Mapping[str, int]], Shapes]) -> None:
        self._prober, self._space, self._shapes = prober, expressions, shapes
        self.refusals: dict[str, Refusal] = {}
        self.together: list[frozenset[str]] = []
        self._failed: dict[str, ConfigSearch | None] = {}

    @staticmethod
    def discover(
        model: PreTrainedModel,
        families: Mapping[str, int],
        fixed: Sequence[int],
        shapes: Callable[[Mapping[str, int]], Shapes],
        *,
        check: Check | None = None,
        tolerance: float = 1e-4,
    ) -> Stock:
        """Learn, by trial cuts, which of ``families`` the class of ``model`` can express.

        Args:
            model: a transformers model, on any device (only its class and config are used).
            families: name → width before the cut.
            fixed: sizes of the leaf axes that belong to no family.
            shapes: widths (families that are not named keep theirs) → shapes of the cut model's state dict.
            check: optional proof for one legal cut of each family; above ``tolerance`` the family is refused.
        """
        prober = Prober(type(model), model.config)
        stock = Stock(prober, Expressions(prober.fields, families, fixed), shapes)
        for name in families:
            stock._learn(frozenset((name,)))
        for name in list(stock.refusals):
            stock._learn_together(name)
        if check is not None:
            stock._prove(check, tolerance)
        return stock

    @property
    def expressions(self) -> dict[str, tuple[Expression, ...]]:
        """Field → the products it may be (more than one: they must be equal), without the fields that stay fixed."""
        return {f.name: tuple(alive) for f, alive in self._fields().items()}

    def accepts(self, widths: Mapping[str, int]) -> Refusal | None:
        """None if the class's config can be constructed for ``widths``, else the refusal. No model is built.

        ``widths``: family → new width; families that are not named keep theirs.
        """
        assignment = self._assign(widths)
        if isinstance(assignment, Refusal):
            return assignment
        config = self._prober.configure(assignment)
        return config if isinstance(config, Refusal) else config[1]

    def ladder(
        self, family: str, widths: Iterable[int] | None = None, others: Mapping[str, int] | None = None
    ) -> list[int]:
        """The widths of ``family`` (of ``widths``; all by default) that are accepted while ``others`` are as given."""
        choices = range(1, self._space.families[family] + 1) if widths is None else widths
        return [w for w in choices if self.accepts({**(others or {}), family: w}) is None]

    def config(
        self, widths: Mapping[str, int], *, scalars: Mapping[float, float] | None = None
    ) -> StockConfig | Refusal:
        """The config for ``widths``, checked by building the class (all layers, on meta) and comparing every shape."""
        assignment = self._assign(widths)
        if isinstance(assignment, Refusal):
            return assignment
        built = self._prober.build(assignment)
        if isinstance(built, Refusal):
            return built
        needed = _minimise(self._prober, built.shapes, assignment)
        result = _finish(self._prober, needed, self._shapes(widths), scalars or {})
        if isinstance(result, Refusal):
            return result
        return replace(result, expressions=_shortest(self._space, needed))

    def _fields(self) -> dict[Field, list[Expression]]:
        return {
            f: alive
            for f, alive in self._space.alive.items()
            if alive and any(isinstance(leaf, str) for leaf in alive[0])
        }

    def _assign(self, widths: Mapping[str, int]) -> dict[Field, int] | Refusal:
        """Every field's value at ``widths``, pins included."""
        families = self._space.families
        cut = {name for name, width in widths.items() if width != families[name]}
        for name in sorted(cut):
            groups = [group for group in self.together if name in group]
            if name not in self.refusals or any(group <= cut for group in groups):
                continue
            if not groups:
                return self.refusals[name]
            others = " and ".join(sorted(groups[0] - cut))
            return Refusal("shared", name, f"the config can only express it cut together with {others}")
        assignment: dict[Field, int] = dict(self._prober.pins)
        for f, alive in self._fields().items():
            values = {evaluate(e, widths, families) for e in alive}
            if len(values) > 1:
                products = " and ".join("*".join(map(str, e)) for e in alive)
                return Refusal("shared", f.name, f"{products} are one number in the config and must be equal")
            assignment[f] = values.pop()
        return {f: v for f, v in assignment.items() if v != f.value or f.implicit}

    def _learn(self, group: frozenset[str]) -> bool:
        """Cut the families of ``group`` in proportion, to two trial widths; may the class express one of the cuts?

        If so, its fields' expressions are narrowed; if not, the refusal of a family on its own is kept.
        """
        failed: tuple[Refusal, ConfigSearch | None] | None = None
        learned = False
        for widths in _trial_widths({name: self._space.families[name] for name in sorted(group)}):
            target = self._shapes(widths)
            result, solution, search = _solve(self._prober, self._space, target, widths, {}, shapes_only=True)
            if isinstance(result, Refusal):
                failed = failed or (result, search)
            else:
                self._space.observe(widths, solution)
                learned = True
        if not learned and failed is not None and len(group) == 1:
            self.refusals[min(group)], self._failed[min(group)] = failed
        return learned

    def _learn_together(self, name: str) -> None:
        """Try ``name`` with each other refused family whose weights it shares or its fields shape; then with all."""
        if any(name in group for group in self.together):
            return
        search = self._failed[name]
        own, reach = self._touches(name), search.moved_by_dead_ends() if search is not None else frozenset()
        weights = {weight for weight, _ in own}
        touched = {other: self._touches(other) for other in self.refusals if other != name}
        tied = {n for n, places in touched.items() if places & reach or weights & {weight for weight, _ in places}}
        groups = [*({name, other} for other in sorted(tied)), {name, *(n for n in tied if touched[n] & reach)}]
        found = next((g for g in map(frozenset, groups) if len(g) > 1 and self._learn(g)), None)
        if found is not None:
            self.together.append(found)

    def _touches(self, name: str) -> set[SizeSlot]:
        trials = _trial_widths({name: self._space.families[name]})
        return set(differences(self._prober.full.shapes, self._shapes(trials[0]))) if trials else set()

    def _prove(self, check: Check, tolerance: float) -> None:
        for name, old in self._space.families.items():
            if name in self.refusals:
                continue
            legal = next((w for w in range(old - 1, 0, -1) if self.accepts({name: w}) is None), None)
            result = self.config({name: legal}) if legal else None
            if legal is not None and isinstance(result, StockConfig):
                difference = check(result, {name: legal})
                if not difference <= tolerance:
                    self.refusals[name] = Refusal(
                        "numeric", name, f"logits differ by {difference:.2g} at width {legal}"
                    )


def _trial_widths(old: Mapping[str, int]) -> list[dict[str, int]]:
    """Up to two cuts of all these families by one ratio, near two thirds and near one half, with integer widths."""
    width = next(iter(old.values()))
    possible = [w for w in range(1, width) if all(other * w % width == 0 for other in old.values())]
    nearest = [min(possible, key=lambda w: abs(w / width - ratio)) for ratio in (2 / 3, 1 / 2) if possible]
    return [{name: other * w // width for name, other in old.items()} for w in dict.fromkeys(nearest)]
