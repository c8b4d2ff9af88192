"""symbolic: the shapes of a stock class's weights, and the numbers its modules keep, as expressions of config fields.

The class is built on tensors without numbers from a config whose integers are symbols. No field is known by name.

*Implicit fields*: a field that is None, or that the constructor reads although the config lacks it, may stand for a
number derived from others (hidden // heads, 4 * hidden). A second build, with a symbol in each such place, tells.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mptk.compat.symbols import Number, Symbol, Symbols, compiled, expression, symbols_in, value_of
from mptk.compat.transformers import missing_attributes, without_generation
from mptk.errors import MptkError
from passes.targets.stock.attempt import Refusal, on_meta, quiet, refusal, unchecked

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
SizeSlot = tuple[str, int]
"""One dimension of one parameter; dimension -1 if the number of dimensions differs."""
Key = TypeVar("Key")
TRIAL_VALUE = 8
"""Of an implicit field, where Python needs a number."""


NO_SIZES = {*vars(GenerationConfig()), "auto_map", "gradient_checkpointing", "quantization_config"}
"""What transformers asks the config of any model for: no implicit sizes."""


@dataclass(frozen=True)
class Field:
    """An integer of the config.

    Attributes:
        path: its keys, outermost first.
        items: for a list, the positions with this value that change together.
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
Path = tuple[str, ...]
Place = tuple[Path, int | None]
"""A field, and the entry of its list if it is one."""


