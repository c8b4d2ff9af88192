"""Shrinks the default configuration of any transformers model to toy size, with no per-model code.

Three steps. (1) A field's *role* is read from the words of its name. (2) Each role maps the values found in the
default configuration to toy sizes: equal values of a role stay equal, different ones stay different, over all nested
configurations. (3) Per-layer lists are sampled together, so that few layers show every kind of layer.

The first attempt takes every liberty that makes a better test (fewer key-value heads, head sizes that do not divide
the hidden size, unrelated widths). A `Recipe` lists the liberties given up; `recipes` yields them, fewest first.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

VOCAB, POSITIONS, WINDOW, FIRST_PLAIN_TOKEN = 131, 64, 4, 20
HIDDEN = "hidden"
POOLS: dict[str, tuple[int, ...]] = {
    "hidden": (96, 72, 120, 144, 168, 48, 192),
    "ffn": (112, 40, 56, 88, 104, 136, 80, 64, 152),
    "width": (80, 64, 40, 56, 88, 104, 128, 136, 152, 160, 176, 184, 200),
    "rank": (20, 28, 36, 44),
    "heads": (6, 12, 4),
    "kv_heads": (2, 3, 1),
    "head_dim": (24, 32, 16, 20, 28, 12, 8),
    "experts": (10, 8, 12),
    "top_k": (3, 2),
    "window": (WINDOW, 5, 3),
}
# Words of field names, tried in this order; the first that matches gives the role.
ROLES: tuple[tuple[str, str], ...] = (
    ("keep", r"dropout|pdrop|_prob$|initializer|dtype|ignore_index|chunk_size_feed|sampling|_tp$|seed|alpha|beta"),
    ("keep", r"kernel|stride|conv1d_width|d_conv|expan|mult|ratio|dilation|padding|hop_length|channels?$|time_step|type_vocab"),
    ("token", r"_token_ids?$|_token_index$|^(unk|mask|pad|eos|bos)_index$"),
    ("vocab", r"vocab|codebook_size"),
    ("kv_heads", r"(kv|key_value)_(n_)?heads|query_groups"),
    ("heads", r"heads$|n_head$|heads_per_layer$"),
    ("rotary", r"^rotary_dim$"),
    ("head_dim", r"head_?dim$|^d_kv$|dim_head|d_head$|head_size$|kv_channels"),
    ("groups", r"^n_group$|num_expert_group$"),
    ("topk_group", r"topk_group"),
    ("top_k", r"experts_per_tok|top_?k(_experts)?$|moe_k$"),
    ("shared", r"shared_experts$"),
    ("experts", r"experts$|expert_num$"),
    ("first", r"first_k|num_dense_layers|start_index|kv_shared_layers|max_window_layers|offset"),
    ("period", r"interval|period|every_n|sparse_step|pattern$|layer_group_size|frequency"),
    ("layers", r"(^|_)layers?$|^depths?$|num_blocks$"),
    ("positions", r"position|max_seq|n_ctx|max_length|context_length|max_len"),
    ("window", r"window|chunk_size|local_attention|index_topk|extent"),
    ("rank", r"rank"),
    ("image", r"image_size"),
    ("patch", r"patch_size"),
    ("hidden", r"^(hidden_size|d_model|n_embd|emb_dim|dim|hidden_sizes|embed_dim|embed_dims)$"),
    ("ffn", r"intermediate|ffn|feed_forward|d_ff$|dff$|n_inner|mlp_dim|d_inner|ff_dim"),
    ("width", r"size|dim|width|filters|d_state|d_ssm|hidden|_channels"),
)  # fmt: skip
DERIVED_BUT_SET = ("kv_heads", "token")
FILLED = ("experts", "top_k", "head_dim", "ffn", "shared")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The liberties given up, for a model that refuses them.

    mha: as many key-value heads as heads; tied: heads x head size = hidden; related: widths keep their ratio to the
    hidden size; products: other heads x head sizes keep the product they have in the default; derived: per-layer
    lists are left to the config class; filled: sizes that default to None get a value.
    """

    mha: bool = False
    tied: bool = False
    related: bool = False
    products: bool = False
    derived: bool = False
    filled: bool = False


