"""symbolic: the shapes of a stock class's weights, and the numbers its modules keep, as expressions of config fields.

The class is built on tensors without numbers from a config whose integers are symbols. No field is known by name.

*Implicit fields*: a field that is None, or that the constructor reads although the config lacks it, may stand for a
number derived from others (hidden // heads, 4 * hidden). A second build, with a symbol in each such place, tells.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mptk.compat.symbols import (
    Symbol,
    SymbolicNumber,
    Symbols,
    compute_exponents,
    compute_value,
    evaluate_numbers,
    find_symbols,
    to_expression,
)
from mptk.compat.transformers import watch_missing_attributes, without_generation
from mptk.errors import ModelError
from passes.targets.stock.attempt import Refusal, build_on_meta, build_unchecked_config, hide_warnings, make_refusal

WeightShapes = Mapping[str, tuple[int, ...]]
"""Name in the state dict → shape. All may be expressions."""
SizeSlot = tuple[str, int]
"""One dimension of one parameter."""
TRIAL_VALUE = 8
"""Of an implicit field, for a constructor that needs a number of it before it is known."""
ASKED = "auto_map decoder generator gradient_checkpointing layer_types quantization_config text_config text_encoder"
NO_SIZES = {*vars(GenerationConfig()), *ASKED.split()}
"""What transformers asks the config of any model for: no implicit sizes."""


@dataclass(frozen=True)
class Field:
    """An integer of the config.

    Attributes:
        path: its keys, outermost first.
        item: its place in a list, or None.
        implicit: the config itself has None or nothing here, and ``value`` is the number it stands for.
    """

    path: tuple[str, ...]
    value: int
    item: int | None = None
    implicit: bool = False

    @property
    def name(self) -> str:
        """``text_config.num_heads``, or ``ffn_sizes[2]``."""
        return ".".join(self.path) + ("" if self.item is None else f"[{self.item}]")

    def put(self, body: dict[str, Any], value: object) -> None:
        """Set the field in a config's dictionary."""
        *parents, leaf = self.path
        for key in parents:
            body = body[key]
        whole = None if self.item is None else body[leaf]
        body[leaf] = value if whole is None else [value if i == self.item else old for i, old in enumerate(whole)]


Assignment = Mapping[Field, int]


