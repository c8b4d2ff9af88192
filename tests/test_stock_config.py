"""The config of a stock class for a cut model, found by probing: shapes, values and refusals."""

from __future__ import annotations

import itertools
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mptk.errors import MptkError
from passes.targets.stock.config import StockConfig, probe_config
from passes.targets.stock.learn import Stock
from passes.targets.stock.probe import Refusal
from passes.targets.stock.rehome import rehome

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
        return probe_config(
            model_class, self.model.config, self.shapes(widths), pairs, [*self.fixed, *others], **options
        )

    def discover(self, **options: Any) -> Stock:
        return Stock.discover(self.model, self.families, self.fixed, self.shapes, **options)


def sizes(hidden: int, **more: Any) -> dict[str, Any]:
    return {"hidden_size": hidden, "num_hidden_layers": 3, "vocab_size": VOCAB, **more}


def gated(hidden: int, ffn: int, **more: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """Rules of a decoder with grouped queries and a gated feed-forward."""
    return {
        **more,
        r"q_proj.weight": (Q, hidden),
        r"[kv]_proj.weight": (KV, hidden),
        r"o_proj.weight": (hidden, Q),
        r"q_proj.bias": (Q,),
        r"[kv]_proj.bias": (KV,),
        r"(gate|up)_proj.weight": ("ffn", hidden),
        r"down_proj.weight": (hidden, "ffn"),
    }


def heads(**more: Any) -> dict[str, Any]:
    return {"num_attention_heads": 6, "num_key_value_heads": 2, **more}


GROUPED = {"kv": 2, "q": 3, "ffn": 80}


def llama() -> Spec:
    config = LlamaConfig(**sizes(48, intermediate_size=80, head_dim=10, tie_word_embeddings=True, **heads()))
    return Spec(LlamaForCausalLM(config), GROUPED, [48, 10, VOCAB], gated(48, 80))


def one_group() -> Spec:
    config = LlamaConfig(**sizes(48, intermediate_size=80, head_dim=10, **heads(num_key_value_heads=1)))
    return Spec(LlamaForCausalLM(config), {"kv": 1, "q": 6, "ffn": 80}, [48, 10, VOCAB], gated(48, 80))


def qwen2() -> Spec:
    model = Qwen2ForCausalLM(Qwen2Config(**sizes(60, intermediate_size=80, **heads())))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return Spec(model, GROUPED, [60, 10, VOCAB], gated(60, 80))


def qwen2_hidden() -> Spec:
    model = Qwen2ForCausalLM(Qwen2Config(**sizes(60, intermediate_size=80, rms_norm_eps=0.01, **heads())))
    rules = {
        r"q_proj.weight": (60, "hidden"),
        r"[kv]_proj.weight": (20, "hidden"),
        r"o_proj.weight": ("hidden", 60),
        r"(gate|up)_proj.weight": (80, "hidden"),
        r"down_proj.weight": ("hidden", 80),
        r"norm.weight": ("hidden",),
        r"(embed_tokens|lm_head)": (VOCAB, "hidden"),
    }
    return Spec(model, {"hidden": 60}, [80, 10, 6, 2, VOCAB], rules)


def qwen3() -> Spec:
    config = Qwen3Config(**sizes(44, intermediate_size=80, head_dim=10, **heads()))
    return Spec(Qwen3ForCausalLM(config), GROUPED, [44, 10, VOCAB], gated(44, 80))


def gemma3() -> Spec:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**sizes(42, intermediate_size=80, head_dim=10, layer_types=layers, **heads()))
    return Spec(Gemma3ForCausalLM(config), GROUPED, [42, 10, VOCAB], gated(42, 80))


def phi3() -> Spec:
    config = Phi3Config(**sizes(60, intermediate_size=80, pad_token_id=0, **heads()))
    fused = {r"qkv_proj": ([Q, KV, KV], 60), r"gate_up_proj": (["ffn", "ffn"], 60)}
    return Spec(Phi3ForCausalLM(config), GROUPED, [60, 10, VOCAB], gated(60, 80, **fused))


