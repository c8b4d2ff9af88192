"""Tiny models of stock classes with, for each weight, what every dimension is made of: written by hand."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from passes.targets.stock.attempt import Refusal
from passes.targets.stock.config import StockConfig, probe_config
from passes.targets.stock.equations import find_growth
from passes.targets.stock.learn import Stock

Keep = Mapping[str, Sequence[int]]
VOCAB = 101
# A dimension of a weight, by hand: a size, a family, a row-major product (tuple) or a concatenation (list).
Q, KV = ("kv", "q", 10), ("kv", 10)


class Spec:
    """A tiny model, its families and, for each weight pattern, what every dimension is made of."""

    def __init__(
        self, model: PreTrainedModel, families: dict[str, int], fixed: list[int], rules: dict[str, tuple[Any, ...]]
    ) -> None:
        self.model, self.families, self.fixed = model.eval(), families, fixed
        self.old = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        rule = {n: next((r for pattern, r in rules.items() if re.search(pattern, n)), None) for n in self.old}
        self.rules = {name: found or self.old[name] for name, found in rule.items()}
        assert self.shapes({}) == self.old

    def shapes(self, widths: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        keep = {name: range(width) for name, width in widths.items()}
        return {name: tuple(len(self.kept(t, keep)) for t in terms) for name, terms in self.rules.items()}

    def kept(self, term: Any, keep: Keep) -> list[int]:
        """Indices of a dimension that remain when each family keeps the units in ``keep``."""
        return self._indices(term, keep)[0]

    def _indices(self, term: Any, keep: Keep) -> tuple[list[int], int]:
        if isinstance(term, int):
            return list(range(term)), term
        if isinstance(term, str):
            width = self.families[term]
            return list(keep.get(term, range(width))), width
        parts = [self._indices(part, keep) for part in term]
        if isinstance(term, list):
            starts = itertools.accumulate((size for _, size in parts), initial=0)
            return [s + i for s, (ids, _) in zip(starts, parts, strict=False) for i in ids], sum(n for _, n in parts)
        flat, total = [0], 1
        for ids, size in parts:
            flat, total = [f * size + i for f in flat for i in ids], total * size
        return flat, total

    def cut(self, keep: Keep) -> dict[str, Tensor]:
        """The state dict's slices."""
        state = dict(self.model.state_dict())
        for name, terms in self.rules.items():
            for dim, term in enumerate(terms):
                state[name] = state[name].index_select(dim, torch.tensor(self.kept(term, keep)))
        return state

    def masked_logits(self, keep: Keep, tokens: Tensor) -> Tensor:
        """The logits of the whole model with all that ``keep`` drops set to zero."""
        original = {name: t.clone() for name, t in self.model.state_dict().items()}
        masked = {}
        for name, terms in self.rules.items():
            masked[name] = torch.zeros_like(original[name])
            index = torch.meshgrid(*(torch.tensor(self.kept(t, keep)) for t in terms), indexing="ij")
            masked[name][index] = original[name][index]
        self.model.load_state_dict(masked)
        try:
            with torch.no_grad():
                return self.model(tokens).logits
        finally:
            self.model.load_state_dict(original)

    def probe(self, widths: Mapping[str, int], **options: Any) -> StockConfig | Refusal:
        others = [width for name, width in self.families.items() if name not in widths]
        pairs = {name: (self.families[name], width) for name, width in widths.items()}
        model_class = type(self.model)
        grown = find_growth(self.old, {name: self.families[name] for name in widths}, self.shapes)
        target, fixed = self.shapes(widths), [*self.fixed, *others]
        return probe_config(model_class, self.model.config, target, grown, pairs, fixed, **options)

    def discover(self, **options: Any) -> Stock:
        return Stock(self.model, self.families, self.fixed, self.shapes, **options)


def build(kind: str, **values: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{"vocab_size": VOCAB, **values}))


