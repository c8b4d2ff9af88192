"""depth: find the config with which a stock transformers class has fewer of its blocks, each as it was.

The search knows no field by name. A field counts the blocks of a list if its number is theirs and, one lower, the class
has one block less. Beside it, these change with the blocks that are removed:

1. lists and words with one entry for each block (layer types): the entries of the blocks that stay;
2. lists of blocks' numbers (layers without experts), and dictionaries by block's number: the numbers after the removal;
3. a number of first blocks that differ from the others: how many of them stay;
4. lists that the class makes if the config has none (names of stages, the last as the output): it makes them again.

The class is built without memory. Each of its blocks must have the weights, the shapes and the numbers (windows,
scales, types of attention) of the dense block whose place it takes; rates of dropout may differ. A class that derives
what a block is from the block's number has no config for most choices; ``find_kind_pattern`` says which ones it has.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mptk.ir import Renumbering, make_prefix, split_block_name
from passes.targets.stock.attempt import Refusal, build_config, build_on_meta, list_weight_shapes
from passes.targets.stock.config import StockConfig
from passes.targets.stock.symbolic import WeightShapes

Path = tuple[str | int, ...]
Edits = Mapping[Path, object]
"""Place in a config's dictionary → its new value."""
_SIMPLE = (bool, int, float, str, type(None))
"""Types of the values that make a block what it is. Others, such as a config, are shared by all blocks."""
_ABSENT = object()
"""The new value of a field that the class makes itself."""


@dataclass(frozen=True)
class Built:
    """A class built from a config: the shapes of its weights; path of a module → the plain values that it keeps."""

    config: PreTrainedConfig
    shapes: WeightShapes
    traits: Mapping[str, Mapping[str, object]]

    def list_blocks(self, module: str) -> set[int]:
        """The numbers of the blocks of a list."""
        return {at[0] for name in self.shapes if (at := split_block_name(module, name)) is not None}