class Unread(Exception):
    """The class is built from its config, but not from symbols."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


@dataclass(frozen=True)
class Read:
    """One symbolic build.

    Attributes:
        dims: each dimension of each weight.
        numbers: the numbers of modules, and the sizes of buffers that are not saved.
        symbols: the symbol of each integer of the config.
        missing: what the class asked the config for although it has no such field.
    """

    dims: Mapping[SizeSlot, Number]
    numbers: Mapping[str, Number]
    symbols: Mapping[Place, Symbol]
    missing: frozenset[Path]


@dataclass(frozen=True)
class Sizes:
    """The shapes of the weights, and the numbers of modules, at some values of the fields."""

    shapes: Shapes
    numbers: Mapping[str, int | float]


class Reading:
    """A stock class read symbolically.

    Attributes:
        fields: the config's integers, implicit ones included. A list has a field for each value in it.
        pins: the implicit fields that stand for a number, with that number.
        dense: the sizes before the cut.
        builds: how often the class was built.

    Raises:
        MptkError: the class cannot be built from ``config``.
        Unread: it cannot be built from symbols.
    """

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
        self.model_class, self.template, self.builds = model_class, config, 0
        self._symbols, self._body = Symbols(), config.to_dict()
        self._integers: dict[Place, tuple[Symbol, int | torch.SymInt]] = {}
        self._values = dict(_places(self._body))
        self._places = [*self._values]
        first = self._first()
        self._place = dict(first.symbols)
        self._known = {symbol: self._values[place] for place, symbol in first.symbols.items()}
        self._dims, self._numbers = dict(first.dims), dict(first.numbers)
        self._defaults: dict[Field, tuple[Number, Number]] = {}
        implicit = [path for path in sorted(first.missing | self._empty()) if path[-1] not in NO_SIZES]
        for second in self._with(first, implicit):
            self._pin(first, second)
        self.pins = {pin: pin.value for pin in self._defaults}
        self.fields = [*_grouped(self._known, first.symbols), *self.pins]
        self._compiled = compiled([*self._dims.values(), *self._numbers.values()], [*self._known])
        self._unset = compiled([n for pair in self._defaults.values() for n in pair], [*self._known])
        self.dense = self.at({})
        del self._symbols, self._integers  # torch's record of all sizes

    def at(self, assignment: Assignment) -> Sizes:
        """What the class has with ``assignment``. Implicit fields that are not in it follow the others."""
        values = self._known | {s: value for field, value in assignment.items() for s in self._of(field)}
        if left := [pin for pin in self.pins if pin not in assignment]:
            found = self._unset(*values.values())
            for i, pin in enumerate(self.pins):
                if pin in left and found[2 * i + 1]:
                    values[self._place[pin.path, None]] = found[2 * i] * pin.value // found[2 * i + 1]
        numbers = self._compiled(*values.values())
        shapes: dict[str, Shape] = {}
        for (name, dimension), size in zip(self._dims, numbers, strict=False):
            shapes[name] = shapes.get(name, ()) + ((size,) if dimension >= 0 else ())
        return Sizes(shapes, dict(zip(self._numbers, numbers[len(self._dims) :], strict=True)))

    def moved(self, field: Field) -> frozenset[SizeSlot]:
        """The dimensions that depend on the field."""
        own = self._of(field)
        return frozenset(slot for slot, size in self._dims.items() if not own.isdisjoint(symbols_in(size)))

    def entries(self, field: Field) -> list[Field]:
        """A field for each entry of a list."""
        return [replace(field, items=(item,)) for item in field.items] or [field]

    def distinct(self, target: Shapes) -> dict[SizeSlot, int]:
        """A dimension of each expression → its size in ``target``; several if the target has several."""
        ranks = {name: len(shape) for name, shape in self.dense.shapes.items()}
        found: dict[tuple[object, int], SizeSlot] = {}
        for (name, dimension), size in self._dims.items():
            if len(target[name]) != ranks[name]:
                found[name, -1] = (name, -1)
            elif dimension >= 0:
                found.setdefault((size, target[name][dimension]), (name, dimension))
        return {slot: wanted for (_, wanted), slot in found.items()}

    def _of(self, field: Field) -> set[Symbol]:
        return {self._place[field.path, item] for item in (field.items or (None,))}

    # ---- reading ----

    def _first(self) -> Read:
        """The build with a symbol for each integer of the config, or for those with which the class can be built."""
        try:
            return self._read([])
        except Exception as error:  # a model class may raise anything
            built = on_meta(self.model_class, self.template)
            if isinstance(built, Refusal):
                raise MptkError(
                    f"{self.model_class.__name__} cannot be built from its own config ({built}); "
                    "repair the config, or choose a target that needs no stock class"
                ) from error
            every, self._places = self._places, []
            self._admit(every)
            if not self._places:
                raise Unread(refusal(error, self.model_class)) from error
            return self._read([])

    def _admit(self, places: Sequence[Place]) -> None:
        """Make symbols of the ``places`` with which the class can be built: all at once, or in halves."""
        before = self._places
        self._places = [*before, *places]
        try:
            self._read([])
        except Exception:  # noqa: BLE001 (a model class may raise anything)
            self._places = before
            for half in (places[: len(places) // 2], places[len(places) // 2 :]) if len(places) > 1 else ():
                self._admit(half)

    def _empty(self) -> set[Path]:
        """The fields that are None and may be an integer."""
        found = {path for path, value in _leaves(self._body) if value is None}
        for kind, prefix in _parts(self.template):
            if is_dataclass(kind):
                found -= {(*prefix, f.name) for f in fields(kind) if "int" not in str(f.type)}
        return found

    def _with(self, first: Read, paths: Sequence[Path]) -> Iterator[Read]:
        """Builds with symbols for the implicit fields at ``paths``: all at once, or in halves if the class differs."""
        if not paths:
            return
        try:
            second = self._read(paths)
        except Exception:  # noqa: BLE001 (a model class may raise anything)
            second = None
        if second is not None and second.dims.keys() == first.dims.keys():
            yield second
        elif len(paths) > 1:
            yield from self._with(first, paths[: len(paths) // 2])
            yield from self._with(first, paths[len(paths) // 2 :])

    def _read(self, implicit: Sequence[Path]) -> Read:
        self.builds += 1
        body = copy.deepcopy(self._body)
        symbols: dict[Place, Symbol] = {}
        missing: set[Path] = set()
        prefixes = dict(_parts(self.template))

        def record(part: PreTrainedConfig, name: str) -> None:
            if type(part) in prefixes and not name.startswith("_"):
                missing.add((*prefixes[type(part)], name))

        for place in self._places:
            symbols[place], integer = self._integer(place, self._values[place])
            put(body, place[0], () if place[1] is None else (place[1],), integer)
        with quiet(), no_init_weights(), without_generation(), self._symbols.building(self.model_class.__module__):
            config = unchecked(self.template, body)
            for path in implicit:
                symbols[path, None], integer = self._integer((path, None), TRIAL_VALUE)
                vars(functools.reduce(getattr, path[:-1], config))[path[-1]] = integer
            with missing_attributes(record):
                model = self.model_class(config)
        dims: dict[SizeSlot, Number] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            dims |= {(name, d): expression(size) for d, size in enumerate(tensor.shape)} or {(name, -1): 0}
        return Read(dims, _numbers(model, {name for name, _ in dims}), symbols, frozenset(missing))

    def _integer(self, place: Place, value: int) -> tuple[Symbol, int | torch.SymInt]:
        if place not in self._integers:
            self._integers[place] = self._symbols.integer("_".join((*place[0], str(place[1]))), value)
        return self._integers[place]

    def _pin(self, first: Read, second: Read) -> None:
        """Find what the implicit fields of the ``second`` build stand for, and take its expressions of them.

        A trial value t turns a size s into s·t/v, which gives v. v is right if it changes no size.
        """
        new = {symbol: path for (path, _), symbol in second.symbols.items() if symbol not in self._known}
        known, wrong = {**self._known}, set[Symbol]()
        for _ in new:
            for slot, size in second.dims.items():
                left = (symbols_in(size) & new.keys()) - known.keys()
                if len(left) != 1:
                    continue
                (symbol,) = left
                dense = value_of(first.dims[slot], known)
                value, rest = divmod(dense * TRIAL_VALUE, value_of(size, {**known, symbol: TRIAL_VALUE}) or dense * 9)
                known[symbol] = value
                if rest or value < 1:
                    wrong.add(symbol)
                else:
                    self._defaults[Field(new[symbol], value, implicit=True)] = first.dims[slot], size
        for slot, size in second.dims.items():
            if (own := symbols_in(size) & new.keys()) and value_of(size, known) != value_of(first.dims[slot], known):
                wrong |= own
        for pin in [pin for pin in self._defaults if second.symbols.get((pin.path, None)) in wrong]:
            del self._defaults[pin]
        pins = known.keys() - wrong
        self._place |= {place: symbol for place, symbol in second.symbols.items() if symbol in pins}
        self._known |= {symbol: value for symbol, value in known.items() if symbol in pins}
        _take(self._dims, second.dims, new.keys(), {s: v for s, v in known.items() if s in pins})
        _take(self._numbers, second.numbers, new.keys(), {s: v for s, v in known.items() if s in pins})


def differences(shapes: Shapes, target: Shapes) -> list[SizeSlot]:
    """The dimensions in which ``shapes`` and ``target`` differ, in the order of ``shapes``. Their names are equal."""
    found: list[SizeSlot] = []
    for name, shape in shapes.items():
        wanted = target.get(name, ())
        if len(shape) != len(wanted):
            found.append((name, -1))
        else:
            found += [(name, d) for d, (a, b) in enumerate(zip(shape, wanted, strict=True)) if a != b]
    return found


def starred(name: str) -> str:
    """A parameter's name with ``*`` for every index, so that it is the same in all layers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def sizes_of(model: nn.Module) -> Sizes:
    """The sizes of a model that was built from numbers."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return Sizes(shapes, _numbers(model, shapes))


def _numbers(model: nn.Module, saved: Container[str]) -> dict[str, Number]:
    """The numbers that modules keep, and the sizes of buffers that are not saved."""
    found = {
        f"{name}.{key}": expression(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, float, torch.SymInt, torch.SymFloat))
        and not isinstance(value, bool)
        and not key.startswith("_")
    }
    for name, buffer in model.named_buffers():
        if name not in saved:
            found |= {f"{name}[{d}]": expression(size) for d, size in enumerate(buffer.shape)}
    return found


def _take(
    mine: dict[Key, Number], theirs: Mapping[Key, Number], new: Collection[Symbol], values: Mapping[Symbol, int]
) -> None:
    """Replace numbers by those that have a ``new`` symbol and are equal at ``values``."""
    for key in mine.keys() & theirs.keys():
        own = symbols_in(theirs[key])
        known = not own.isdisjoint(new) and own <= values.keys()
        if known and math.isclose(value_of(theirs[key], values), value_of(mine[key], values)):
            mine[key] = theirs[key]


def _leaves(body: Mapping[str, object], prefix: Path = ()) -> Iterator[tuple[Path, object]]:
    """The values of a config's dictionary, and of those within it."""
    for key, value in body.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*prefix, str(key)))
        else:
            yield (*prefix, str(key)), value