def recipes() -> Iterator[Recipe]:
    """All recipes that give up at most three liberties, fewest first."""
    names = [f.name for f in dataclasses.fields(Recipe)]
    for count in range(4):
        for chosen in itertools.combinations(names, count):
            yield Recipe(**dict.fromkeys(chosen, True))


def role(name: str) -> str:
    """The role of a config field, from the words of its name; "other" where no word tells."""
    return next((kind for kind, pattern in ROLES if re.search(pattern, name)), "other")


def tiny_config(cls: type[PreTrainedConfig], recipe: Recipe) -> PreTrainedConfig:
    """A toy config of class `cls`; whatever the class raises on values it refuses."""
    return _Shrinker(cls(), recipe, {}).config()


class _Shrinker:
    """One (sub-)config: `sizes[role][default value]` is shared by all of the tree."""

    def __init__(self, default: PreTrainedConfig, recipe: Recipe, sizes: dict[str, dict[int, int]]) -> None:
        self.default, self.recipe, self.sizes = default, recipe, sizes
        read = default._getattr_without_heterogeneous_validation
        self.fields = {f.name: f for f in dataclasses.fields(default)}
        self.values = {n: read(n, None) for n in self.fields}
        self.depths = {v for n, v in self.values.items() if role(n) == "layers" and isinstance(v, int)}
        self.overrides = default.to_dict().get("per_layer_config")
        self.per_layer = {n: list(v) for n, v in self.values.items() if self._is_per_layer(v)}
        self.index_lists = {n: list(v) for n, v in self.values.items() if self._is_index_list(n, v)}
        for name in self.index_lists:
            self.per_layer.pop(name, None)
        self.rows = self._rows()
        self.hidden = next((v for n, v in self.values.items() if role(n) == "hidden" and isinstance(v, int)), None)

    def config(self) -> PreTrainedConfig:
        """The shrunken copy of `default`."""
        out = {}
        order = sorted(self.values.items(), key=lambda item: role(item[0]) != "hidden")
        for name, value in order:
            new = self._field(name, value)
            if new is not None:
                out[name] = new
        if self.recipe.products:
            self._keep_products(out)
        if self.overrides and not self.recipe.derived:
            by_row = {int(k): v for k, v in self.overrides.items()}
            out["per_layer_config"] = {
                j: {n: self._item(n, v) for n, v in by_row[i].items()} for j, i in enumerate(self.rows) if i in by_row
            }
        return type(self.default)(**out)

    def _is_per_layer(self, value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) in self.depths and len(value) > 2

    def _is_index_list(self, name: str, value: Any) -> bool:
        if not isinstance(value, list | tuple) or not value or not re.search("layer|idx|ids|ind", name):
            return False
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            return False
        return sorted(set(value)) == list(value) and value[-1] < max(self.depths, default=0)

    def _rows(self) -> list[int]:
        """The layers of the default to keep: every kind of layer is among them, and at least two layers."""
        depth = max(self.depths, default=0)
        lists = {n: v for n, v in self.per_layer.items() if len(v) == depth}
        if not (lists or self.index_lists or self.overrides):
            return []
        overrides = {int(k): v for k, v in (self.overrides or {}).items()}
        chosen: list[int] = []
        seen: set[tuple[str, str]] = set()
        for i in range(depth):
            kinds = {(n, repr(v[i])) for n, v in lists.items()}
            kinds |= {(n, str(i in v)) for n, v in self.index_lists.items()} | {("overrides", repr(overrides.get(i)))}
            if kinds - seen:
                chosen.append(i)
                seen |= kinds
        return chosen if len(chosen) > 1 else [*chosen, depth - 1]

    def _field(self, name: str, value: Any) -> Any:
        """The value to pass for a field; None leaves it to the config class."""
        kind = role(name)
        if value is None:
            return self._filled(name, kind)
        if isinstance(value, PreTrainedConfig):
            return _Shrinker(value, self.recipe, self.sizes).config()
        if name in self.per_layer:
            return None if self.recipe.derived else [self._item(name, self.per_layer[name][i]) for i in self.rows]
        if name in self.index_lists:
            return None if self.recipe.derived else [j for j, i in enumerate(self.rows) if i in value]
        if isinstance(value, str) and name == "architecture":
            return "test_resnet"
        if isinstance(value, bool) or not isinstance(value, int):
            return None
        if self.fields[name].default is None and kind not in DERIVED_BUT_SET:
            return None
        return None if kind == "kv_heads" and self.recipe.mha and self.fields[name].default is None else self._item(name, value)

    def _filled(self, name: str, kind: str) -> Any:
        if not self.recipe.filled or kind not in FILLED or "int" not in str(self.fields[name].type):
            return None
        return 1 if kind == "shared" else POOLS[kind][0]

    def _item(self, name: str, value: Any) -> Any:
        """The toy value of one integer in the role that `name` tells."""
        if not isinstance(value, int) or isinstance(value, bool) or value <= 1:
            return value
        kind = role(name)
        simple = {
            "groups": 2,
            "topk_group": 1,
            "first": 1,
            "period": 2,
            "rotary": 8,
            "positions": min(value, POSITIONS),
            "image": min(value, 32),
            "patch": min(value, 8),
            "vocab": min(value, VOCAB),
        }
        if kind in simple:
            return simple[kind]
        if kind == "layers":
            return len(self.rows) if self.rows and value == max(self.depths) and not self.recipe.derived else 3
        if kind == "token":
            taken = self.sizes.setdefault("token", {})
            return value if value < FIRST_PLAIN_TOKEN else taken.setdefault(value, VOCAB - 1 - len(taken))
        if kind == "kv_heads" and self.recipe.mha:
            kind = "heads"
        if kind == "head_dim" and self.recipe.tied and self.hidden:
            return self.sizes["hidden"][self.hidden] // POOLS["heads"][0]
        return self._pooled(kind, value) if kind in POOLS else value

    def _pooled(self, kind: str, value: int) -> int:
        hidden = self.sizes.setdefault("hidden", {})
        if kind == "width" and value in hidden:
            return hidden[value]
        if kind in ("width", "ffn") and self.recipe.related and self.hidden:
            for k in range(1, 9):
                if value == k * self.hidden:
                    return k * hidden[self.hidden]
                if value * k == self.hidden:
                    return hidden[self.hidden] // k
        if kind in ("width", "rank") and value <= 16:
            return value
        sizes = self.sizes.setdefault(kind, {})
        if value not in sizes:
            free = [s for s in POOLS[kind] if s not in sizes.values()]
            sizes[value] = min(free[0], value) if free else POOLS[kind][-1]
        return sizes[value]

    def _keep_products(self, out: dict[str, Any]) -> None:
        """heads x head size = expansion x width, where that holds in the default and the two names go together."""

        def stem(name: str) -> frozenset[str]:
            return frozenset(name.split("_")) - {"n", "num", "d", "head", "heads", "dim", "headdim", "size"}

        def old(name: str) -> int:
            return int(self.values[name])

        numbers = [n for n, v in out.items() if isinstance(v, int) and not isinstance(v, bool)]
        for heads, size in itertools.product(numbers, numbers):
            if (role(heads), role(size)) != ("heads", "head_dim") or stem(heads) != stem(size):
                continue
            product = old(heads) * old(size)
            for width in (n for n in numbers if role(n) in ("hidden", "width", "ffn")):
                factor, rest = divmod(product, old(width))
                if rest == 0 and 1 <= factor <= 8:
                    new = factor * out[width]
                    out[size] = math.gcd(new, 16)
                    out[heads] = new // out[size]
                    break
