"""Shrinks the default configuration of any transformers model to toy size, with no per-model code.

A field's *role* is read from the words of its name and from its default value; each role has toy sizes that are
pairwise different. A `Recipe` says which liberties are taken; a model that refuses the richest recipe gets the next.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from transformers import PreTrainedConfig

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, POSITIONS = 96, 112, 6, 2, 24, 131, 64
EXPERTS, TOP_K, WINDOW = 10, 3, 4
WIDTHS = (40, 56, 64, 72, 80, 88, 104, 120, 128, 136, 152, 160, 168, 176, 184, 192)

ROLES: tuple[tuple[str, str], ...] = (
    ("keep", r"dropout|pdrop|_prob$|initializer|dtype|ignore_index|chunk_size_feed|sampling|_tp$|seed|alpha|beta"),
    ("keep", r"kernel|stride|conv_?\d*d?_width|d_conv|expand|mult|ratio|dilation|padding|_tp$|hop_length|num_channels"),
    ("token", r"_token_ids?$|_token_index$|^(unk|mask|pad|eos|bos)_index$|_tokens?$"),
    ("vocab", r"vocab|codebook_size"),
    ("kv_heads", r"(kv|key_value|k)_(n_)?heads|num_kv_heads|query_groups"),
    ("heads", r"heads?(_per_layer)?$"),
    ("head_dim", r"head_?dim$|^d_kv$|dim_head|d_head$|head_size$|kv_channels"),
    ("top_k", r"experts_per_tok|top_?k(?!_group)$|moe_k$"),
    ("groups", r"n_groups?$|expert_group$"),
    ("topk_group", r"topk_group"),
    ("shared", r"shared_experts$"),
    ("experts", r"experts?(_num)?$"),
    ("first", r"first_k|num_dense_layers|start_index|kv_shared_layers|max_window_layers|nextn|offset"),
    ("period", r"interval|period|every_n|sparse_step|_step$|pattern$|group_size$|frequency"),
    ("layers", r"(^|_)layers?$|depth$|num_blocks$"),
    ("positions", r"position|max_seq|n_ctx|max_length|context_length|max_len"),
    ("window", r"window|chunk_size|attention_chunk|local_attention|index_topk|extent"),
    ("rank", r"rank|index_n"),
    ("image", r"image_size"),
    ("patch", r"patch_size"),
    ("width", r"size|dim|width|channel|d_model|n_embd|n_inner|ffn|d_ff|dff|d_inner|d_state|d_ssm|hidden|filters"),
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Liberties of one attempt: `gqa` fewer key-value heads than heads; `head_dim` free of hidden/heads."""

    gqa: bool = True
    head_dim: bool = True
    widths: bool = True
    layers: bool = True


RECIPES = (
    Recipe(),
    Recipe(head_dim=False),
    Recipe(gqa=False, head_dim=False),
    Recipe(head_dim=False, widths=False),
    Recipe(gqa=False, head_dim=False, widths=False),
    Recipe(gqa=False, head_dim=False, widths=False, layers=False),
)


def role(name: str) -> str:
    """The role of a config field, from the words of its name; "other" where no word tells."""
    return next((kind for kind, pattern in ROLES if re.search(pattern, name)), "other")


def tiny_config(cls: type[PreTrainedConfig], recipe: Recipe) -> PreTrainedConfig:
    """A toy config of class `cls`."""
    return cls(**_Shrinker(cls(), recipe).kwargs())


