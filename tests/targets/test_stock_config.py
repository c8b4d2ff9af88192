"""The config of a stock class for a cut model: shapes, values and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import stock_specs
import torch
from stock_specs import VOCAB, Keep, Spec, build, changed, grouped, llama, qwen2, qwen2_hidden, refused
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedConfig, PreTrainedModel

from mptk.errors import ModelError
from mptk.testing import expect_error
from passes.targets.stock.config import probe_config
from passes.targets.stock.equations import find_growth

DRAWN = {"kv": [1], "q": [0, 2], "ffn": [*range(3, 33), *range(50, 60)]}
GROUPS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40}
EXACT: dict[str, tuple[Keep, dict[str, Any]]] = {
    **dict.fromkeys(("llama", "qwen3", "gemma3", "mixtral"), (DRAWN, GROUPS)),
    **dict.fromkeys(("qwen2", "phi3"), (DRAWN, GROUPS | {"head_dim": 10})),
    "gpt2": ({"ffn": range(5, 45)}, {"n_inner": 40}),
    "opt": ({"ffn": range(5, 45)}, {"ffn_dim": 40}),
    "gpt_neox": ({"ffn": range(5, 45)}, {"intermediate_size": 40}),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_stock_class_computes_the_masked_model(name):
    keep, expected = EXACT[name]
    torch.manual_seed(0)
    spec = getattr(stock_specs, name)()
    widths = {name: len(units) for name, units in keep.items()}
    assert changed(spec.probe(widths)) == expected
    stock = spec.discover()
    found = stock.build_config(widths)
    assert changed(found) == expected
    assert set(keep) & stock.refusals.keys() == set()
    small = found.model_class(found.config).eval()
    small.load_state_dict(spec.cut(keep))
    tokens = torch.randint(VOCAB, (2, 9))
    with torch.no_grad():
        logits, dense = small(tokens).logits, spec.model(tokens).logits
    masked = spec.masked_logits(keep, tokens)
    assert (logits - masked).abs().max() < 1e-5
    assert (dense - masked).abs().max() > 1e-3


def test_an_implicit_head_size_is_written_down_only_where_it_is_needed():
    spec = qwen2()
    assert changed(spec.probe({"ffn": 40})) == {"intermediate_size": 40}
    assert spec.probe({"q": 2}).changes == {"head_dim": (None, 10), "num_attention_heads": (6, 4)}


def test_value_size_has_no_field():
    rules = {r"v_proj.weight": ((2, "v"), 48), r"o_proj.weight": (48, (6, "v"))}
    spec = Spec(build("llama", **grouped(48)), {"v": 10}, [48, 2, 6, 80, VOCAB], rules)
    refusal = refused(spec.probe({"v": 8}))
    assert (refusal.kind, refusal.reason) == ("shape", "no field sets the sizes of v and no others")
    assert "v" in spec.discover().refusals


def test_rotary_pairs_fit_the_shapes_but_are_another_function():
    rules = {
        r"q_proj.weight": ((6, 2, "pairs"), 48),
        r"[kv]_proj.weight": ((2, 2, "pairs"), 48),
        r"o_proj.weight": (48, (6, 2, "pairs")),
    }
    spec = Spec(build("llama", **grouped(48)), {"pairs": 5}, [48, 2, 6, 80, VOCAB], rules)
    refused(spec.probe({"pairs": 4}))
    refusal = spec.discover().refusals["pairs"]
    assert refusal.kind == "numeric"
    assert "scaling" in refusal.where


def test_a_cut_norm_takes_its_new_eps():
    torch.manual_seed(0)
    spec = qwen2_hidden()
    keep = {"hidden": [*range(2, 20), *range(25, 47)]}
    found = spec.discover().build_config({"hidden": 40}, scalars={0.01: 0.01 * 60 / 40})
    assert changed(found) == {"hidden_size": 40, "head_dim": 10, "rms_norm_eps": 0.01 * 60 / 40}
    assert spec.model.config.rms_norm_eps == 0.01
    state = {name: t * (60 / 40) ** 0.5 if "norm" in name else t for name, t in spec.cut(keep).items()}
    small = found.model_class(found.config).eval()
    small.load_state_dict(state)
    tokens = torch.randint(VOCAB, (2, 9))
    with torch.no_grad():
        assert (small(tokens).logits - spec.masked_logits(keep, tokens)).abs().max() < 1e-5


def test_a_field_of_an_inner_config():
    text = AutoConfig.for_model("llama", vocab_size=VOCAB, **grouped(48)).to_dict()
    vision = {"model_type": "clip_vision_model", "image_size": 14, "patch_size": 7}
    vision |= {"hidden_size": 36, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=7)
    rules = {r"language_model.*(gate|up)_proj": ("ffn", 48), r"language_model.*down_proj": (48, "ffn")}
    spec = Spec(LlavaForConditionalGeneration(config), {"ffn": 80}, [48, 36, 56, 10, VOCAB], rules)
    found = spec.probe({"ffn": 64})
    assert changed(found) == {"text_config.intermediate_size": 64}
    assert found.config.text_config.intermediate_size == 64


class ListedConfig(PreTrainedConfig):
    model_type = "listed"
    ffn_sizes: list[int] | None = None
    hidden_size: int = 12


class Listed(PreTrainedModel):
    config_class = ListedConfig

    def __init__(self, config: ListedConfig) -> None:
        super().__init__(config)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(config.hidden_size, n) for n in config.ffn_sizes)
        self.post_init()


def test_a_list_of_layer_sizes():
    model = Listed(ListedConfig(ffn_sizes=[20, 28, 20, 28]))
    rules = {rf"layers.{at}.weight": (name, 12) for at, name in (("[02]", "narrow"), ("[13]", "wide"))}
    rules |= {r"layers.[02].bias": ("narrow",), r"layers.[13].bias": ("wide",)}
    spec = Spec(model, {"narrow": 20, "wide": 28}, [12], rules)
    assert spec.probe({"narrow": 15}).changes == {"ffn_sizes": ([20, 28, 20, 28], [15, 28, 15, 28])}
    assert changed(spec.discover().build_config({"narrow": 15, "wide": 21})) == {"ffn_sizes": [15, 21, 15, 21]}


def test_a_cut_of_some_layers_only_and_other_names_are_refused():
    spec = llama()
    kind, config = type(spec.model), spec.model.config
    target = {n: s if ".1." in n else spec.old[n] for n, s in spec.shapes({"ffn": 40}).items()}
    grown = find_growth(spec.old, {"ffn": 80}, spec.shapes)
    refusal = refused(probe_config(kind, config, target, grown, {"ffn": (80, 40)}, [2, 3, 48, 10]))
    assert (refusal.kind, refusal.reason) == ("shape", "it would be (40, 48), but the cut leaves (80, 48)")
    target = {**spec.old, "extra.weight": (3,)}
    refusal = refused(probe_config(kind, config, target, {}, {"ffn": (80, 40)}, []))
    assert (refusal.kind, refusal.where) == ("names", "extra.weight")


def test_a_class_that_its_own_config_does_not_build():
    model = build("llama", **grouped(48))
    model.config.hidden_act = "no-such-function"
    with expect_error(ModelError):
        probe_config(type(model), model.config, {}, {}, {}, [])
