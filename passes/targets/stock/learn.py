"""learn: learn from a few trial cuts which families of a model a stock transformers class can express.

After that, ``Stock`` answers in about two milliseconds whether the class accepts given widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from types import MappingProxyType

from transformers import PreTrainedConfig, PreTrainedModel

from passes.targets.stock.attempt import Refusal
from passes.targets.stock.config import StockConfig, Unsolved, finish, minimise, shortest, solve
from passes.targets.stock.depth import Built, build, pattern, shorten
from passes.targets.stock.partners import Owners, groups, moves
from passes.targets.stock.probe import Field, Prober, Shapes
from passes.targets.stock.search import Expression, Expressions, SizeSlot, differences, evaluate
from passes.targets.stock.stages import Touched, apart

MAX_BUILDS = 400
"""Models that are built to find families which the class can only cut together."""
CutShapes = Callable[[Mapping[str, int]], Shapes]
"""Widths (missing families keep theirs) → shapes of the cut model's state dict."""
Check = Callable[[StockConfig, Mapping[str, int]], float]
"""Largest absolute logit difference between the stock class with this config and the cut model of these widths."""


class Stock:
    """What a stock class can express of a model's families, learned by trial cuts.

    Attributes:
        refusals: family → why it cannot be cut alone in the stock class.
        together: sets of families that the class can only cut together because they share a field, e.g. the heads of
            an encoder and of its decoder.
    """

    def __init__(self, prober: Prober, expressions: Expressions, shapes: CutShapes, touched: Touched) -> None:
        self._prober, self._space, self._shapes, self._touched = prober, expressions, shapes, touched
        self.refusals: dict[str, Refusal] = {}
        self.together: list[frozenset[str]] = []
        self._failed: dict[str, Unsolved] = {}
        self._tried: dict[frozenset[str], Refusal | None] = {}

    @staticmethod
    def discover(
        model: PreTrainedModel,
        families: Mapping[str, int],
        fixed: Sequence[int],
        shapes: CutShapes,
        *,
        check: Check | None = None,
        tolerance: float = 1e-4,
        derived: Mapping[str, str] = MappingProxyType({}),
    ) -> Stock:
        """Learn, by trial cuts, which of ``families`` the class of ``model`` can express.

        Families that it cannot express alone are tried together with others, until ``MAX_BUILDS`` more models are
        built.

        Args:
            model: a transformers model on any device. Only its class and config are used.
            families: name → width before the cut.
            fixed: sizes of the leaf axes that belong to no family.
            shapes: the shapes of a cut.
            check: optional proof for one legal cut of each family. A family above ``tolerance`` is refused.
            derived: family that no cut may change, whatever the shapes say → why. None is cut together with others.
        """
        prober = Prober(type(model), model.config)
        touched = {name: _touched(prober, shapes, name, width) for name, width in families.items()}
        prober.fields = apart(prober, touched)
        stock = Stock(prober, Expressions(prober.fields, families, fixed), shapes, touched)
        for name in families:
            stock._learn(frozenset((name,)))
        stock._learn_groups(derived)
        limit = prober.builds + MAX_BUILDS
        for name in list(stock.refusals):
            if prober.builds < limit and name not in derived:
                stock._learn_together(name)
        if check is not None:
            stock._prove(check, tolerance)
        return stock

    @property
    def dense(self) -> PreTrainedConfig:
        """The config before the cut."""
        return self._prober.template

    @property
    def expressions(self) -> dict[str, tuple[Expression, ...]]:
        """Field → its possible products, for fields that depend on a family. Several products must be equal."""
        return {field.name: tuple(alive) for field, alive in self._fields().items()}

    def accepts(self, widths: Mapping[str, int]) -> Refusal | None:
        """None if the class's config can be constructed for ``widths``, else the refusal. No model is built.

        ``widths``: family → new width; missing families keep theirs.
        """
        assignment = self._assign(widths)
        if isinstance(assignment, Refusal):
            return assignment
        config = self._prober.configure(assignment)
        return config if isinstance(config, Refusal) else config[1]

    def ladder(
        self, family: str, widths: Iterable[int] | None = None, others: Mapping[str, int] | None = None
    ) -> list[int]:
        """The accepted widths of ``family`` among ``widths`` (None: all), with other families at ``others``."""
        choices = range(1, self._space.families[family] + 1) if widths is None else widths
        return [w for w in choices if self.accepts({**(others or {}), family: w}) is None]

    def config(
        self,
        widths: Mapping[str, int],
        *,
        scalars: Mapping[float, float] | None = None,
        kept: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> StockConfig | Refusal:
        """The config for ``widths``. Checked: the class is built (all layers, on meta) and every shape compared.

        ``kept``: path of a list of blocks → the numbers of those that stay; lists without an entry stay whole.
        """
        assignment = self._assign(widths)
        if isinstance(assignment, Refusal):
            return assignment
        built = self._prober.build(assignment)
        if isinstance(built, Refusal):
            return built
        needed = minimise(self._prober, built.shapes, assignment)
        result = finish(self._prober, needed, self._shapes(widths), scalars or {})
        if isinstance(result, Refusal):
            return result
        return shorten(replace(result, expressions=shortest(self._space, needed)), kept)

    def shorter(self, kept: Mapping[str, Sequence[int]]) -> StockConfig | Refusal:
        """The config for all widths and the ``kept`` blocks, as in ``config``."""
        return shorten(self._whole, kept, self._built)

    def pattern(self, module: str, width: int) -> tuple[list[object], list[object]] | None:
        """The kinds of a list's blocks, and those that the class has with ``width`` blocks (``depth.pattern``)."""
        return pattern(self._whole, module, width)

    @property
    def _whole(self) -> StockConfig:
        return StockConfig(self._prober.model_class, self._prober.template, {})

    @cached_property
    def _built(self) -> Built | None:
        built = build(self._prober.model_class, self._prober.template)
        return built if isinstance(built, Built) else None

    def _fields(self) -> dict[Field, list[Expression]]:
        return {
            field: alive
            for field, alive in self._space.alive.items()
            if alive and any(isinstance(leaf, str) for leaf in alive[0])
        }

    def _assign(self, widths: Mapping[str, int]) -> dict[Field, int] | Refusal:
        """Every field's value at ``widths``, pins included."""
        families = self._space.families
        cut = {name for name, width in widths.items() if name in families and width != families[name]}
        for name in sorted(cut):
            groups = [group for group in self.together if name in group]
            if name not in self.refusals or any(group <= cut for group in groups):
                continue
            if not groups:
                return self.refusals[name]
            others = " and ".join(sorted(groups[0] - cut))
            return Refusal("shared", name, f"the config can only express it cut together with {others}")
        assignment: dict[Field, int] = dict(self._prober.pins)
        for field, alive in self._fields().items():
            values = {evaluate(e, widths, families) for e in alive}
            if len(values) > 1:
                products = " and ".join("*".join(map(str, e)) for e in alive)
                return Refusal("shared", field.name, f"{products} are one number in the config and must be equal")
            assignment[field] = values.pop()
        return {field: v for field, v in assignment.items() if v != field.value or field.implicit}

    def _learn(self, group: frozenset[str]) -> Refusal | None:
        """Cut the families of ``group`` in proportion, to two trial widths. Returns why the class can express neither.

        If it can express one, its fields' expressions are narrowed. If not, and the group is one family, the refusal is
        kept.
        """
        trials = _trial_widths({name: self._space.families[name] for name in sorted(group)})
        found = [self._try(widths) for widths in trials]
        failed = [result for result in found if result is not None]
        if not found:
            return Refusal("shape", min(group), "no common ratio gives whole numbers")
        if len(failed) < len(found):
            return None
        if len(group) == 1:
            self._failed[min(group)] = failed[0]
            self.refusals[min(group)] = failed[0].refusal
        return failed[0].refusal

    def _try(self, widths: Mapping[str, int]) -> Unsolved | None:
        """Search a config for a trial cut and learn from it. Returns None, or the failed search."""
        result = solve(self._prober, self._space, self._shapes(widths), widths, shapes_only=True)
        if isinstance(result, Unsolved):
            return result
        self._space.observe(widths, result.assignment)
        return None

    def _learn_groups(self, derived: Mapping[str, str]) -> None:
        """Try the families that a field moves together (``partners.py``), or say which of them must stay."""
        refused = [name for name in self.refusals if name not in derived]
        if not refused:
            return
        owners = Owners({n: self._touched[n] for n in refused}, {n: self._touched[n] for n in derived}, derived)
        moved = moves(self._prober)
        limit = self._prober.builds + MAX_BUILDS
        for name in refused:
            for group in groups(name, owners, moved):
                known = any(name in other for other in self.together)
                if known or group == frozenset((name,)) or self._prober.builds > limit:
                    break
                why = group if isinstance(group, Refusal) else self._join(group)
                if why is not None and why.kind == "numeric":
                    self.refusals[name] = why

    def _join(self, group: frozenset[str]) -> Refusal | None:
        """``_learn`` a group, once, and keep it in ``together`` if the class can express it."""
        if group not in self._tried:
            self._tried[group] = self._learn(group)
            if self._tried[group] is None:
                self.together.append(group)
        return self._tried[group]

    def _learn_together(self, name: str) -> None:
        """Try to cut a refused family together with others, unless it already is in such a group."""
        if any(name in group for group in self.together):
            return
        for group in self._partners(name):
            if self._join(group) is None:
                return

    def _partners(self, name: str) -> list[frozenset[str]]:
        """Groups in which the class may be able to express a refused family.

        1. The family with one other refused family that shares a weight with it, or whose sizes its fields move.
        2. The family with all refused families whose sizes its fields move.
        """
        search = self._failed[name].search
        moved = search.moved_by_dead_ends() if search is not None else frozenset()
        own = {weight for weight, _ in self._touched[name]}
        touched = {other: self._touched[other] for other in self.refusals if other != name}
        shaped = {other for other, places in touched.items() if places & moved}
        sharing = {other for other, places in touched.items() if own & {weight for weight, _ in places}}
        pairs = [frozenset((name, other)) for other in sorted(shaped | sharing)]
        return [*pairs, frozenset((name, *shaped))] if shaped else pairs

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


def _touched(prober: Prober, shapes: CutShapes, name: str, width: int) -> frozenset[SizeSlot]:
    """The dimensions of weights that a cut of the family changes."""
    trials = _trial_widths({name: width})
    return frozenset(differences(prober.full.shapes, shapes(trials[0]))) if trials else frozenset()


def _trial_widths(old: Mapping[str, int]) -> list[dict[str, int]]:
    """Up to two cuts of all families by one ratio, near two thirds and near one half, with integer widths."""
    width = next(iter(old.values()))
    possible = [w for w in range(1, width) if all(other * w % width == 0 for other in old.values())]
    nearest = [min(possible, key=lambda w: abs(w / width - ratio)) for ratio in (2 / 3, 1 / 2) if possible]
    return [{name: other * w // width for name, other in old.items()} for w in dict.fromkeys(nearest)]
