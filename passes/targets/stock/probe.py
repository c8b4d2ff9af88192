"""probe: build a stock transformers class from a config on the meta device, and read its shapes and constants.

A ``Prober`` takes one model class and one config and answers "which shapes does the class have with these fields?". It
knows no field by name. It finds two things by trial that a constructor hides:

1. *Implicit fields*: a field that is None, or that the constructor reads (``getattr``) although the config lacks it,
   may stand for a number derived from others (hidden // heads, 4 * hidden). Such a number is *pinned*: it is written
   into the config, so that it stays when the other fields change.
2. *Depth fields*: a field that only repeats layers is lowered for probes, as far as every kind of layer remains. A
   probe of an 80-layer model then costs as much as a probe of one layer.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeGuard

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mptk.compat.transformers import missing_attributes
from mptk.errors import MptkError
from passes.targets.stock.attempt import Refusal, configured, on_meta

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16)
TRIAL_VALUES = (8, 6)
"""Two trial values of an implicit field. The first may be the number for which it already stands."""


@dataclass(frozen=True)
class Field:
    """An integer of the config.

    Attributes:
        path: its keys, outermost first.
        items: for a per-layer list, the positions with this value. They change together.
        implicit: the config itself has None or nothing here, and ``value`` is the number it stands for.
    """

    path: tuple[str, ...]
    value: int
    items: tuple[int, ...] = ()
    implicit: bool = False

    @property
    def name(self) -> str:
        """``text_config.num_heads``, or ``ffn_sizes[0,2]`` for positions 0 and 2 of a list."""
        return ".".join(self.path) + (f"[{','.join(map(str, self.items))}]" if self.items else "")


Assignment = Mapping[Field, int]


@dataclass(frozen=True)
class Build:
    """A model built on meta.

    Attributes:
        shapes: of its state dict.
        constants: other values derived from the config: every number that a module keeps (``head_dim``, ``scaling``),
            and the shape of every buffer that is not saved (rotary tables).
        config: its config.
        refused: the refusal of the config's validators, or None.
        lists: the lengths of its module lists.
    """

    shapes: Shapes
    constants: Mapping[str, int | float | Shape]
    config: PreTrainedConfig
    refused: Refusal | None
    lists: frozenset[int]


class Prober:
    """Builds ``model_class`` from variations of ``config``.

    ``fields`` are the config's integers, implicit ones included. ``base`` is the unchanged model with few layers.

    Raises:
        MptkError: the class cannot be built from ``config`` itself.
    """

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
        self.model_class = model_class
        self.template = config
        self.body = config.to_dict()
        self.depth: dict[Field, int] = {}
        self._cache: dict[frozenset[tuple[Field, int]], Build | Refusal] = {}
        with _recorded_misses(config) as missing:
            full = self.build({}, full=True)
        if isinstance(full, Refusal):
            raise MptkError(
                f"{model_class.__name__} cannot be built from its own config ({full}); "
                "repair the config, or choose a target that needs no stock class"
            )
        self.full = full
        explicit, empty = _integers(self.body)
        self._lower_depth(explicit)
        self.base = self._known({})
        paths = sorted(empty | {path for path in missing if not path[-1].startswith("_")})
        pins = [pin for path in paths if (pin := self._pin(path)) is not None]
        self.pins: dict[Field, int] = {pin: pin.value for pin in pins}
        self.fields = [f for f in [*explicit, *pins] if f not in self.depth]

    def build(self, assignment: Assignment, *, full: bool = False) -> Build | Refusal:
        """Build with ``assignment``. Validators do not stop it; their refusal is in ``Build.refused``.

        ``full=False`` builds the lowered depth and caches the result.
        """
        depth = {} if full else self.depth
        key = frozenset(assignment.items())
        if full or key not in self._cache:
            config = self.configure(assignment, depth)
            built = config if isinstance(config, Refusal) else self._instantiate(*config)
            if full:
                return built
            self._cache[key] = built
        return self._cache[key]

    def configure(
        self, assignment: Assignment, depth: Assignment = MappingProxyType({})
    ) -> tuple[PreTrainedConfig, Refusal | None] | Refusal:
        """The config with ``assignment``, as ``configured`` gives it."""
        body = copy.deepcopy(self.body)
        for target, value in [*depth.items(), *assignment.items()]:
            _set(body, target, value)
        for target, value in depth.items():
            _truncate(body, target.value, value)
        return configured(self.template, body)

    @property
    def builds(self) -> int:
        """The number of different models built so far (with few layers)."""
        return len(self._cache)

    def at_full_depth(self) -> Prober:
        """The same prober with all layers, for a cut that treats layers of one kind differently."""
        whole = copy.copy(self)
        whole.depth, whole._cache, whole.base = {}, {}, self.full
        return whole

    def lookup(self, path: tuple[str, ...]) -> object:
        """The value at ``path`` in the unchanged config."""
        value: object = self.body
        for key in path:
            assert isinstance(value, dict)
            value = value[key]
        return value

    def _instantiate(self, config: PreTrainedConfig, refused: Refusal | None) -> Build | Refusal:
        with no_init_weights():  # which even on meta is a third of the work
            model = on_meta(self.model_class, config)
        if isinstance(model, Refusal):
            return model
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        lists = frozenset(len(m) for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)))
        return Build(shapes, _constants(model, shapes), config, refused, lists)

    def _known(self, assignment: Assignment) -> Build:
        built = self.build(assignment)
        assert isinstance(built, Build), built
        return built

    def _lower_depth(self, explicit: list[Field]) -> None:
        """Lower every field that only repeats layers, as far as each kind of layer remains."""
        for candidate in explicit:
            if candidate.items or candidate.value not in self.full.lists or candidate.value < 3:
                continue
            current = self._known({}).shapes if self.depth else self.full.shapes
            kept = dict(self.depth)
            for layers in (k for k in DEPTHS if k < candidate.value):
                self.depth = {**kept, candidate: layers}
                self._cache.clear()
                built = self.build({})
                if isinstance(built, Build) and built.shapes.items() < current.items():
                    if _kinds(built.shapes) != _kinds(current):
                        continue
                    kept = self.depth
                break
            self.depth = kept
            self._cache.clear()

    def _pin(self, path: tuple[str, ...]) -> Field | None:
        """The implicit field at ``path`` with the number v it stands for; None if no shape depends on it.

        A trial value t turns a size s into s·t/v, which gives v. v is right if the field set to v changes no shape.
        """
        for trial in TRIAL_VALUES:
            built = self.build({Field(path, trial, implicit=True): trial})
            if isinstance(built, Refusal) or built.shapes.keys() != self.base.shapes.keys():
                continue
            sizes = [
                (old, new)
                for name, shape in self.base.shapes.items()
                for old, new in zip(shape, built.shapes[name], strict=False)
                if old != new
            ]
            if not sizes:
                continue
            value, remainder = divmod(sizes[0][0] * trial, sizes[0][1])
            pin = Field(path, value, implicit=True)
            if not remainder and value > 0:
                pinned = self.build({pin: value})
                if isinstance(pinned, Build) and pinned.shapes == self.base.shapes:
                    return pin
        return None


def starred(name: str) -> str:
    """A parameter's name with ``*`` for every index, so that it is the same in all layers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _kinds(shapes: Shapes) -> set[tuple[str, Shape]]:
    return {(starred(name), shape) for name, shape in shapes.items()}


