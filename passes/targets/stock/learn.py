"""learn: which families of a model a stock transformers class can express.

The class is read once as expressions of its config's fields (``symbolic.py``). What these have in common with the cut
model's sizes says how the fields follow the families' widths (``equations.py``). One build of a trial cut of all
families together confirms it: a forward pass must run, and norms must take their epsilon from the config. After that,
``Stock`` answers in a few milliseconds whether the class accepts given widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

from transformers import PreTrainedModel

from passes.targets.stock.attempt import Forward, Refusal, find_forward_failure
from passes.targets.stock.config import (
    StockConfig,
    assign_fields,
    build_meta_model,
    find_misfit,
    finish_config,
    with_scalars,
)
from passes.targets.stock.depth import Built, build, find_kind_pattern, shorten_config
from passes.targets.stock.equations import CutShapes, Law, WidthProducts, find_growth, is_width
from passes.targets.stock.symbolic import Field, Reading, Sizes, Unread, collect_model_sizes, replace_indices
from passes.targets.width_choices import Widths

NEGLIGIBLE = 5e-6
"""An epsilon that moves a norm of usual activations by less than a tenth of what the proof allows."""
OTHER_EPSILON = 1.37
"""By what norms' epsilons are multiplied in a trial, to see whether they come from the config. An odd number, so that
the product is not an epsilon that a class has built in."""


class Stock:
    """What a stock class can express of a model's families.

    Attributes:
        dense: the config before the cut.
        refusals: family → why the stock class cannot cut it by itself.
        together: sets of families that the class can only cut together because they share a field, e.g. the heads of
            an encoder and of its decoder.
        derived: as given.

    Args:
        model: a transformers model on any device. Only its class and config are used.
        families: name → width before the cut.
        fixed: sizes of the leaf axes that belong to no family.
        shapes: the shapes of a cut.
        derived: family that no cut may change, whatever the shapes say → why. None is cut together with others.
        norms: family → weight → the epsilon of its norm, which a cut changes.
        forward: what must run with the class after a cut, if it runs before: a number that no weight shows (the size of
            a recurrence's heads) may be wrong though all shapes fit.

    Raises:
        MptkError: the class cannot be built from the model's config.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        families: Mapping[str, int],
        fixed: Sequence[int],
        shapes: CutShapes,
        *,
        derived: Mapping[str, str] = MappingProxyType({}),
        norms: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
        forward: Forward | None = None,
    ) -> None:
        self._class, self.dense = type(model), model.config
        self._families, self._shapes = dict(families), shapes
        self.derived, self._norms, self._forward = derived, norms, forward
        self.refusals: dict[str, Refusal] = {}
        self.together: list[frozenset[str]] = []
        self._law: Law | None = None
        if families:
            self._learn(fixed)

    def check_widths(self, widths: Mapping[str, int]) -> Refusal | None:
        """None if the class's config can be constructed for ``widths``, else the refusal. No model is built.

        ``widths``: family → new width; missing families keep theirs.
        """
        assignment = self._assign(widths)
        config = assignment if isinstance(assignment, Refusal) else assign_fields(self.dense, assignment)
        if isinstance(config, Refusal):
            return config
        # If the class rounds sizes (to a multiple of 64, say), the equations do not tell them all: compare the sizes.
        rounds = self._law is not None and self._law.reading.rounds
        return config[1] or (self._find_refusal(self._cut(widths)) if rounds else None)

    def build_config(
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
        if self._law is not None:
            assignment = self._law.reading.drop_implicit(assignment)
        result = finish_config(self._class, self.dense, assignment, self._shapes(widths), scalars or {})
        return result if isinstance(result, Refusal) else shorten_config(result, kept)

    def find_depth_config(self, kept: Mapping[str, Sequence[int]]) -> StockConfig | Refusal:
        """The config for all widths and the ``kept`` blocks, as in ``build_config``."""
        return shorten_config(self._whole, kept, self._built)

    def find_pattern(self, module: str, width: int) -> tuple[list[object], list[object]] | None:
        """``find_kind_pattern``: the kinds of a list's blocks, and the class's kinds if it has ``width`` blocks."""
        return find_kind_pattern(self._whole, module, width)

    @property
    def _whole(self) -> StockConfig:
        return StockConfig(self._class, self.dense, {})

    @cached_property
    def _built(self) -> Built | None:
        built = build(self._class, self.dense)
        return built if isinstance(built, Built) else None

    def _assign(self, widths: Mapping[str, int]) -> dict[Field, int] | Refusal:
        """The fields that ``widths`` change, and all implicit ones."""
        cut = self._cut(widths)
        for name in sorted(cut.keys() & self.refusals.keys()):
            # A family of a group is refused by itself, but not if the whole group is cut.
            groups = [group for group in self.together if name in group]
            if not groups:
                return self.refusals[name]
            if not any(group <= cut.keys() for group in groups):
                others = " and ".join(sorted(groups[0] - cut.keys()))
                return Refusal("shared", name, f"the config can only express it cut together with {others}")
        return {} if self._law is None else self._law.find_fields(cut)

    def _cut(self, widths: Mapping[str, int]) -> Widths:
        """The widths that change."""
        return {name: width for name, width in widths.items() if width != self._families.get(name, width)}

    def _learn(self, fixed: Sequence[int]) -> None:
        """Ask the class's equations which families can be cut, and let a build confirm a trial cut of each."""
        # 1. Read the class. If it cannot be read, or is not the model's, no family can be cut.
        try:
            reading = Reading(self._class, self.dense)
        except Unread as error:
            self.refusals = dict.fromkeys(self._families, error.refusal)
            return
        if (wrong := find_misfit(reading.dense.shapes, self._shapes({}))) is not None:
            self.refusals = dict.fromkeys(self._families, wrong)
            return
        # 2. Try each family by itself, then the refused ones together with what shares their fields.
        grown = find_growth(reading.dense.shapes, self._families, self._shapes)
        self._law = Law(reading, WidthProducts(self._families, fixed), grown, self.derived)
        trials = dict[frozenset[str], list[Widths]]()
        for name in self._families:
            self._try(frozenset((name,)), trials)
        for name in [name for name in self.refusals if name not in self.derived]:
            if not any(name in group for group in self.together):
                self._join(name, trials)
        # 3. Build it.
        self._confirm(trials)

    def _try(self, group: frozenset[str], trials: dict[frozenset[str], list[Widths]]) -> Refusal | None:
        """Cut the families of ``group`` in proportion. Returns why the class can express none of the ``trials``."""
        cuts = {
            widths: self._find_refusal(dict(widths)) for widths in choose_trial_widths(self._families, sorted(group))
        }
        fitting = [dict(widths) for widths, why in cuts.items() if why is None]
        if fitting:
            trials[group] = fitting
            return None
        # The last trial is the deepest cut. A group's families have their refusals already.
        refused = next(reversed(cuts.values()), None)
        refused = refused or Refusal("shape", min(group), "no common ratio gives whole numbers")
        if len(group) == 1:
            self.refusals[min(group)] = refused
        return refused

    def _find_refusal(self, widths: Widths) -> Refusal | None:
        """Why the class has no config for a cut."""
        assert self._law is not None
        assignment = self._law.find_fields(widths)
        if isinstance(assignment, Refusal):
            # Does the class have the shapes but compute another function? That is the better reason.
            other = self._law.free.find_fields(widths)
            why = (
                None
                if isinstance(other, Refusal)
                else self._find_difference(self._law.reading.find_sizes(other), widths)
            )
            return why or assignment
        return self._find_difference(self._law.reading.find_sizes(assignment), widths)

    def _find_difference(self, sizes: Sizes, widths: Widths) -> Refusal | None:
        assert self._law is not None
        wrong = find_misfit(sizes.shapes, self._shapes(widths))
        return wrong or self._law.products.find_unexplained(self._law.reading.dense, sizes, widths)

    def _join(self, name: str, trials: dict[frozenset[str], list[Widths]]) -> None:
        """Find the families with which a refused one can be cut in proportion."""
        assert self._law is not None
        # Without the fixed families and the modules' numbers there may be a group, which names what is in the way.
        group = self._law.group(name)
        if group is None:
            group = self._law.free.group(name, [*self.derived]) or frozenset()
        if fixed := sorted(group & self.derived.keys()):
            what = f"it can only be cut together with {fixed[0]}, which must stay: {self.derived[fixed[0]]}"
            self.refusals[name] = Refusal("numeric", name, what)
        elif len(group) > 1:
            why = self._try(group, trials)
            if why is None:
                self.together.append(group)
            elif why.kind == "numeric":
                self.refusals[name] = why

    def _confirm(self, trials: Mapping[frozenset[str], list[Widths]]) -> None:
        """Build the class with all trial cuts in as few builds as hold them; if one is not as expected, with each."""
        left = dict(trials)
        while left:
            # Groups without a common family fit into one build, which is what takes time here.
            packed: dict[frozenset[str], Widths] = {}
            for group, cuts in left.items():
                if not group & frozenset().union(*packed):
                    packed[group] = cuts[0]
            # If the packed cuts fail, each group is built by itself. One of its two trials may fail by chance. Both, or
            # a number that stays at the width that is cut, refuse the group.
            if self._find_contradiction({n: w for cut in packed.values() for n, w in cut.items()}) is not None:
                for group in packed:
                    wrong = [why for cut in trials[group] if (why := self._find_contradiction(cut)) is not None]
                    if wrong and (len(wrong) == len(trials[group]) or self._has_stale_number(trials[group][0])):
                        self.together = [other for other in self.together if other != group]
                        self.refusals |= dict.fromkeys(group, wrong[0])
            left = {group: cuts for group, cuts in left.items() if group not in packed}

    def _has_stale_number(self, widths: Widths) -> bool:
        """Whether the class has a number equal to the width of a family that is cut, and it stays."""
        if self._law is None or isinstance(assignment := self._law.find_fields(widths), Refusal):
            return False
        dense, now = self._law.reading.dense.numbers, self._law.reading.find_sizes(assignment).numbers
        old = {self._families[name] for name in widths}
        return any(is_width(name, number) and number in old and now[name] == number for name, number in dense.items())

    def _find_contradiction(self, widths: Widths) -> Refusal | None:
        """What is wrong with the class built for ``widths``. Validators do not count: another class may lack them."""
        assignment = self._assign(widths)
        made = assignment if isinstance(assignment, Refusal) else assign_fields(self.dense, assignment)
        # Build it with other epsilons of the norms that the cut changes. Small ones do not matter.
        every = {weight: old for name in widths for weight, old in self._norms.get(name, {}).items()}
        norms = {weight: old for weight, old in every.items() if old > NEGLIGIBLE}
        other = {old: OTHER_EPSILON * old for old in norms.values()}
        model = made if isinstance(made, Refusal) else build_meta_model(self._class, with_scalars(made[0], other))
        if isinstance(model, Refusal):
            return model
        # A norm that still has the old epsilon does not read the config. Then compare the rest, with the old epsilons.
        sizes, before = collect_model_sizes(model), {new: old for old, new in other.items()}
        kept = {(name.rpartition(".")[0], number) for name, number in sizes.numbers.items()}
        for weight, old in norms.items():
            if (weight.rpartition(".")[0], old) in kept:
                where = replace_indices(weight)
                return Refusal("numeric", where, f"the class fixes its norm's epsilon at {old:g}, which a cut changes")
        numbers = {name: before.get(number, number) for name, number in sizes.numbers.items()}
        return self._find_difference(Sizes(sizes.shapes, numbers), widths) or self._find_failure(model)

    def _find_failure(self, model: PreTrainedModel) -> Refusal | None:
        """Why a forward pass of the cut class fails, if one of the dense class does not."""
        found = None if self._forward is None else find_forward_failure(self._forward, model)
        if found is not None and self._forward is not None:
            # A dense class that cannot run without numbers either says nothing: from now on, none is run.
            dense = build_meta_model(self._class, self.dense)
            if isinstance(dense, Refusal) or find_forward_failure(self._forward, dense) is not None:
                self._forward = found = None
        return found


def choose_trial_widths(families: Mapping[str, int], group: Sequence[str]) -> list[tuple[tuple[str, int], ...]]:
    """Up to two cuts of a group by one ratio, near two thirds and near one half, with integer widths."""
    old = {name: families[name] for name in group}
    width = old[group[0]]
    possible = [w for w in range(1, width) if all(other * w % width == 0 for other in old.values())]
    nearest = [min(possible, key=lambda w: abs(w / width - ratio)) for ratio in (2 / 3, 1 / 2) if possible]
    return [tuple((name, other * w // width) for name, other in old.items()) for w in dict.fromkeys(nearest)]