def mixtral() -> Spec:
    config = MixtralConfig(**sizes(48, intermediate_size=80, head_dim=10, num_local_experts=5, **heads()))
    moe = {
        r"mlp.gate": ("experts", 48),
        r"gate_up_proj": ("experts", ["ffn", "ffn"], 48),
        r"experts.down_proj": ("experts", 48, "ffn"),
    }
    return Spec(MixtralForCausalLM(config), {**GROUPED, "experts": 5}, [48, 10, VOCAB], gated(48, 80, **moe))


def gpt2() -> Spec:
    config = GPT2Config(n_embd=48, n_layer=3, n_head=4, n_positions=37, vocab_size=VOCAB)
    model = GPT2LMHeadModel(config)
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
    return Spec(model, {"heads": 4, "ffn": 192, "hidden": 48}, [12, 37, VOCAB], rules)


def opt() -> Spec:
    more = {"ffn_dim": 80, "num_attention_heads": 4, "max_position_embeddings": 37, "word_embed_proj_dim": 48}
    q = ("heads", 12)
    rules = {
        r"[qkv]_proj.weight": (q, 48),
        r"[qkv]_proj.bias": (q,),
        r"out_proj.weight": (48, q),
        r"fc1.weight": ("ffn", 48),
        r"fc1.bias": ("ffn",),
        r"fc2.weight": (48, "ffn"),
    }
    return Spec(OPTForCausalLM(OPTConfig(**sizes(48, **more))), {"heads": 4, "ffn": 80}, [12, 48, VOCAB], rules)


def gpt_neox() -> Spec:
    config = GPTNeoXConfig(**sizes(48, intermediate_size=80, num_attention_heads=4))
    rules = {
        r"query_key_value.weight": (("heads", 36), 48),
        r"query_key_value.bias": (("heads", 36),),
        r"attention.dense.weight": (48, ("heads", 12)),
        r"dense_h_to_4h.weight": ("ffn", 48),
        r"dense_h_to_4h.bias": ("ffn",),
        r"dense_4h_to_h.weight": (48, "ffn"),
    }
    return Spec(GPTNeoXForCausalLM(config), {"heads": 4, "ffn": 80}, [12, 48, VOCAB], rules)


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


DRAWN = {"kv": [1], "q": [0, 2], "ffn": [*range(3, 33), *range(50, 60)]}
EXACT: dict[Any, tuple[Keep, dict[str, Any]]] = {
    llama: (DRAWN, {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40}),
    qwen2: (DRAWN, {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40, "head_dim": 10}),
    qwen3: (DRAWN, {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40}),
    gemma3: (DRAWN, {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40}),
    phi3: (DRAWN, {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40, "head_dim": 10}),
    mixtral: (DRAWN, {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40}),
    gpt2: ({"ffn": range(5, 45)}, {"n_inner": 40}),
    opt: ({"ffn": range(5, 45)}, {"ffn_dim": 40}),
    gpt_neox: ({"ffn": range(5, 45)}, {"intermediate_size": 40}),
}


@pytest.mark.parametrize("make", EXACT, ids=lambda make: make.__name__)
def test_the_stock_class_computes_the_masked_model(make: Any) -> None:
    keep, expected = EXACT[make]
    torch.manual_seed(0)
    spec = make()
    widths = {name: len(units) for name, units in keep.items()}
    found = spec.probe(widths)
    assert changed(found) == expected
    stock = spec.discover()
    assert changed(stock.config(widths)) == expected
    assert set(keep) & stock.refusals.keys() == set()

    small = found.model_class(stock.config(widths).config).eval()
    small.load_state_dict(spec.cut(keep))
    tokens = torch.randint(VOCAB, (2, 9))
    with torch.no_grad():
        logits, dense = small(tokens).logits, spec.model(tokens).logits
    masked = spec.masked_logits(keep, tokens)
    assert (logits - masked).abs().max() < 1e-5
    assert (dense - masked).abs().max() > 1e-3


def test_a_field_is_the_product_of_two_families() -> None:
    stock = llama().discover()
    assert stock.expressions == {
        "num_attention_heads": (("kv", "q"),),
        "num_key_value_heads": (("kv",),),
        "intermediate_size": (("ffn",),),
    }
    assert stock.refusals == {}
    assert changed(stock.config({"kv": 1, "q": 2})) == {"num_attention_heads": 2, "num_key_value_heads": 1}