class Unread(Exception):
    """The class is built from its config, but not from symbols."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


@dataclass(frozen=True)
class Sizes:
    """The shapes of the weights, and the numbers of modules and sizes of unsaved buffers. All may be expressions."""

    shapes: WeightShapes
    numbers: Mapping[str, SymbolicNumber]


class Reading:
    """A stock class read symbolically.

    Attributes:
        fields: the config's integers; a list has one for each entry.
        pins: the implicit fields that stand for a number.
        dense: the sizes before the cut.
        rounds: whether some size is more than sums and products of fields.

    Raises:
        MptkError: the class cannot be built from ``config``.
        Unread: it cannot be built from symbols.
    """

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
        self.model_class, self.template = model_class, config
        # The first build has symbols for the integers that the config has. It records which fields the class missed.
        self._missing, self._symbols = set[tuple[str, ...]](), Symbols()
        self._refused: Refusal | None = None
        self._integers: dict[Field, tuple[Symbol, int | torch.SymInt]] = {}
        self._body = config.to_dict()
        self.fields, first = self._find_buildable([], [*_list_integers(self._body)])
        if first is None or not self.fields:
            raise self._make_unread_error()
        # The second one has symbols in the places of missing fields, too, as far as the class can be built with them.
        places = sorted(path for path in self._missing | self._find_unset_fields() if path[-1] not in NO_SIZES)
        implicit = [Field(path, TRIAL_VALUE, implicit=True) for path in places]
        admitted, second = self._find_buildable(self.fields, implicit, first)
        # What the two builds have in common says what those fields stand for.
        self._of = {field: self._integers[field][0] for field in self.fields}
        self._sizes, self._defaults = first, dict[Field, tuple[SymbolicNumber, SymbolicNumber]]()
        if second is not None:
            self._pin(first, second, admitted[len(self.fields) :])
        self.pins = [*self._defaults]
        self.dense = self.find_sizes({})
        sizes: set[SymbolicNumber] = {
            size for shape in self._sizes.shapes.values() for size in shape if find_symbols(size)
        }
        self.rounds = not all(size.is_polynomial() for size in sizes)
        del self._symbols, self._integers  # torch's record of all sizes

    def find_sizes(self, assignment: Assignment) -> Sizes:
        """What the class has with ``assignment`` if all implicit fields are set."""
        values = iter(evaluate_numbers([size for _, size in self._list_numbers()], self._assign_symbols(assignment)))
        shapes = {name: tuple(itertools.islice(values, len(shape))) for name, shape in self._sizes.shapes.items()}
        return Sizes(shapes, dict(zip(self._sizes.numbers, values, strict=True)))

    def drop_implicit(self, assignment: Assignment) -> dict[Field, int]:
        """An assignment without the implicit fields that the class makes of the others anyhow."""
        values = self._assign_symbols(assignment)
        follows = {pin: len({*evaluate_numbers(pair, values)}) == 1 for pin, pair in self._defaults.items()}
        return {field: value for field, value in assignment.items() if not follows.get(field)}

    def list_exponents(self) -> Iterator[tuple[SizeSlot | str, dict[Field, Fraction]]]:
        """Each dimension and number with the exponents of the fields that it grows with: a product's are whole."""
        # Layers repeat their expressions.
        owners = {symbol: field for field, symbol in self._of.items()}
        known = functools.cache(functools.partial(compute_exponents, values=self._assign_symbols({})))
        for place, number in self._list_numbers():
            yield place, {owners[symbol]: power for symbol, power in known(number).items()}

    def _list_numbers(self) -> Iterator[tuple[SizeSlot | str, SymbolicNumber]]:
        for name, shape in self._sizes.shapes.items():
            yield from (((name, dimension), size) for dimension, size in enumerate(shape))
        yield from self._sizes.numbers.items()

    def _assign_symbols(self, assignment: Assignment) -> dict[Symbol, int]:
        return {symbol: assignment.get(field, field.value) for field, symbol in self._of.items()}

    # ---- reading ----

    def _find_buildable(
        self, kept: list[Field], more: Sequence[Field], like: Sizes | None = None
    ) -> tuple[list[Field], Sizes | None]:
        """``kept`` and those of ``more`` with which the class can be built, with the names of ``like``; the last build.

        All are tried at once, or, if that fails, in halves: mostly all or all but a few can be symbols.
        """
        try:
            read = self._read([*kept, *more]) if more else None
            if read is None or like is None or read.shapes.keys() == like.shapes.keys():
                return [*kept, *more], read
        except Exception as error:  # noqa: BLE001 (a model class may raise anything)
            self._refused = self._refused or make_refusal(error, self.model_class)
        if len(more) == 1:
            return kept, None
        kept, first = self._find_buildable(kept, more[: len(more) // 2], like)
        kept, second = self._find_buildable(kept, more[len(more) // 2 :], like)
        return kept, second or first

    def _make_unread_error(self) -> Exception:
        built = build_on_meta(self.model_class, self.template)
        if isinstance(built, Refusal):
            return ModelError(
                f"{self.model_class.__name__} cannot be built from its own config ({built}); "
                "repair the config, or choose a target that needs no stock class",
                name=self.model_class.__name__,
            )
        none = Refusal("shape", self.model_class.__name__, "its config has no integers")
        return Unread(self._refused or none)

    def _find_unset_fields(self) -> set[tuple[str, ...]]:
        """The fields that are None and may be an integer."""
        # A config class that declares its fields' types rules most of them out.
        found = {path for path, value in _list_leaves(self._body) if value is None}
        for kind, prefix in _list_config_classes(self.template):
            if is_dataclass(kind):
                found -= {(*prefix, f.name) for f in fields(kind) if "int" not in str(f.type)}
        return found

    def _read(self, wanted: Sequence[Field]) -> Sizes:
        body, prefixes = copy.deepcopy(self._body), dict(_list_config_classes(self.template))

        def record(part: PreTrainedConfig, name: str) -> None:
            if type(part) in prefixes and not name.startswith("_"):
                self._missing.add((*prefixes[type(part)], name))

        # A field keeps its symbol from build to build, so that their expressions can be compared.
        for field in wanted:
            if field not in self._integers:
                self._integers[field] = self._symbols.integer(field.name, field.value)
            if not field.implicit:
                field.put(body, self._integers[field][1])
        with (
            hide_warnings(),
            no_init_weights(),
            without_generation(),
            self._symbols.build_symbolically(self.model_class.__module__),
        ):
            # Implicit fields are set after the config's constructor, which need not know them.
            config = build_unchecked_config(self.template, body)
            for field in wanted:
                if field.implicit:
                    owner = functools.reduce(getattr, field.path[:-1], config)
                    vars(owner)[field.path[-1]] = self._integers[field][1]
            with watch_missing_attributes(record):
                return collect_model_sizes(self.model_class(config))

    def _pin(self, first: Sizes, second: Sizes, implicit: Sequence[Field]) -> None:
        """Find what the ``implicit`` fields of the ``second`` build stand for, and take its expressions of them.

        A trial value t turns a size s into s·t/v, which gives v. v is right if it changes no size.
        """
        # The sizes that differ: an expression of the first build, and one of the second with an implicit field.
        new = {self._integers[field][0]: field for field in implicit}
        known = {symbol: field.value for field, symbol in self._of.items()}
        both = (pair for n, shape in first.shapes.items() for pair in zip(shape, second.shapes[n], strict=False))
        pairs = dict.fromkeys(pair for pair in both if find_symbols(pair[1]) & new.keys())
        found, wrong = dict[Symbol, tuple[SymbolicNumber, SymbolicNumber]](), set[Symbol]()
        # Each round finds the fields that are the only unknown of some size. There are no more rounds than fields.
        for _ in new:
            for before, after in pairs:
                left = (find_symbols(after) & new.keys()) - known.keys()
                if len(left) == 1:
                    (symbol,) = left
                    dense = compute_value(before, known)
                    trial = compute_value(after, {**known, symbol: TRIAL_VALUE})
                    # A trial size of 0 tells nothing: with dense · 9 the value is 0, and so it is wrong.
                    known[symbol], rest = divmod(dense * TRIAL_VALUE, trial or dense * 9)
                    found[symbol] = before, after
                    wrong |= {symbol} if rest or known[symbol] < 1 else set()
        # A field with which any size of the class would be another one than before is wrong.
        for before, after in pairs:
            if compute_value(after, known) != compute_value(before, known):
                wrong |= find_symbols(after) & new.keys()
        right = found.keys() - wrong
        for symbol in (symbol for symbol in found if symbol in right):
            pin = replace(new[symbol], value=known[symbol])
            self._of[pin], self._defaults[pin] = symbol, found[symbol]

        def take_size(mine: SymbolicNumber, theirs: SymbolicNumber) -> SymbolicNumber:
            own = find_symbols(theirs) & new.keys()
            same = own and own <= right and math.isclose(compute_value(theirs, known), compute_value(mine, known))
            return theirs if same else mine

        # Take the second build's expressions of right fields, and the first's of everything else.
        self._sizes = Sizes(
            {n: tuple(map(take_size, shape, second.shapes[n])) for n, shape in first.shapes.items()},
            {n: take_size(number, second.numbers.get(n)) for n, number in first.numbers.items()},
        )


def replace_indices(name: str) -> str:
    """A parameter's name with ``*`` for every index, so that it is the same in all layers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def collect_model_sizes(model: nn.Module) -> Sizes:
    """The sizes of a model that was built from numbers or from symbols."""
    # A bool is an int to Python, but not a size. Unsaved buffers, such as rotary tables, have sizes, too.
    shapes = {name: tuple(map(to_expression, tensor.shape)) for name, tensor in model.state_dict().items()}
    numbers = {
        f"{name}.{key}": to_expression(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, float, torch.SymInt, torch.SymFloat))
        and not isinstance(value, bool)
        and not key.startswith("_")
    }
    buffers = ((name, buffer.shape) for name, buffer in model.named_buffers() if name not in shapes)
    tables = {f"{name}[{d}]": to_expression(size) for name, shape in buffers for d, size in enumerate(shape)}
    return Sizes(shapes, numbers | tables)


def _list_leaves(body: Mapping[str, object], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """The values of a config's dictionary, and of those within it."""
    for key, value in body.items():
        if isinstance(value, dict):
            yield from _list_leaves(value, (*prefix, str(key)))
        else:
            yield (*prefix, str(key)), value


def _list_integers(body: Mapping[str, object]) -> Iterator[Field]:
    """The positive integers, and those in lists."""
    for path, value in _list_leaves(body):
        for item, entry in enumerate(value) if isinstance(value, list) else ((None, value),):
            if type(entry) is int and entry > 0:
                yield Field(path, entry, item)


def _list_config_classes(
    config: PreTrainedConfig, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[type, tuple[str, ...]]]:
    """The classes of a config and of those within it, with their paths; outer ones last."""
    for key, inner in vars(config).items():
        if isinstance(inner, PreTrainedConfig):
            yield from _list_config_classes(inner, (*prefix, key))
    yield type(config), prefix
