"""learn: which families of a model a stock transformers class can express.

The class is read once as expressions of its config's fields (``symbolic.py``), and trial cuts are solved from these
(``discovery.py``). One build of all trials together confirms what was found. After that, ``Stock`` answers in about two
milliseconds whether the class accepts given widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

from transformers import PreTrainedModel

from passes.targets.stock.attempt import Refusal
from passes.targets.stock.config import StockConfig, assigned, contradicted, finished, misfit
from passes.targets.stock.depth import Built, build, pattern, shorten
from passes.targets.stock.discovery import CutShapes, Discovery, Widths
from passes.targets.stock.solve import Expression, Search, evaluate, minimised
from passes.targets.stock.symbolic import Field, Reading, Unread

Check = Callable[[StockConfig, Mapping[str, int]], float]
"""Largest absolute logit difference between the stock class with this config and the cut model of these widths."""


class Stock:
    """What a stock class can express of a model's families.

    Attributes:
        dense: the config before the cut.
        refusals: family → why it cannot be cut alone in the stock class.
        together: sets of families that the class can only cut together because they share a field, e.g. the heads of
            an encoder and of its decoder.
        builds: how often the class was built to learn it.
    """

    def __init__(self, model: PreTrainedModel, families: Mapping[str, int], shapes: CutShapes) -> None:
        self._class, self.dense = type(model), model.config
        self._families, self._shapes, self.builds = families, shapes, 0
        self.refusals: dict[str, Refusal] = {}
        self.together: list[frozenset[str]] = []
        self._found: Discovery | None = None

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
        """Learn which of ``families`` the class of ``model`` can express, alone or together with others.

        Args:
            model: a transformers model on any device. Only its class and config are used.
            families: name → width before the cut.
            fixed: sizes of the leaf axes that belong to no family.
            shapes: the shapes of a cut.
            check: optional proof for one legal cut of each family. A family above ``tolerance`` is refused.
            derived: family that no cut may change, whatever the shapes say → why. None is cut together with others.

        Raises:
            MptkError: the class cannot be built from the model's config.
        """
        stock = Stock(model, dict(families), shapes)
        if families:
            stock._learn(fixed, derived)
        if check is not None:
            stock._prove(check, tolerance)
        return stock

    @property
    def expressions(self) -> dict[str, tuple[Expression, ...]]:
        """Field → its possible products, for fields that depend on a family. Several products must be equal."""
        return {field.name: tuple(alive) for field, alive in self._fields.items()}

    def accepts(self, widths: Mapping[str, int]) -> Refusal | None:
        """None if the class's config can be constructed for ``widths``, else the refusal. No model is built.

        ``widths``: family → new width; missing families keep theirs.
        """
        assignment = self._assign(widths)
        config = assignment if isinstance(assignment, Refusal) else assigned(self.dense, assignment)
        return config if isinstance(config, Refusal) else config[1]

    def ladder(
        self, family: str, widths: Iterable[int] | None = None, others: Mapping[str, int] | None = None
    ) -> list[int]:
        """The accepted widths of ``family`` among ``widths`` (None: all), with other families at ``others``."""
        choices = range(1, self._families[family] + 1) if widths is None else widths
        return [w for w in choices if self.accepts({**(others or {}), family: w}) is None]

    def config(
        self,
        widths: Mapping[str, int],
        *,
        scalars: Mapping[float, float] | None = None,
        kept: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> StockConfig | Refusal:
        """The config for ``widths``. Checked: the class is built (on meta) and every shape compared.

        ``kept``: path of a list of blocks → the numbers of those that stay; lists without an entry stay whole.
        """
        assignment = self._assign(widths)
        if isinstance(assignment, Refusal):
            return assignment
        needed, named = assignment, dict[str, Expression]()
        if self._found is not None:
            needed = minimised(self._found.reading, assignment)
            named = self._found.space.shortest(needed)
        result = finished(self._class, self.dense, needed, self._shapes(widths), scalars or {}, named)
        return result if isinstance(result, Refusal) else shorten(result, kept)

    def shorter(self, kept: Mapping[str, Sequence[int]]) -> StockConfig | Refusal:
        """The config for all widths and the ``kept`` blocks, as in ``config``."""
        return shorten(self._whole, kept, self._built)

    def pattern(self, module: str, width: int) -> tuple[list[object], list[object]] | None:
        """The kinds of a list's blocks, and those that the class has with ``width`` blocks (``depth.pattern``)."""
        return pattern(self._whole, module, width)

    @property
    def _whole(self) -> StockConfig:
        return StockConfig(self._class, self.dense, {})

    @cached_property
    def _built(self) -> Built | None:
        built = build(self._class, self.dense)
        return built if isinstance(built, Built) else None

    @property
    def _fields(self) -> dict[Field, list[Expression]]:
        alive = {} if self._found is None else self._found.space.alive
        return {f: each for f, each in alive.items() if each and any(isinstance(leaf, str) for leaf in each[0])}

    def _assign(self, widths: Mapping[str, int]) -> dict[Field, int] | Refusal:
        """Every field's value at ``widths``, pins included."""
        families = self._families
        cut = {name for name, width in widths.items() if name in families and width != families[name]}
        for name in sorted(cut):
            groups = [group for group in self.together if name in group]
            if name not in self.refusals or any(group <= cut for group in groups):
                continue
            if not groups:
                return self.refusals[name]
            others = " and ".join(sorted(groups[0] - cut))
            return Refusal("shared", name, f"the config can only express it cut together with {others}")
        assignment: dict[Field, int] = {} if self._found is None else dict(self._found.reading.pins)
        for field, alive in self._fields.items():
            values = {evaluate(e, widths, families) for e in alive}
            if len(values) > 1:
                products = " and ".join("*".join(map(str, e)) for e in alive)
                return Refusal("shared", field.name, f"{products} are one number in the config and must be equal")
            assignment[field] = values.pop()
        return {field: v for field, v in assignment.items() if v != field.value or field.implicit}

    def _learn(self, fixed: Sequence[int], derived: Mapping[str, str]) -> None:
        """Solve trial cuts. If a build contradicts what was found, solve them again and build each solution."""
        try:
            reading = Reading(self._class, self.dense)
        except Unread as error:
            self.refusals = dict.fromkeys(self._families, error.refusal)
            return
        if (wrong := misfit(reading.dense.shapes, self._shapes({}))) is not None:
            self.refusals = dict.fromkeys(self._families, wrong)
        for real in () if wrong else (False, True):
            self._found = Discovery(reading, self._families, fixed, self._shapes, derived, real)
            self._found.run()
            self.refusals, self.together = self._found.refusals, self._found.together
            if real or self._confirmed(self._found):
                break
        self.builds = reading.builds

    def _confirmed(self, found: Discovery) -> bool:
        """Whether the class is what was found, in as few builds as hold all trial cuts."""
        left = found.solved
        while left:
            together: Widths = {}
            for trial in left:
                if not together.keys() & trial.keys() and not isinstance(self._assign(together | trial), Refusal):
                    together |= trial
            left = [trial for trial in left if trial.keys() - together.keys()]
            assignment = self._assign(together)
            if isinstance(assignment, Refusal):
                return False
            search = Search(found.reading, found.space, self._shapes(together), together)
            if contradicted(search, assignment) is not None:
                return False
        return True

    def _prove(self, check: Check, tolerance: float) -> None:
        for name, old in self._families.items():
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