def test_experts_are_one_field() -> None:
    stock = mixtral().discover()
    assert changed(stock.config({"experts": 3})) == {"num_local_experts": 3}
    assert stock.expressions["num_local_experts"] == (("experts",),)


def test_an_implicit_head_size_is_written_down_only_where_it_is_needed() -> None:
    spec = qwen2()
    assert changed(spec.probe({"ffn": 40})) == {"intermediate_size": 40}
    found = spec.probe({"q": 2})
    assert isinstance(found, StockConfig)
    assert found.changes == {"head_dim": (None, 10), "num_attention_heads": (6, 4)}
    assert found.expressions["head_dim"] == (10,)


def test_the_ladder_is_what_the_config_class_accepts() -> None:
    stock = one_group().discover()
    assert stock.ladder("q") == [1, 2, 3, 4, 6]
    assert stock.ladder("ffn", range(8, 81, 24), {"q": 4}) == [8, 32, 56, 80]
    refusal = refused(stock.accepts({"q": 5}))
    assert refusal.kind == "validator"
    assert refusal.where == "LlamaConfig.validate_architecture"
    assert "hidden size (48) is not a multiple of the number of attention heads (5)" in refusal.reason


@pytest.mark.parametrize(
    ("make", "parameter", "field"),
    [
        (gpt2, "transformer.wte.weight", "n_embd=36"),
        (gpt_neox, "gpt_neox.embed_in.weight", "hidden_size=36"),
        (opt, "model.decoder.embed_tokens.weight", "hidden_size=36"),
    ],
)
def test_heads_that_are_wired_to_the_hidden_size_are_refused(make: Any, parameter: str, field: str) -> None:
    spec = make()
    refusal = refused(spec.probe({"heads": 3}))
    assert (refusal.kind, refusal.where) == ("shape", parameter)
    assert refusal.reason.startswith(field)
    stock = spec.discover()
    assert stock.refusals["heads"].where == parameter
    assert stock.ladder("heads") == [4]
    assert stock.ladder("ffn", [24, 72]) == [24, 72]


def test_heads_and_hidden_together_imply_a_field_that_no_shape_shows() -> None:
    spec = gpt2()
    stock = spec.discover()
    assert stock.together == [frozenset({"heads", "hidden"})]
    assert changed(stock.config({"heads": 3, "hidden": 36})) == {"n_embd": 36, "n_head": 3, "n_inner": 192}
    assert changed(spec.probe({"heads": 3, "hidden": 36})) == {"n_embd": 36, "n_head": 3, "n_inner": 192}
    assert refused(stock.accepts({"heads": 3, "hidden": 24})).kind == "shared"
    assert stock.refusals["heads"].kind == "shape"
    assert "heads" in refused(stock.accepts({"hidden": 36})).reason


def test_families_that_share_a_field_are_cut_together() -> None:
    stock = t5().discover()
    assert stock.together == [frozenset({"encoder", "decoder", "cross"})]
    assert changed(stock.config({"encoder": 3, "decoder": 3, "cross": 3})) == {"num_heads": 3}
    refusal = refused(stock.accepts({"encoder": 3, "decoder": 2, "cross": 3}))
    assert (refusal.kind, refusal.where) == ("shared", "num_heads")
    alone = refused(stock.accepts({"encoder": 3}))
    assert (alone.kind, alone.where) == ("shared", "encoder")
    assert "cross and decoder" in alone.reason


def test_value_size_has_no_field() -> None:
    rules = {r"v_proj.weight": ((2, "v"), 48), r"o_proj.weight": (48, (6, "v"))}
    config = LlamaConfig(**sizes(48, intermediate_size=80, head_dim=10, **heads()))
    spec = Spec(LlamaForCausalLM(config), {"v": 10}, [48, 2, 6, 80, VOCAB], rules)
    refusal = refused(spec.probe({"v": 8}))
    assert (refusal.kind, refusal.where) == ("shape", "model.layers.*.self_attn.q_proj.weight")
    assert "head_dim=8" in refusal.reason
    assert "v" in spec.discover().refusals


