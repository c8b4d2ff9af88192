"""config: find the config with which a stock transformers class has exactly the shapes of a cut model.

The search knows no model and no field by name. It sets the config's integers to products of the cut's axis sizes,
builds the class on the meta device, and compares shapes. ``probe_config`` does this for one cut; ``learn.py`` learns
which cuts a class can express at all.

Equal shapes do not prove equal logits. The search also compares numbers that a module derives (an attention scale,
rotary tables), and the proof compares logits (``passes/verify.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from passes.targets.stock.attempt import Refusal
from passes.targets.stock.probe import Assignment, Build, Field, Prober, Shapes, starred
from passes.targets.stock.search import (
    ConfigSearch,
    Expression,
    Expressions,
    differences,
    implied,
    strange_constants,
)


@dataclass(frozen=True)
class StockConfig:
    """A stock class and the config that gives it the cut model's shapes.

    Attributes:
        changes: field → (old, new). Old is None for an implicit field; a per-layer list is one whole value.
        expressions: field → its value as a product of family names and fixed sizes.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    changes: Mapping[str, tuple[object, object]]
    expressions: Mapping[str, Expression] = field(default_factory=dict)

    def build(self, weights: Mapping[str, Tensor], *, shared: bool = False) -> PreTrainedModel:
        """The model, float32, in evaluation mode.

        Args:
            weights: its state dict. If empty, the parameters are memory that was never written.
            shared: whether the model may use the tensors of ``weights`` themselves.
        """
        with no_init_weights():
            model: PreTrainedModel = self.model_class(self.config).eval()
        if weights:
            model.load_state_dict(weights, assign=shared)
        model.tie_weights()
        return model


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
        config: its config before the cut; not changed.
        target_shapes: state-dict name → shape after the cut, tied names included.
        widths: family → (old, new) width, for every leaf axis that the cut touches.
        fixed: sizes of the other leaf axes. A field may be a product of up to three of all these sizes.
        scalars: old → new value of float fields (a norm's eps after a cut of its axis). Every float field with the old
            value gets the new one.

    Returns:
        The config with the fewest changes found, or the refusal.
    """
    prober = Prober(model_class, config)
    families = {name: old for name, (old, _) in widths.items()}
    new = {name: width for name, (_, width) in widths.items()}
    grows = [name for name, (old, width) in widths.items() if width > old]
    expressions = Expressions(prober.fields, families, fixed, grows)
    found = solve(prober, expressions, target_shapes, new, scalars=scalars or {})
    return found.refusal if isinstance(found, Unsolved) else found.stock


@dataclass(frozen=True)
class Solved:
    """A config for a target, and all field values that the target's widths determine, pins included."""

    stock: StockConfig
    assignment: Assignment


@dataclass(frozen=True)
class Unsolved:
    """Why there is no config for a target, and the search that found none (None if there was nothing to search)."""

    refusal: Refusal
    search: ConfigSearch | None


def solve(
    prober: Prober,
    expressions: Expressions,
    target: Shapes,
    widths: Mapping[str, int],
    *,
    scalars: Mapping[float, float] = MappingProxyType({}),
    shapes_only: bool = False,
) -> Solved | Unsolved:
    """Search a config for ``target``.

    The result is the first assignment that has the target's shapes, whose numbers the widths explain, and with which
    the class can be built. ``shapes_only`` also accepts configs that a validator refuses, to learn expressions.
    """
    if (refusal := _same_names(prober.full.shapes, target)) is not None:
        return Unsolved(refusal, None)
    if not _representative(prober, target):
        prober = prober.at_full_depth()
    search = ConfigSearch(prober, target, expressions.candidates(widths))
    refusal = None
    for assignment in search.matches():
        solution = implied(search, expressions, widths, assignment)
        if odd := strange_constants(search, expressions, widths, solution):
            refusal = refusal or Refusal("numeric", odd[0].split(" ")[0], f"not the same function: {odd[0]}")
            continue
        minimal = minimise(prober, search.target, solution)
        result = finish(prober, minimal, target, scalars, shapes_only=shapes_only)
        if not isinstance(result, Refusal):
            named = shortest(expressions.observed(widths, solution), minimal)
            return Solved(replace(result, expressions=named), solution)
        refusal = refusal or result
    return Unsolved(refusal or search.reason(), search)


def _same_names(stock: Shapes, target: Shapes) -> Refusal | None:
    for name in [*stock, *target]:
        if name not in target:
            return Refusal("names", name, "the stock class has this weight, the cut model does not")
        if name not in stock:
            return Refusal("names", name, "the cut model has this weight, the stock class does not")
    return None


def _representative(prober: Prober, target: Shapes) -> bool:
    """Whether the model with few layers has every (place, old shape, new shape) of the whole model."""
    old = prober.full.shapes
    kinds = {(starred(n), old[n], tuple(target[n])) for n in old}
    return kinds == {(starred(n), old[n], tuple(target[n])) for n in prober.base.shapes}


def minimise(prober: Prober, target: Shapes, solution: Assignment) -> dict[Field, int]:
    """Drop every change and every pin that shapes and constants do not need."""
    whole = prober.build(solution)
    assert isinstance(whole, Build)
    kept = dict(solution)
    for key in list(solution):
        fewer = {other: value for other, value in kept.items() if other != key}
        built = prober.build(fewer)
        if isinstance(built, Build) and built.shapes == target and built.constants == whole.constants:
            kept = fewer
    return kept


def finish(
    prober: Prober,
    assignment: Assignment,
    target: Shapes,
    scalars: Mapping[float, float],
    *,
    shapes_only: bool = False,
) -> StockConfig | Refusal:
    """Build all layers with validation. Refuse a config that is not accepted or has another shape than the target."""
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


def _changes(prober: Prober, assignment: Assignment) -> dict[str, tuple[object, object]]:
    changes: dict[str, tuple[object, object]] = {}
    for key, value in assignment.items():
        name = ".".join(key.path)
        if key.items:
            old = prober.lookup(key.path)
            current = changes[name][1] if name in changes else old
            assert isinstance(current, list)
            changes[name] = (old, [value if i in key.items else entry for i, entry in enumerate(current)])
        else:
            changes[name] = (None if key.implicit else key.value, value)
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


def _scalar_changes(config: PreTrainedConfig, scalars: Mapping[float, float]) -> dict[str, tuple[object, object]]:
    return {path: (old, new) for old, new in scalars.items() for _, _, path in _floats(config, old)}


def shortest(expressions: Expressions, assignment: Assignment) -> dict[str, Expression]:
    """The shortest remaining expression of each field that is set."""
    return {key.name: expressions.alive[key][0] for key in assignment if expressions.alive.get(key)}
