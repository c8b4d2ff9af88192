"""config: the config with which a stock transformers class has exactly the shapes of a cut model.

``equations.py`` finds its numbers. Equal shapes do not prove equal logits: the class is built once from the config, and
the numbers that it derives (an attention scale, rotary tables) are compared, too; the proof compares logits
(``passes/verify.py``).
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from passes.targets.stock.attempt import Refusal, build_config, build_on_meta, list_weight_shapes
from passes.targets.stock.equations import Grown, Law, WidthProducts
from passes.targets.stock.symbolic import Assignment, Field, Reading, Unread, WeightShapes


@dataclass(frozen=True)
class StockConfig:
    """A stock class and the config that gives it the cut model's shapes.

    Attributes:
        changes: field → (old, new). Old is None for an implicit field; a per-layer list is one whole value.
    """

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    changes: Mapping[str, tuple[object, object]]

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
    target_shapes: WeightShapes,
    grown: Grown,
    widths: Mapping[str, tuple[int, int]],
    fixed: Sequence[int],
) -> StockConfig | Refusal:
    """Find the config with which ``model_class`` has exactly ``target_shapes``.

    Args:
        model_class: the stock class, e.g. ``type(model)``.
        config: its config before the cut; not changed.
        target_shapes: state-dict name → shape after the cut, tied names included.
        grown: the dimensions that the cut changes, with the families that they grow with.
        widths: family → (old, new) width, for every leaf axis that the cut touches.
        fixed: sizes of the other leaf axes. A field may be a product of up to three of all these sizes.
    """
    # Read the class, then solve for its fields.
    try:
        reading = Reading(model_class, config)
    except Unread as error:
        return error.refusal
    if (wrong := find_misfit(reading.dense.shapes, target_shapes, sizes=False)) is not None:
        return wrong
    grows = [name for name, (before, after) in widths.items() if after > before]
    products = WidthProducts({name: before for name, (before, _) in widths.items()}, fixed, grows)
    new = {name: after for name, (_, after) in widths.items()}
    assignment = Law(reading, products, grown, ()).find_fields(new)
    if isinstance(assignment, Refusal):
        return assignment
    # Compare the sizes and numbers that the reading predicts. Only then is the class built.
    cut = reading.find_sizes(assignment)
    refused = find_misfit(cut.shapes, target_shapes) or products.find_unexplained(reading.dense, cut, new)
    return refused or finish_config(model_class, config, reading.drop_implicit(assignment), target_shapes)


def build_meta_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel | Refusal:
    """The class on the meta device, with weights that are not initialised: even there that is a third of the work."""
    with no_init_weights():
        return build_on_meta(model_class, config)


def find_misfit(shapes: WeightShapes, target: WeightShapes, *, sizes: bool = True) -> Refusal | None:
    """The first weight of the class that has another shape than ``target``, or that only one of them has.

    ``sizes``: whether to compare these, too, or only names and numbers of dimensions.
    """
    for name in [*shapes, *target]:
        have, want = shapes.get(name), target.get(name)
        if have is None or want is None:
            return Refusal("names", name, f"only the {'cut model' if have is None else 'stock class'} has this weight")
        if have != tuple(want) and (sizes or len(have) != len(want)):
            return Refusal("shape", name, f"it would be {have}, but the cut leaves {tuple(want)}")
    return None


def finish_config(
    model_class: type[PreTrainedModel],
    template: PreTrainedConfig,
    assignment: Assignment,
    target: WeightShapes,
    scalars: Mapping[float, float] = MappingProxyType({}),
) -> StockConfig | Refusal:
    """Build the class with validation. Refuse a config that is not accepted or has another shape than the target.

    ``scalars``: old → new value of float fields (a norm's eps after a cut of its axis). Every float field with the old
    value gets the new one.
    """
    made = assign_fields(template, assignment)
    if isinstance(made, Refusal):
        return made
    config, refused = made
    # The model is built before the validators' refusal counts. ``rehome.py`` starts from the refused config, so it must
    # be one from which the class can be built.
    model = build_meta_model(model_class, config)
    if isinstance(model, Refusal):
        return model
    if refused is not None:
        return replace(refused, config=with_scalars(config, scalars))
    if (wrong := find_misfit(list_weight_shapes(model), target)) is not None:
        return wrong
    changes = _list_changes(template, assignment)
    changes |= {path: (old, new) for old, new in scalars.items() for _, _, path in _find_floats(config, old)}
    return StockConfig(model_class, with_scalars(config, scalars), changes)


def assign_fields(
    template: PreTrainedConfig, assignment: Assignment
) -> tuple[PreTrainedConfig, Refusal | None] | Refusal:
    """The config with the fields of ``assignment``, as ``build_config`` gives it."""
    body = template.to_dict()
    for key, value in assignment.items():
        key.put(body, value)
    return build_config(template, body)


def _list_changes(template: PreTrainedConfig, assignment: Assignment) -> dict[str, tuple[object, object]]:
    before, after = template.to_dict(), template.to_dict()
    for key, value in assignment.items():
        key.put(after, value)

    def get_value(body: dict[str, Any], key: Field) -> object:
        return functools.reduce(operator.getitem, key.path, body)

    return {
        ".".join(key.path): (None if key.implicit else get_value(before, key), get_value(after, key))
        for key in assignment
    }


def _find_floats(config: PreTrainedConfig, old: float) -> Iterable[tuple[PreTrainedConfig, str, str]]:
    """Every float attribute of ``config`` and its inner configs whose value is ``old``: owner, attribute, path."""
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from ((owner, name, f"{key}.{path}") for owner, name, path in _find_floats(value, old))
        elif isinstance(value, float) and value == old:
            yield config, key, key


def with_scalars(config: PreTrainedConfig, scalars: Mapping[float, float]) -> PreTrainedConfig:
    """A copy of ``config`` in which every float field with an old value of ``scalars`` has the new one."""
    config = copy.deepcopy(config)
    found = [(owner, name, new) for old, new in scalars.items() for owner, name, _ in _find_floats(config, old)]
    for owner, name, new in found:
        setattr(owner, name, new)
    return config