def build(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Built | Refusal:
    """The class on the meta device."""
    model = build_on_meta(model_class, config)
    if isinstance(model, Refusal):
        return model
    model.eval()
    return Built(
        config,
        list_weight_shapes(model),
        {n: _read_traits(module) for n, module in model.named_modules() if not _is_idle(module)},
    )


def _is_idle(module: nn.Module) -> bool:
    """Whether a module gives back its input at inference, as dropout does. Its rate may follow from a block's place."""
    if module.state_dict() or any(module.children()):
        return False
    given = torch.empty(1, 1, device="meta")
    try:
        return module(given) is given
    except Exception:  # noqa: BLE001 (a module may take anything)
        return False


def _read_traits(module: nn.Module) -> dict[str, object]:
    plain = {k: v for k, v in vars(module).items() if not k.startswith("_") and isinstance(v, _SIMPLE)}
    return plain | {name: tuple(buffer.shape) for name, buffer in module.named_buffers(recurse=False)}


def shorten_config(
    stock: StockConfig, kept: Mapping[str, Sequence[int]], dense: Built | None = None
) -> StockConfig | Refusal:
    """The config with which the class has only the ``kept`` blocks (path of a list → their numbers, ascending).

    ``dense``: the class built from ``stock``, if that was done before.
    """
    # One list after the other: each has a field of its own.
    for module, units in kept.items():
        found = _Search(stock, module, tuple(units), dense).run()
        if isinstance(found, Refusal):
            return found
        if found is not stock:
            stock, dense = found, None
    return stock


def find_kind_pattern(stock: StockConfig, module: str, width: int) -> tuple[list[object], list[object]] | None:
    """The kind of each dense block of a list, and the kinds that the class has if it has ``width`` blocks.

    Blocks of one kind have the same weights, shapes and traits. The class holds a choice of blocks that has the wanted
    kind at each place. None: no field counts the blocks.
    """
    search = _Search(stock, module, tuple(range(width)))
    built = next((built for _, built in search.try_edits() if isinstance(built, Built)), None)
    return None if built is None else (search.list_kinds(search.dense), search.list_kinds(built))


@dataclass(frozen=True)
class _Search:
    """The search for the config that keeps the blocks ``units`` of the list ``module``."""

    stock: StockConfig
    module: str
    units: tuple[int, ...]
    before: Built | None = None

    @cached_property
    def body(self) -> dict[str, object]:
        return self.stock.config.to_dict()

    @cached_property
    def dense(self) -> Built:
        if self.before is not None:
            return self.before
        built = build(self.stock.model_class, self.stock.config)
        assert isinstance(built, Built), built
        return built

    @property
    def count(self) -> int:
        return len(self.dense.list_blocks(self.module))

    def run(self) -> StockConfig | Refusal:
        """The first config whose class has the blocks that stay, and nothing else is different."""
        # Of several refusals, the first one of a class that could be built says most.
        refusals: dict[bool, Refusal] = {}
        for edits, built in self.try_edits():
            found = built if isinstance(built, Refusal) else self._find_mismatch(built)
            if found is None:
                assert isinstance(built, Built)
                return replace(self.stock, config=built.config, changes=self._collect_changes(edits, built))
            refusals.setdefault(isinstance(built, Built), found)
        none = Refusal("names", self.module, f"no field of {type(self.stock.config).__name__} counts these blocks")
        return refusals.get(True, refusals.get(False, none))

    def try_edits(self) -> Iterator[tuple[Edits, Built | Refusal]]:
        """Changes after which the class has as many blocks as stay, or refuses the config; likely ones first."""
        # First only lists, since a class may count its blocks by a list; then each number that may be the count.
        places = dict.fromkeys(path[:-1] for path, _ in _list_config_values(self.body) if isinstance(path[-1], str))
        counts = [path for path, value in _list_config_values(self.body) if type(value) is int and value == self.count]
        for near, count in [*((place, None) for place in places), *((path[:-1], path) for path in counts)]:
            for more in self._list_variants(near):
                edits = more if count is None else {count: len(self.units), **more}
                if not edits:
                    break  # this is the dense config itself
                built = self._build(edits)
                if isinstance(built, Built) and built.list_blocks(self.module) != set(range(len(self.units))):
                    break  # it counts something else
                if isinstance(built, Built) or count is not None:
                    yield edits, built

    def _build(self, edits: Edits) -> Built | Refusal:
        made = self._build_config(edits)
        if isinstance(made, Refusal):
            return made
        config, refused = made
        return build(self.stock.model_class, config) if refused is None or self._lenient else refused

    def _build_config(self, edits: Edits) -> tuple[PreTrainedConfig, Refusal | None] | Refusal:
        body = copy.deepcopy(self.body)
        for path, value in edits.items():
            _put(body, path, value)
        return build_config(self.stock.config, body)

    @cached_property
    def _again(self) -> tuple[PreTrainedConfig, Refusal | None] | Refusal:
        """The dense config, made again."""
        return self._build_config({})

    @property
    def _lenient(self) -> bool:
        """Whether validators refuse the dense config itself."""
        return isinstance(self._again, Refusal) or self._again[1] is not None

    # ---- what may change ----

    def _list_variants(self, near: Path) -> Iterator[Edits]:
        """What may change beside the number, most likely first. ``near``: where in the config the number is."""
        # Only beside the number: a config of images and text has such lists for each of its models.
        fields = [(path, value) for path, value in _list_config_values(self.body) if path[:-1] == near]
        each = {path: kept for path, value in fields if (kept := self._keep_entries(value)) is not None}
        numbers = {path: kept for path, value in fields if (kept := self._keep_numbers(value)) is not None}
        others = [
            {p: kept}
            for p, v in fields
            for case in (self._keep_letters, self._keep_first)
            if (kept := case(v)) is not None
        ]
        # A list such as [1, 0] may be two flags or the numbers of two blocks: with few blocks flags are likelier.
        both = {**each, **numbers}
        lists = [both, each] if self.count > 2 else [each, both]
        tried: list[Edits] = []
        for more in ({}, *others):
            # All lists that fit, then one of them otherwise, all but one, only one, none: a list may have as many
            # entries as there are blocks only by chance.
            without = [{path: left for path, left in each.items() if path != other} for other in each]
            alone = [{path: left} for path, left in each.items()]
            for edits in (
                *lists,
                *({**each, path: left} for path, left in numbers.items()),
                *without,
                *alone,
                numbers,
                {},
            ):
                if (full := {**edits, **more}) not in tried:
                    tried.append(full)
                    yield full
        # Case 4 comes last: it builds configs without each of the lists.
        if made := self._find_derived_lists([path for path, value in fields if isinstance(value, list)]):
            yield from ({**edits, **made} for edits in lists)

    def _keep_entries(self, value: object) -> object | None:
        """Case 1."""
        return [value[unit] for unit in self.units] if isinstance(value, list) and len(value) == self.count else None

    def _keep_letters(self, value: object) -> object | None:
        """Case 1, in a word."""
        fits = isinstance(value, str) and len(value) == self.count
        return "".join(str(value)[unit] for unit in self.units) if fits else None

    def _keep_numbers(self, value: object) -> object | None:
        """Case 2."""
        if isinstance(value, dict):
            places = {unit: place for place, unit in enumerate(self.units)}
            return {type(key)(places[int(key)]): own for key, own in value.items() if int(key) in places}
        if not isinstance(value, list) or not value or not all(type(v) is int and 0 <= v < self.count for v in value):
            return None
        return [self.units.index(v) for v in value if v in self.units] if len({*value}) == len(value) else None

    def _keep_first(self, value: object) -> object | None:
        """Case 3: of the first ``value`` blocks, those that stay."""
        if type(value) is not int or not 0 < value <= self.count:
            return None
        left = sum(unit < value for unit in self.units)
        return None if left == value else left

    def _find_derived_lists(self, paths: Sequence[Path]) -> Edits:
        """Case 4: the lists that are what the class makes without them, one by one and all together."""
        alone = [path for path in paths if self._keeps_config({path: _ABSENT})]
        together: Edits = dict.fromkeys(alone, _ABSENT)
        return together if self._keeps_config(together) else {}

    def _keeps_config(self, edits: Edits) -> bool:
        made, same = self._build_config(edits), self._again
        return isinstance(made, tuple) and isinstance(same, tuple) and made[0].to_dict() == same[0].to_dict()

    def _collect_changes(self, edits: Edits, built: Built) -> dict[str, tuple[object, object]]:
        changes, body = dict(self.stock.changes), built.config.to_dict()
        for path in edits:
            keys = tuple(itertools.takewhile(lambda key: isinstance(key, str), path))
            name = ".".join(map(str, keys))
            before = changes[name][0] if name in changes else _get(self.body, keys)
            changes[name] = (before, _get(body, keys))
        return {name: (old, new) for name, (old, new) in changes.items() if old != new}

    # ---- what must not ----

    def _find_mismatch(self, built: Built) -> Refusal | None:
        """The first difference between the class and the dense one without the removed blocks."""
        # Weights and their shapes, under the blocks' new numbers.
        names = Renumbering({self.module: self.units})
        target = {new: self.dense.shapes[name] for new, name in names.map_names(self.dense.shapes).items()}
        for name in [*target, *built.shapes]:
            have, want = built.shapes.get(name), target.get(name)
            if have != want:
                return Refusal(
                    "names",
                    name,
                    f"the class would have {_describe_shape(have)}, but the cut leaves {_describe_shape(want)}",
                )
        # Traits, block by block. A trait that is the block's number may follow it.
        for place, unit in enumerate(self.units):
            here, there = _of_block(built, self.module, place), _of_block(self.dense, self.module, unit)
            for key in [*there, *here]:
                new, old = here.get(key), there.get(key)
                numbered_anew = key in self._numbering and isinstance(old, int) and new == old + place - unit
                if new != old and not numbered_anew:
                    kind = type(self.stock.config).__name__
                    what = f"{kind} derives it from a block's place, and would make it {new} instead of {old}"
                    return Refusal("numeric", f"{make_prefix(self.module)}{unit}{key}", what)
        return None

    def list_kinds(self, built: Built) -> list[object]:
        """What each block of the list is: its shapes and traits, but for the traits that count blocks."""
        found: list[object] = []
        for unit in sorted(built.list_blocks(self.module)):
            own = (
                (at[1], shape)
                for n, shape in built.shapes.items()
                if (at := split_block_name(self.module, n)) and at[0] == unit
            )
            traits = {k: v for k, v in _of_block(built, self.module, unit).items() if k not in self._numbering}
            found.append((frozenset(own), frozenset(traits.items())))
        return found

    @cached_property
    def _numbering(self) -> frozenset[str]:
        """The traits that say which block it is: the same number more than the block's own in all of them."""
        offsets: dict[str, set[object]] = {}
        for unit in range(self.count):
            for key, value in _of_block(self.dense, self.module, unit).items():
                offsets.setdefault(key, set()).add(value - unit if type(value) is int else None)
        return frozenset(key for key, found in offsets.items() if len(found) == 1 and None not in found)


def _of_block(built: Built, module: str, unit: int) -> dict[str, object]:
    """Place within a block, such as ``.self_attn.layer_idx`` → the plain value that is kept there."""
    start = f"{make_prefix(module)}{unit}"
    return {
        f"{path.removeprefix(start)}.{key}": value
        for path, traits in built.traits.items()
        if path == start or path.startswith(f"{start}.")
        for key, value in traits.items()
    }


def _describe_shape(shape: object) -> str:
    return "no such weight" if shape is None else f"one of shape {shape}"


def _list_config_values(body: Mapping[str, object], at: Path = ()) -> Iterator[tuple[Path, object]]:
    """Every value of a config's dictionary, and every entry of its lists, with its place.

    A dictionary of dictionaries by number is one value.
    """
    for key, value in body.items():
        if isinstance(value, dict) and not _is_by_number(value):
            yield from _list_config_values(value, (*at, key))
            continue
        yield (*at, key), value
        if isinstance(value, list):
            yield from (((*at, key, i), entry) for i, entry in enumerate(value))


def _is_by_number(value: Mapping[object, object]) -> bool:
    return bool(value) and all(str(k).isdecimal() and isinstance(v, dict) for k, v in value.items())


def _get(body: object, path: Path) -> object:
    for key in path:
        body = body[key]  # type: ignore[index]
    return body


def _put(body: object, path: Path, value: object) -> None:
    place: Any = _get(body, path[:-1])
    if value is _ABSENT:
        del place[path[-1]]
    else:
        place[path[-1]] = value