def sizes(hidden: int, **more: Any) -> dict[str, Any]:
    """Of a decoder of three layers with 6 heads and 80 channels."""
    own = {"num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 80}
    return {"hidden_size": hidden, **own, **more}


def grouped(hidden: int, **more: Any) -> dict[str, Any]:
    """The same with 2 key-value heads of 10 channels."""
    return sizes(hidden, num_key_value_heads=2, **{"head_dim": 10, **more})


def gated(hidden: int, head: int = 10, **more: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """Rules of a decoder with grouped queries of this size and a gated feed-forward."""
    q, kv = ("kv", "q", head), ("kv", head)
    return {
        **more,
        r"q_proj.weight": (q, hidden),
        r"[kv]_proj.weight": (kv, hidden),
        r"o_proj.weight": (hidden, q),
        r"q_proj.bias": (q,),
        r"[kv]_proj.bias": (kv,),
        r"(gate|up)_proj.weight": ("ffn", hidden),
        r"down_proj.weight": (hidden, "ffn"),
    }


GROUPED = {"kv": 2, "q": 3, "ffn": 80}


def llama() -> Spec:
    return Spec(build("llama", **grouped(48, tie_word_embeddings=True)), GROUPED, [48, 10, VOCAB], gated(48))


def one_group() -> Spec:
    model = build("llama", **grouped(48) | {"num_key_value_heads": 1})
    return Spec(model, {"kv": 1, "q": 6, "ffn": 80}, [48, 10, VOCAB], gated(48))


def qwen2() -> Spec:
    model = build("qwen2", **sizes(60, num_key_value_heads=2))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return Spec(model, GROUPED, [60, 10, VOCAB], gated(60))


def qwen2_hidden() -> Spec:
    rules = {
        r"q_proj.weight": (60, "hidden"),
        r"[kv]_proj.weight": (20, "hidden"),
        r"o_proj.weight": ("hidden", 60),
        r"(gate|up)_proj.weight": (80, "hidden"),
        r"down_proj.weight": ("hidden", 80),
        r"norm.weight": ("hidden",),
        r"(embed_tokens|lm_head)": (VOCAB, "hidden"),
    }
    model = build("qwen2", **sizes(60, num_key_value_heads=2, rms_norm_eps=0.01))
    return Spec(model, {"hidden": 60}, [80, 10, 6, 2, VOCAB], rules)


def qwen3() -> Spec:
    return Spec(build("qwen3", **grouped(44)), GROUPED, [44, 10, VOCAB], gated(44))


def gemma3() -> Spec:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    model = build("gemma3_text", **grouped(42, layer_types=layers))
    return Spec(model, GROUPED, [42, 10, VOCAB], gated(42))


def phi3() -> Spec:
    fused = {r"qkv_proj": ([Q, KV, KV], 60), r"gate_up_proj": (["ffn", "ffn"], 60)}
    model = build("phi3", **sizes(60, num_key_value_heads=2, pad_token_id=0))
    return Spec(model, GROUPED, [60, 10, VOCAB], gated(60, **fused))


def mixtral() -> Spec:
    moe = {
        r"mlp.gate": ("experts", 48),
        r"gate_up_proj": ("experts", ["ffn", "ffn"], 48),
        r"experts.down_proj": ("experts", 48, "ffn"),
    }
    model = build("mixtral", **grouped(48, num_local_experts=5))
    return Spec(model, {**GROUPED, "experts": 5}, [48, 10, VOCAB], gated(48, **moe))


def gpt2() -> Spec:
    q = ("heads", 12)
    rules = {
        r"c_attn.weight": ("hidden", [q, q, q]),
        r"c_attn.bias": ([q, q, q],),
        r"attn.c_proj.weight": (q, "hidden"),
        r"c_proj.bias|ln_": ("hidden",),
        r"c_fc.weight": ("hidden", "ffn"),
        r"c_fc.bias": ("ffn",),
        r"mlp.c_proj.weight": ("ffn", "hidden"),
        r"wpe": (37, "hidden"),
        r"wte|lm_head": (VOCAB, "hidden"),
    }
    model = build("gpt2", n_embd=48, n_layer=3, n_head=4, n_positions=37)
    return Spec(model, {"heads": 4, "ffn": 192, "hidden": 48}, [12, 37, VOCAB], rules)


def opt() -> Spec:
    q = ("heads", 12)
    rules = {
        r"[qkv]_proj.weight": (q, 48),
        r"[qkv]_proj.bias": (q,),
        r"out_proj.weight": (48, q),
        r"fc1.weight": ("ffn", 48),
        r"fc1.bias": ("ffn",),
        r"fc2.weight": (48, "ffn"),
    }
    more = {"ffn_dim": 80, "num_attention_heads": 4, "max_position_embeddings": 37, "word_embed_proj_dim": 48}
    model = build("opt", hidden_size=48, num_hidden_layers=3, **more)
    return Spec(model, {"heads": 4, "ffn": 80}, [12, 48, VOCAB], rules)


def gpt_neox() -> Spec:
    rules = {
        r"query_key_value.weight": (("heads", 36), 48),
        r"query_key_value.bias": (("heads", 36),),
        r"attention.dense.weight": (48, ("heads", 12)),
        r"dense_h_to_4h.weight": ("ffn", 48),
        r"dense_h_to_4h.bias": ("ffn",),
        r"dense_4h_to_h.weight": (48, "ffn"),
    }
    model = build("gpt_neox", **sizes(48) | {"num_attention_heads": 4})
    return Spec(model, {"heads": 4, "ffn": 80}, [12, 48, VOCAB], rules)


def t5() -> Spec:
    config = T5Config(d_model=48, d_kv=10, d_ff=80, num_layers=3, num_decoder_layers=2, num_heads=4, vocab_size=VOCAB)
    rules: dict[str, tuple[Any, ...]] = {}
    where = {"encoder": r"encoder.*SelfAttention", "decoder": r"decoder.*SelfAttention", "cross": r"EncDecAttention"}
    for family, pattern in where.items():
        rules[rf"{pattern}\.[qkv]\."] = ((family, 10), 48)
        rules[rf"{pattern}\.o\."] = (48, (family, 10))
        rules[rf"{pattern}\.relative"] = (32, family)
    return Spec(T5ForConditionalGeneration(config), dict.fromkeys(where, 4), [10, 48, 80, VOCAB], rules)


def changed(result: StockConfig | Refusal) -> dict[str, Any]:
    assert isinstance(result, StockConfig), str(result)
    return {name: new for name, (_, new) in result.changes.items()}


def refused(result: object) -> Refusal:
    assert isinstance(result, Refusal)
    return result