def _places(body: Mapping[str, object]) -> Iterator[tuple[Place, int]]:
    """The positive integers, and those in lists."""
    for path, value in _leaves(body):
        for item, entry in enumerate(value) if isinstance(value, list) else ((None, value),):
            if type(entry) is int and entry > 0:
                yield (path, item), entry


def put(body: dict[str, Any], path: Path, items: Collection[int], value: object) -> None:
    """Set a field of a config's dictionary, or the ``items`` of a list."""
    *parents, leaf = path
    for key in parents:
        body = body[key]
    body[leaf] = [value if i in items else old for i, old in enumerate(body[leaf])] if items else value


def _parts(config: PreTrainedConfig, prefix: Path = ()) -> Iterator[tuple[type, Path]]:
    """The classes of a config and of those within it, with their paths; outer ones last."""
    for key, inner in vars(config).items():
        if isinstance(inner, PreTrainedConfig):
            yield from _parts(inner, (*prefix, key))
    yield type(config), prefix


def _grouped(values: Mapping[Symbol, int], symbols: Mapping[Place, Symbol]) -> list[Field]:
    """A field for each integer, and one for all equal ones of a list."""
    found: dict[tuple[Path, int], list[int]] = {}
    for (path, item), symbol in symbols.items():
        found.setdefault((path, values[symbol]), []).extend(() if item is None else (item,))
    return [Field(path, value, tuple(items)) for (path, value), items in found.items()]
