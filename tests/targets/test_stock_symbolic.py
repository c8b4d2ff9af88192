"""A stock class read as expressions of its config's fields: what they say, and where a build must decide."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from stock_specs import Spec, changed, llama, qwen2, refused
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedConfig, PreTrainedModel, T5Config, T5ForConditionalGeneration

from benchmarks.tiny_models import tiny_model
from passes.targets.stock.symbolic import Reading


class ToyConfig(PreTrainedConfig):
    model_type = "toy"
    width: int = 12
    half: int = 5
    kinds: list[int] | None = None
    part: int = 5


class Toy(PreTrainedModel):
    """``inner`` says how many units its second layer has."""

    config_class = ToyConfig
    inner: Callable[[ToyConfig], int] = staticmethod(lambda config: 2 * config.half)

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.up, self.part = nn.Linear(config.width, type(self).inner(config), bias=False), config.part
        self.post_init()

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Each half, as a recurrence divides its channels."""
        return self.up(values).view(-1, 2, self.part)


def toy(inner: Callable[[ToyConfig], int]) -> type[Toy]:
    """A class of its own, as what is known of a class is kept."""
    return type("Toy", (Toy,), {"inner": staticmethod(inner)})


class HeadsConfig(PreTrainedConfig):
    model_type = "heads"
    channels: int = 12
    heads: int = 6


class Heads(PreTrainedModel):
    """A layer of ``heads`` heads, each of ``channels``."""

    config_class = HeadsConfig

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config)
        self.channels, self.up = config.channels, nn.Linear(7, config.heads * config.channels, bias=False)
        self.post_init()


@pytest.mark.parametrize("channels", [11, 12, 18])
def test_of_two_fields_in_a_product_the_one_of_the_family_s_width_follows_it(channels):
    """Also if the other could be divided like it."""
    spec = Spec(Heads(HeadsConfig(channels=channels)), {"heads": 6}, [7, channels], {"up": ((channels, "heads"), 7)})
    assert changed(spec.discover().build_config({"heads": 4})) == {"heads": 4}


def test_other_values_of_the_fields_give_the_shapes_of_a_real_build():
    """BERT makes an ``int`` of a quotient, T5 writes into its config."""
    bert = BertConfig(hidden_size=48, num_attention_heads=4, intermediate_size=80, num_hidden_layers=1, vocab_size=101)
    t5 = T5Config(d_model=48, d_kv=10, d_ff=80, num_layers=1, num_heads=4, vocab_size=101)
    changes = {"hidden_size": 36, "num_attention_heads": 3, "d_model": 40, "num_heads": 3, "d_kv": 8, "d_ff": 72}
    for model_class, config in ((BertModel, bert), (T5ForConditionalGeneration, t5)):
        reading = Reading(model_class, config)
        own = {field: changes[field.name] for field in reading.fields if field.name in changes}
        other = type(config)(**{**config.to_dict(), **{field.name: value for field, value in own.items()}})
        with torch.device("meta"):
            real = {name: tuple(t.shape) for name, t in model_class(other).state_dict().items()}
        assert len(own) >= 2
        assert reading.find_sizes(own).shapes == real != reading.dense.shapes


def test_an_open_field_stands_for_what_it_is_derived_from():
    reading = Reading(type(qwen2().model), qwen2().model.config)
    (pin,) = reading.pins
    heads = next(field for field in reading.fields if field.name == "num_attention_heads")
    query = "model.layers.0.self_attn.q_proj.weight"
    assert (pin.name, pin.value) == ("head_dim", 10)
    assert reading.find_sizes({heads: 4, pin: 10}).shapes[query] == (40, 60)
    assert reading.drop_implicit({heads: 4, pin: 15}) == {heads: 4}, "what the class makes of 4 heads"
    assert reading.drop_implicit({heads: 4, pin: 10}) == {heads: 4, pin: 10}


def test_what_a_class_decides_by_a_size_is_found_by_a_build():
    """Both trial cuts of ``half`` fit the expressions, but the class gives narrow models another shape."""
    kind = toy(lambda config: 2 * config.half if config.half > 4 else 11)
    spec = Spec(kind(ToyConfig()), {"half": 5}, [12, 2], {"up": (("half", 2), 12)})
    refusal = refused(spec.probe({"half": 3}))
    assert refusal.reason == "it would be (11, 12), but the cut leaves (6, 12)"
    assert spec.discover().refusals == {"half": refusal}


def test_a_number_that_cannot_be_a_symbol_stays_a_number():
    kind = toy(lambda config: (json.loads(str(config.kinds[0])) - 1) * config.half)
    spec = Spec(kind(ToyConfig(kinds=[3, 1])), {"half": 5}, [12, 2], {"up": ((2, "half"), 12)})
    stock = spec.discover()
    assert changed(stock.build_config({"half": 4})) == {"half": 4}


def test_a_size_that_no_weight_shows_is_found_by_a_forward_pass():
    spec = Spec(Toy(ToyConfig()), {"half": 5}, [12, 2], {"up": ((2, "half"), 12)})

    def forward(model: PreTrainedModel) -> None:
        model(torch.ones(3, 12, device="meta"))

    def never(model: PreTrainedModel) -> None:
        raise ValueError("numbers, please")

    stock = spec.discover(forward=forward)
    assert "shape '[-1, 2, 5]' is invalid" in refused(stock.check_widths({"half": 4})).reason
    # The class before the cut does not run, either.
    assert spec.discover(forward=never).check_widths({"half": 4}) is None


def test_a_number_that_may_have_to_follow_a_width_is_not_left_as_it_is():
    """The class takes a half of three channels, but not of four, for six parts, which may be the channels."""

    def inner(config: ToyConfig) -> int:
        if 6 % config.half:
            raise ValueError("no whole parts")
        return 2 * config.half

    kind = toy(inner)
    for part, ok in ((6, False), (7, True)):
        spec = Spec(kind(ToyConfig(half=6, part=part)), {"half": 6}, [12, 2], {"up": ((2, "half"), 12)})
        assert (spec.discover().check_widths({"half": 3}) is None) == ok


def test_a_width_that_the_class_rounds_is_refused_without_a_build():
    kind = toy(lambda config: (config.half + 1) // 2 * 4)
    spec = Spec(kind(ToyConfig(half=6)), {"half": 6}, [12, 2], {"up": ((2, "half"), 12)})
    stock = spec.discover()
    assert [width for width in range(1, 6) if stock.check_widths({"half": width}) is None] == [2, 4]


def test_a_class_that_takes_no_symbols_is_refused_with_its_reason():
    def inner(config: ToyConfig) -> int:
        if type(config.width) is not int:
            raise TypeError("a plain number, please")
        return 2 * config.width

    kind = toy(inner)
    spec = Spec(kind(ToyConfig()), {"width": 12}, [2], {"up": ((2, "width"), "width")})
    refusal = refused(spec.discover().check_widths({"width": 8}))
    assert (refusal.kind, refusal.reason) == ("constructor", "TypeError: a plain number, please")


def test_reading_leaves_no_trace_and_torch_does_not_warn(capfd):
    """Of what symbols leave open."""
    for model in (llama().model, tiny_model("causal-lm", "inkling2_loop_text").model):
        before = model.config.to_dict()
        Reading(type(model), model.config)
        assert model.config.to_dict() == before
        assert "int" not in vars(__import__(type(model).__module__, fromlist=["_"]))
    assert "evaluate_expr" not in capfd.readouterr().err