class _Shrinker:
    def __init__(self, default: PreTrainedConfig, recipe: Recipe) -> None:
        self.default, self.recipe = default, recipe
        self.values = {f.name: getattr(default, f.name, None) for f in dataclasses.fields(default)}
        self.declared = {f.name: f.default for f in dataclasses.fields(default)}
        self.depths = {v for n, v in self.values.items() if role(n) == "layers" and isinstance(v, int)}
        self.rows = self._rows()
        self.hidden = next((self.values[n] for n in ("hidden_size", "d_model", "n_embd") if n in self.values), None)
        self.spare = list(WIDTHS)
        self.widths: dict[int, int] = {}
        self.tokens: dict[int, int] = {}

    def kwargs(self) -> dict[str, Any]:
        out = {}
        for name, value in self.values.items():
            if value is None or isinstance(value, bool | float | str):
                continue
            new = self._shrink(name, value)
            if new is not None:
                out[name] = new
        return out

    def _per_layer(self) -> dict[str, list[Any]]:
        return {
            n: list(v)
            for n, v in self.values.items()
            if isinstance(v, list | tuple) and len(v) in self.depths and len(v) > 2
        }

    def _rows(self) -> list[int]:
        """Layers of the default that show every value of every per-layer list, at least two."""
        lists = self._per_layer()
        chosen: list[int] = []
        seen: set[tuple[str, str]] = set()
        for i in range(min(map(len, lists.values()), default=0)):
            fresh = {(n, repr(v[i])) for n, v in lists.items()} - seen
            if fresh:
                chosen.append(i)
                seen |= fresh
        n = min(map(len, lists.values()), default=0)
        if lists and len(chosen) < 2 <= n:
            chosen.append(n - 1)
        return chosen

    def _shrink(self, name: str, value: Any) -> Any:
        if isinstance(value, PreTrainedConfig):
            return type(value)(**_Shrinker(value, self.recipe).kwargs())
        if name in self._per_layer() and self.recipe.layers:
            return [self._shrink_item(name, value[i]) for i in self.rows]
        if isinstance(value, list | tuple):
            return None
        if isinstance(value, dict):
            return None
        derived = self.declared[name] is None
        kind = role(name)
        if derived and kind not in ("kv_heads", "token"):
            return None
        if derived and kind == "kv_heads" and not self.recipe.gqa:
            return None
        return self._shrink_item(name, value)

    def _shrink_item(self, name: str, value: Any) -> Any:
        if not isinstance(value, int) or isinstance(value, bool) or value <= 1:
            return value
        kind = role(name)
        method = getattr(self, f"_{kind}", None)
        return value if method is None else method(value)

    def _token(self, value: int) -> int:
        if value < 20:
            return value
        return self.tokens.setdefault(value, VOCAB - 1 - len(self.tokens))

    def _vocab(self, value: int) -> int:
        return value if value <= 16 else VOCAB

    def _kv_heads(self, value: int) -> int:
        return KV_HEADS if self.recipe.gqa else HEADS

    def _heads(self, value: int) -> int:
        return HEADS

    def _head_dim(self, value: int) -> int:
        return HEAD_DIM if self.recipe.head_dim else HIDDEN // HEADS

    def _top_k(self, value: int) -> int:
        return min(value, TOP_K)

    def _experts(self, value: int) -> int:
        return min(value, EXPERTS)

    def _groups(self, value: int) -> int:
        return 2

    def _topk_group(self, value: int) -> int:
        return 1

    def _first(self, value: int) -> int:
        return 1

    def _period(self, value: int) -> int:
        return 2

    def _layers(self, value: int) -> int:
        return max(2, len(self.rows)) if self.rows else 3

    def _positions(self, value: int) -> int:
        return min(value, POSITIONS)

    def _window(self, value: int) -> int:
        return min(value, WINDOW)

    def _rank(self, value: int) -> int:
        return self._width(value)

    def _image(self, value: int) -> int:
        return min(value, 32)

    def _patch(self, value: int) -> int:
        return min(value, 8)

    def _width(self, value: int) -> int:
        if value == self.hidden:
            return HIDDEN
        if value <= 16:
            return value
        if not self.recipe.widths and self.hidden:
            for k in range(1, 9):
                if value == k * self.hidden:
                    return k * HIDDEN
                if value * k == self.hidden:
                    return HIDDEN // k
        if value not in self.widths:
            self.widths[value] = self.spare.pop(0)
        return self.widths[value]