def test_rotary_pairs_fit_the_shapes_but_are_another_function() -> None:
    rules = {
        r"q_proj.weight": ((6, 2, "pairs"), 48),
        r"[kv]_proj.weight": ((2, 2, "pairs"), 48),
        r"o_proj.weight": (48, (6, 2, "pairs")),
    }
    config = LlamaConfig(**sizes(48, intermediate_size=80, head_dim=10, **heads()))
    spec = Spec(LlamaForCausalLM(config), {"pairs": 5}, [48, 2, 6, 80, VOCAB], rules)
    refusal = refused(spec.probe({"pairs": 4}))
    assert refusal.kind == "numeric"
    assert "scaling" in refusal.reason
    assert spec.discover().refusals["pairs"].kind == "numeric"


def test_the_check_decides_where_shapes_fit() -> None:
    calls: list[dict[str, int]] = []

    def check(stock: StockConfig, widths: Mapping[str, int]) -> float:
        calls.append(dict(widths))
        return 0.5 if "ffn" in widths else 0.0

    stock = one_group().discover(check=check)
    assert stock.refusals.keys() == {"ffn"}
    assert stock.refusals["ffn"].kind == "numeric"
    assert "0.5" in stock.refusals["ffn"].reason
    assert {"q": 4} in calls  # 5 is refused by the validator


def test_a_cut_norm_takes_its_new_eps() -> None:
    torch.manual_seed(0)
    spec = qwen2_hidden()
    keep = {"hidden": [*range(2, 20), *range(25, 47)]}
    found = spec.probe({"hidden": 40}, scalars={0.01: 0.01 * 60 / 40})
    assert changed(found) == {"hidden_size": 40, "head_dim": 10, "rms_norm_eps": 0.01 * 60 / 40}
    assert isinstance(found, StockConfig)
    assert spec.model.config.rms_norm_eps == 0.01

    state = {name: t * (60 / 40) ** 0.5 if "norm" in name else t for name, t in spec.cut(keep).items()}
    small = found.model_class(found.config).eval()
    small.load_state_dict(state)
    tokens = torch.randint(VOCAB, (2, 9))
    with torch.no_grad():
        assert (small(tokens).logits - spec.masked_logits(keep, tokens)).abs().max() < 1e-5


def test_a_field_of_an_inner_config() -> None:
    text = LlamaConfig(**sizes(48, intermediate_size=80, head_dim=10, **heads())).to_dict()
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 36,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 14,
        "patch_size": 7,
    }
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=7)
    rules = {r"language_model.*(gate|up)_proj": ("ffn", 48), r"language_model.*down_proj": (48, "ffn")}
    spec = Spec(LlavaForConditionalGeneration(config), {"ffn": 80}, [48, 36, 56, 10, VOCAB], rules)
    found = spec.probe({"ffn": 64})
    assert changed(found) == {"text_config.intermediate_size": 64}
    assert isinstance(found, StockConfig)
    assert found.config.text_config.intermediate_size == 64


class ListedConfig(PreTrainedConfig):
    model_type = "listed"
    ffn_sizes: list[int] | None = None
    hidden_size: int = 12


class Listed(PreTrainedModel):
    config_class = ListedConfig

    def __init__(self, config: ListedConfig) -> None:
        super().__init__(config)
        assert config.ffn_sizes is not None
        self.layers = torch.nn.ModuleList(torch.nn.Linear(config.hidden_size, n) for n in config.ffn_sizes)
        self.post_init()


def test_a_list_of_layer_sizes() -> None:
    model = Listed(ListedConfig(ffn_sizes=[20, 28, 20, 28]))
    rules = {
        r"layers.[02].weight": ("narrow", 12),
        r"layers.[02].bias": ("narrow",),
        r"layers.[13].weight": ("wide", 12),
        r"layers.[13].bias": ("wide",),
    }
    spec = Spec(model, {"narrow": 20, "wide": 28}, [12], rules)
    found = spec.probe({"narrow": 15})
    assert isinstance(found, StockConfig)
    assert found.changes == {"ffn_sizes": ([20, 28, 20, 28], [15, 28, 15, 28])}
    assert found.expressions == {"ffn_sizes[0,2]": ("narrow",)}
    assert changed(spec.discover().config({"narrow": 15, "wide": 21})) == {"ffn_sizes": [15, 21, 15, 21]}