def _integers(body: Mapping[str, object], prefix: tuple[str, ...] = ()) -> tuple[list[Field], set[tuple[str, ...]]]:
    """The positive integers in a config's dictionary, and the paths of all None."""
    fields: list[Field] = []
    empty: set[tuple[str, ...]] = set()
    for key, value in body.items():
        path = (*prefix, str(key))
        if value is None:
            empty.add(path)
        elif isinstance(value, dict):
            inner, none = _integers(value, path)
            fields += inner
            empty |= none
        elif isinstance(value, list):
            numbers = sorted({v for v in value if _is_size(v)})
            fields += [Field(path, n, tuple(i for i, v in enumerate(value) if v == n and _is_size(v))) for n in numbers]
        elif _is_size(value):
            fields.append(Field(path, value))
    return fields, empty


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _set(body: dict[str, object], target: Field, value: int) -> None:
    *parents, leaf = target.path
    for key in parents:
        inner = body[key]
        assert isinstance(inner, dict)
        body = inner
    if target.items:
        entries = body[leaf]
        assert isinstance(entries, list)
        body[leaf] = [value if i in target.items else old for i, old in enumerate(entries)]
    else:
        body[leaf] = value


def _truncate(body: dict[str, object], length: int, to: int) -> None:
    """Shorten every list of ``length`` entries (per-layer lists) to the lowered depth ``to``."""
    for key, value in body.items():
        if isinstance(value, dict):
            _truncate(value, length, to)
        elif isinstance(value, list) and len(value) == length:
            body[key] = value[:to]


def _constants(model: nn.Module, saved: Shapes) -> dict[str, int | float | Shape]:
    numbers: dict[str, int | float | Shape] = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not key.startswith("_")
    }
    tables = {name: tuple(b.shape) for name, b in model.named_buffers() if name not in saved}
    return numbers | tables


@contextlib.contextmanager
def _recorded_misses(config: PreTrainedConfig) -> Iterator[set[tuple[str, ...]]]:
    """Collects the paths of attributes that are read from ``config`` or its parts but do not exist."""
    missing: set[tuple[str, ...]] = set()
    prefixes = {type(c): path for path, c in reversed(list(_parts(config)))}

    def record(part: PreTrainedConfig, name: str) -> None:
        if type(part) in prefixes:
            missing.add((*prefixes[type(part)], name))

    with missing_attributes(record):
        yield missing


def _parts(
    config: PreTrainedConfig, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig]]:
    yield prefix, config
    for key, inner in vars(config).items():
        if isinstance(inner, PreTrainedConfig):
            yield from _parts(inner, (*prefix, key))
