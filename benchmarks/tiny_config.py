"""Shrinks the default configuration of any transformers model to toy size, with no per-model code.

Three steps. (1) A field's *role* is read from the words of its name. (2) Each role maps the values found in the
default configuration to toy sizes: equal values of a role stay equal, different ones stay different, over all nested
configurations. (3) Per-layer lists are sampled together, so that few layers show every kind of layer.

The first attempt takes every liberty that makes a better test (fewer key-value heads, head sizes that do not divide
the hidden size, unrelated widths). A `Recipe` lists the liberties given up; `recipes` yields them, fewest first.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import math
import re
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedConfig
from transformers.configuration_utils import ALLOWED_ATTN_LAYER_TYPES

from benchmarks.tiny_recipe import Recipe, several_axes
from benchmarks.tiny_roles import (
    AROUND,
    BACKBONE,
    CAPS,
    FILLED,
    FIRST_PLAIN_TOKEN,
    IMAGE,
    LEAST_MULTIPLIER,
    MODEL_HINTS,
    MULTIPLIER,
    NAMED,
    NAMED_FILLED,
    OUTPUTS,
    POOLS,
    STAGED_IMAGE,
    TAKEN,
    VOCAB,
    WINDOW,
    role,
)


def tiny_config(cls: type[PreTrainedConfig], recipe: Recipe) -> PreTrainedConfig:
    """A toy config of class `cls`; raises whatever the class raises on values it refuses."""
    return _Shrinker(cls(), recipe, {}).config()


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ints(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_int, value))


class _Shrinker:
    """One (sub-)config; `sizes[role][default value]` = toy size is shared by all of the tree."""

    def __init__(self, default: PreTrainedConfig, recipe: Recipe, sizes: dict[str, dict[int, int]]) -> None:
        self.default, self.recipe, self.sizes = default, recipe, sizes
        read = default._getattr_without_heterogeneous_validation
        self.fields = {f.name: f for f in dataclasses.fields(default)}
        self.values = {n: read(n, None) for n in self.fields}
        self.depths = {v for n, v in self.values.items() if role(n) == "layers" and _is_int(v)}
        self.overrides = {int(k): v for k, v in (default.to_dict().get("per_layer_config") or {}).items()}
        self.index_lists = {n: list(v) for n, v in self.values.items() if self._is_index_list(n, v)}
        self.per_layer = {
            n: list(v) for n, v in self.values.items() if self._is_per_layer(v) and n not in self.index_lists
        }
        self.rows = self._rows()
        self.hidden = next((v for n, v in self.values.items() if role(n) == "hidden" and _is_int(v)), None)
        lists = {n: [v for v in vs if v > 4] for n, vs in self.values.items() if _is_ints(vs) and len(vs) > 2}
        stages = ("layers", "heads", "hidden") if self.hidden else ("layers", "heads", "hidden", "width")
        self.staged = any(role(n) in stages for n in lists)
        self.scale = self._scale([(n, vs) for n, vs in lists.items() if vs])
        self.multiplier = next((v for n, v in self.values.items() if re.search(MULTIPLIER, n)), None)

    def _scale(self, lists: list[tuple[str, list[int]]]) -> int:
        """The power of two that the widths of a hierarchical network shrink by; their heads still divide them."""
        widths = [v for n, vs in lists if role(n) == "hidden" for v in vs]
        heads = [max(v) if _is_ints(v) else v for n, v in self.values.items() if role(n) == "heads"]
        least = 16 if widths or heads else 4
        widths = widths or [v for n, vs in lists if role(n) in ("width", "ffn") for v in vs] or [self.hidden or 0]
        for scale in (64, 32, 16, 8, 4, 2):
            split = [h for h in heads if _is_int(h) and max(widths) % h == 0]
            if min(widths) >= least * scale and all(max(widths) // scale % h == 0 for h in split):
                return scale
        return 1

    def config(self) -> PreTrainedConfig:
        """The shrunken copy of the default."""
        out: dict[str, Any] = {}
        for name, value in sorted(
            self.values.items(), key=lambda item: (item[0] != BACKBONE, role(item[0]) != "hidden")
        ):
            new = self._field(name, value)
            if new is not None:
                out[name] = new
        if not self.recipe.tied and self._reads_head_dim():
            out["head_dim"] = POOLS["head_dim"][0]
        if self.overrides and not self.recipe.derived:
            out["per_layer_config"] = {
                j: self._related(self.overrides[i], {n: self._item(n, v) for n, v in self.overrides[i].items()})
                for j, i in enumerate(self.rows)
                if i in self.overrides
            }
        hints = MODEL_HINTS.get(self.default.model_type, {})
        out = self._related(self.values, out) | self._outputs(out)
        rope = self._rope(out)
        try:
            return type(self.default)(**{**out, **rope, **hints})
        except (
            StrictDataclassFieldValidationError
        ):  # the text part of a family whose other part rotates on several axes
            if not rope:
                raise
            return type(self.default)(**{**out, **hints})

    def _outputs(self, out: dict[str, Any]) -> dict[str, Any]:
        """Of a backbone that gives the states of several layers: one layer for each of these states, and its switches."""
        given = getattr(self.default, OUTPUTS, None)
        if not hasattr(self.default, "stage_names") or not _is_ints(given) or len(given) < 2:
            return {}
        layers = [n for n in out if role(n) == "layers" and _is_int(out[n])]
        switches = {n: v for n, v in vars(self.default).items() if isinstance(v, bool) and n not in self.fields}
        indices = list(range(1, 1 + len(given))) if layers else given
        return {**switches, **{n: len(given) for n in layers[:1]}, OUTPUTS: indices}

    def _rope(self, out: dict[str, Any]) -> dict[str, Any]:
        """Rotary settings of a text model that rotates on several axes."""
        known = "rope_parameters" in self.fields and "vision" not in self.default.model_type
        if not known or "mrope_section" not in self._source():
            return {}
        sizes = {kind: n for n, kind in ((n, role(n)) for n in out) if kind in ("heads", "hidden") and _is_int(out[n])}
        if len(sizes) < 2:
            return {}
        head = out.get("head_dim") or out[sizes["hidden"]] // out[sizes["heads"]]
        return {"rope_parameters": several_axes(self.values["rope_parameters"], head)}

    def _reads_head_dim(self) -> bool:
        """Whether the modelling code reads a head size that is no field of the config class."""
        return not hasattr(type(self.default), "head_dim") and 'config, "head_dim"' in self._source()

    def _source(self) -> str:
        modeling = type(self.default).__module__.replace("configuration_", "modeling_")
        try:
            return inspect.getsource(importlib.import_module(modeling))
        except ImportError:  # a configuration for code of another model, or for none
            return ""

    def _is_per_layer(self, value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) in self.depths and len(value) > 2

    def _is_index_list(self, name: str, value: Any) -> bool:
        if not isinstance(value, list | tuple) or not value or not re.search("layer|idx|ids|ind", name):
            return False
        return (
            all(map(_is_int, value)) and sorted(set(value)) == list(value) and value[-1] < max(self.depths, default=0)
        )

    def _rows(self) -> list[int]:
        """The layers of the default to keep: every kind of layer is among them, and at least two layers."""
        depth = max(self.depths, default=0)
        lists = {n: v for n, v in self.per_layer.items() if len(v) == depth}
        if not (lists or self.index_lists or self.overrides):
            return []
        chosen: list[int] = []
        seen: dict[tuple[str, str], int] = {}
        for i in range(depth):
            kinds = [(n, repr(v[i])) for n, v in lists.items()]
            kinds += [(n, str(i in v)) for n, v in self.index_lists.items()]
            kinds += [("overrides", repr(self.overrides.get(i)))]
            needed = any(i in v for n, v in self.index_lists.items() if OUTPUTS in n)
            if needed or any(seen.get(kind, 0) < 1 + self.recipe.twice for kind in kinds):
                chosen.append(i)
                for kind in kinds:
                    seen[kind] = seen.get(kind, 0) + 1
        return chosen if len(chosen) > 1 else [*chosen, depth - 1]

    def _field(self, name: str, value: Any) -> Any:
        """The value to pass for a field; None leaves it to the config class."""
        kind, derived = role(name), self.fields[name].default is None
        if name in NAMED:
            return NAMED[name]
        if name == "head_dim" and derived and _is_int(value or 0) and not self.recipe.tied:
            return POOLS["head_dim"][0]
        if value is None:
            return self._filled(name, kind) if self.recipe.filled else None
        if isinstance(value, PreTrainedConfig):
            return _Shrinker(value, self.recipe, self.sizes).config()
        if name in self.per_layer:
            return None if self.recipe.derived else [self._item(name, self.per_layer[name][i]) for i in self.rows]
        if name in self.index_lists:
            return None if self.recipe.derived else [j for j, i in enumerate(self.rows) if i in value]
        if _repeats(value):
            return [[kinds, 1] for kinds, _ in value]
        if isinstance(value, list | tuple):
            if kind == "heads" and list(value) != list(self.fields[name].default or ()):  # as the config around it asks
                return list(value)
            return None if derived and not self.recipe.filled else self._list(name, kind, value)
        if isinstance(value, bool) and value != self.fields[name].default:  # what the config around it asks for
            return value
        if isinstance(value, float) and re.search(MULTIPLIER, name):
            return min(value, LEAST_MULTIPLIER)
        if name == "rope_parameters" and value == {} and self.recipe.filled:
            return {k: {"rope_type": "default", "rope_theta": 10000.0} for k in self.values.get("layer_types") or ()}
        if isinstance(value, dict) and kind == "rate":
            return {k: self._item(name, v) for k, v in value.items()}
        if not _is_int(value) or (derived and (kind not in ("kv_heads", "token") or self._mha(kind))):
            return None
        return self._item(name, value)

    def _mha(self, kind: str) -> bool:
        return kind == "kv_heads" and self.recipe.mha

    def _filled(self, name: str, kind: str) -> Any:
        if name == "layer_types":
            return self._layer_types()
        if name in NAMED_FILLED:
            return NAMED_FILLED[name]
        if kind not in FILLED or "int" not in str(self.fields[name].type):
            return None
        if kind == "token":
            return 1 if name == "pad_token_id" else FIRST_PLAIN_TOKEN - 1
        if kind in ("shared", "vocab"):
            return 1 if kind == "shared" else VOCAB
        return POOLS["heads" if self._mha(kind) else kind][0]

    def _layer_types(self) -> list[str]:
        """The layer kinds that the modelling code names, of those the library knows."""
        source = self._source()
        kinds = [k for k in ALLOWED_ATTN_LAYER_TYPES if f'"{k}"' in source]
        return (kinds * 3)[:3]

    def _list(self, name: str, kind: str, value: Any) -> Any:
        """Sizes of the stages of a hierarchical network, or parts of a width."""
        if not _is_ints(value):
            return None
        if kind == "image":
            return [min(v, STAGED_IMAGE if self.staged else IMAGE) for v in value]
        if kind == "patch" and not self.staged:
            return [min(v, CAPS["patch"]) for v in value]
        if kind == "layers":
            return [min(v, 3 if self.recipe.twice else 2) for v in value]
        if kind not in ("hidden", "width", "ffn"):
            return None
        if sum(value) == self.hidden:
            return [v * self.sizes["hidden"][self.hidden] // self.hidden for v in value]
        if BACKBONE in self.fields and re.search(TAKEN, name):
            return [self._taken(v) for v in value]
        return [self.sizes.setdefault("stages", {}).setdefault(v, self._scaled(v)) for v in value]

    def _taken(self, value: int) -> int:
        """A width that layers around a backbone take from each other, or from the backbone."""
        known = self.sizes["hidden" if value == self.hidden else "stages"]
        return known.get(value) or self._scaled(value)

    def _scaled(self, value: int) -> int:
        """A width of a hierarchical network."""
        if self.multiplier:
            return int(value * LEAST_MULTIPLIER / self.multiplier)
        return value if value <= 4 else max(4, value // self.scale)

    def _item(self, name: str, value: Any) -> Any:
        """The toy value of one integer in the role that `name` tells."""
        kind = role(name)
        if BACKBONE in self.fields and re.search(TAKEN, name):
            return self._taken(value)
        if BACKBONE in self.fields and re.search(AROUND, name):
            return self._pooled("hidden", value)
        if kind == "experts" and value == 1:
            return POOLS["experts"][0]
        if not _is_int(value) or value <= 1:
            return value
        if kind == "image":
            return min(value, STAGED_IMAGE if self.staged else IMAGE)
        if kind == "patch" and self.staged and BACKBONE not in self.fields:  # the backbone's
            return value
        if kind == "window" and self.staged:
            return 2
        if kind == "window" and "vision" in self.default.model_type:
            return WINDOW * CAPS["patch"]  # of pixels
        if kind in CAPS:
            return min(value, CAPS[kind])
        if kind == "layers":
            repeated = next((v for v in self.values.values() if _repeats(v) == value), None)
            if repeated:
                return sum(len(kinds) for kinds, _ in repeated)
            if not self.rows or value != max(self.depths):
                return 3
            return min(max(self.rows) + 1, 8) if self.recipe.derived else len(self.rows)
        if kind == "token":
            taken = self.sizes.setdefault("token", {})
            return value if value < FIRST_PLAIN_TOKEN else taken.setdefault(value, VOCAB - 1 - len(taken))
        if self.staged and kind in ("hidden", "width"):
            known = self.sizes.get("hidden", {}) if BACKBONE in self.fields else {}
            return known.get(value) or self._scaled(value)
        if kind == "head_dim" and self.recipe.tied and self.hidden:
            return self.sizes["hidden"][self.hidden] // POOLS["heads"][self.recipe.wide]
        return self._pooled("heads" if self._mha(kind) else kind, value) if kind in POOLS else value

    def _pooled(self, kind: str, value: int) -> int:
        hidden = self.sizes.setdefault("hidden", {})
        if kind == "width" and value in hidden:
            return hidden[value]
        if kind in ("width", "ffn", "hidden") and self.recipe.related and value not in hidden:
            for old, new in hidden.items():
                up, down = divmod(value, old), divmod(old, value)
                if up[1] == 0 and up[0] <= 8:
                    return hidden.setdefault(value, up[0] * new) if kind == "hidden" else up[0] * new
                if down[1] == 0 and down[0] <= 8 and new % down[0] == 0:
                    return hidden.setdefault(value, new // down[0]) if kind == "hidden" else new // down[0]
        if kind in ("width", "rank") and value <= 16:
            return value
        if kind == "heads" and self.recipe.alike:
            return POOLS["heads"][0]
        sizes = self.sizes.setdefault(kind, {})
        if value not in sizes:
            pool = POOLS[kind][1:] if kind == "heads" and self.recipe.wide else POOLS[kind]
            free = [s for s in pool if s not in sizes.values() and s <= value]
            sizes[value] = free[0] if free else min(value, pool[-1])
        return sizes[value]

    def _related(self, old: dict[str, Any], out: dict[str, Any]) -> dict[str, Any]:
        """Keeps, where the recipe says so, the relations between head sizes that hold in `old`."""
        if not self.recipe.relations:
            return out
        numbers = [n for n, v in out.items() if _is_int(v) and _is_int(old.get(n))]
        sizes = [n for n in numbers if role(n) == "head_dim"]
        for total, first, second in itertools.permutations(sizes, 3):
            if first < second and old[total] == old[first] + old[second]:
                out[total] = out[first] + out[second]
        for heads, size in itertools.product(numbers, sizes):
            if role(heads) != "heads" or _stem(heads) != _stem(size):
                continue
            for width in (n for n in numbers if role(n) in ("hidden", "width", "ffn")):
                factor, rest = divmod(old[heads] * old[size], old[width])
                if rest == 0 and 1 <= factor <= 8:
                    out[size] = math.gcd(factor * out[width], 16)
                    out[heads] = factor * out[width] // out[size]
                    break
        return out


def _stem(name: str) -> frozenset[str]:
    return frozenset(name.split("_")) - {"n", "num", "d", "head", "heads", "dim", "headdim", "size"}


def _repeats(value: Any) -> int:
    """The number of layers that [[kinds, times], ...] stands for; 0 for any other value."""
    if not isinstance(value, list | tuple) or not value:
        return 0
    if not all(isinstance(v, list | tuple) and len(v) == 2 and isinstance(v[0], list | tuple) for v in value):
        return 0
    return sum(len(kinds) * times for kinds, times in value if _is_int(times))