def test_a_cut_of_some_layers_only_is_refused() -> None:
    spec = llama()
    target = {n: s if ".1." in n else spec.old[n] for n, s in spec.shapes({"ffn": 40}).items()}
    result = probe_config(type(spec.model), spec.model.config, target, {"ffn": (80, 40)}, [2, 3, 48, 10])
    refusal = refused(result)
    assert refusal.kind == "shape"
    assert "intermediate_size=40" in refusal.reason


def test_other_names_are_refused() -> None:
    spec = llama()
    target = {**spec.old, "extra.weight": (3,)}
    refusal = refused(probe_config(type(spec.model), spec.model.config, target, {"ffn": (80, 40)}, []))
    assert (refusal.kind, refusal.where) == ("names", "extra.weight")


def test_a_class_that_its_own_config_does_not_build() -> None:
    config = LlamaConfig(**sizes(48, **heads()))
    config.hidden_act = "no-such-function"
    with pytest.raises(MptkError, match="no-such-function"):
        probe_config(LlamaForCausalLM, config, {}, {}, [])


def test_probing_leaves_no_trace() -> None:
    spec = qwen2()
    before = spec.model.config.to_dict()
    spec.discover()
    assert spec.model.config.to_dict() == before
    assert "__getattr__" not in vars(PreTrainedConfig)


def test_discovery_of_thirty_layers_is_quick() -> None:
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    rules = {
        r"q_proj.weight": (("kv", "q", 64), 576),
        r"[kv]_proj.weight": (("kv", 64), 576),
        r"o_proj.weight": (576, ("kv", "q", 64)),
        r"(gate|up)_proj.weight": ("ffn", 576),
        r"down_proj.weight": (576, "ffn"),
    }
    spec = Spec(model, {"kv": 3, "q": 3, "ffn": 1536}, [64, 576, 49152], rules)
    start = time.process_time()
    stock = spec.discover()
    assert time.process_time() - start < 10
    legal = {(kv, q) for kv in (1, 2, 3) for q in (1, 2, 3) if stock.accepts({"kv": kv, "q": q}) is None}
    assert legal == set(itertools.product((1, 2, 3), (1, 2, 3)))  # 576 is a multiple of every product

    seconds = []
    for width in range(64, 1537, 64):
        start = time.process_time()
        assert stock.accepts({"ffn": width}) is None
        seconds.append(time.process_time() - start)
    assert statistics.median(seconds) < 0.005


def reference_logits(refusal: Refusal, state: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits of the class whose config refused: the model itself does not mind."""
    reference = LlamaForCausalLM(refusal.config).eval()
    reference.load_state_dict(state)
    with torch.no_grad():
        return reference(tokens).logits


def test_a_refused_config_is_rehomed_in_a_class_with_equal_logits() -> None:
    torch.manual_seed(0)
    spec = one_group()
    keep = {"q": [0, 1, 3, 4, 5]}
    refusal = refused(spec.probe({"q": 5}))
    state, tokens = spec.cut(keep), torch.randint(VOCAB, (2, 31))
    reference = reference_logits(refusal, state, tokens)
    tried = []

    def check(stock: StockConfig) -> float:
        tried.append(stock.model_class)
        model = stock.model_class(stock.config).eval()
        model.load_state_dict(state)
        with torch.no_grad():
            return (model(tokens).logits - reference).abs().max().item()

    found = rehome(refusal.config, spec.shapes({"q": 5}), check)
    assert isinstance(found, StockConfig), str(found)
    assert found.model_class is not LlamaForCausalLM
    assert found.config.num_attention_heads == 5
    assert check(found) <= 1e-6
    assert (reference - spec.masked_logits(keep, tokens)).abs().max() < 1e-5
    assert found.changes["model_type"] == ("llama", found.config.model_type)
    assert getattr(found.config, "sliding_window", None) is None


def test_a_class_with_other_logits_is_no_home() -> None:
    spec = one_group()
    refusal = refused(spec.probe({"q": 5}))
    result = refused(rehome(refusal.config, spec.shapes({"q": 5}), lambda stock: 0.25))
    assert result.kind == "numeric"
    assert "0.25" in result.reason
    strange = {**spec.shapes({"q": 5}), "extra.weight": (3,)}
    assert refused(rehome(refusal.config, strange, lambda stock: 0.0)).kind == "names"
