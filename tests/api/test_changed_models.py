"""Models in memory that are not what their class makes of config and weights, and modules that give no two equal results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_modules import Net
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import mptk
from mptk import testing
from mptk.errors import ModelError, TraceError
from mptk.testing import expect_error

IDS = torch.arange(3, 51).view(2, 24)
X = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))


def prune(model: nn.Module, **keywords: Any) -> mptk.Pruned:
    given = {"method": "magnitude", "tolerance": 0.6, "progress": None, "data": IDS, "samples": 2, "length": 24}
    small = mptk.prune(model, **{"sparsity": 0.2} | given | keywords)
    assert small is not None
    return small


def put(path: str, name: str, value: object) -> Callable[[LlamaForCausalLM], object]:
    return lambda model: setattr(model.get_submodule(path), name, value)


def hooked(model: LlamaForCausalLM) -> object:
    return model.model.layers[0].mlp.register_forward_hook(lambda module, given, result: result * 1.3)


def hooked_before(model: LlamaForCausalLM) -> object:
    return model.model.layers[0].mlp.register_forward_pre_hook(lambda module, given: (given[0] * 1.3,))


def another_forward(model: LlamaForCausalLM) -> None:
    own = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: own(x) * 1.3


def another_config(model: LlamaForCausalLM) -> None:
    model.config.rms_norm_eps = 0.3


CHANGES = {
    "a hook": (hooked, "model.layers.0.mlp"),
    "a hook before": (hooked_before, "model.layers.0.mlp"),
    "a forward": (another_forward, "model.layers.0.mlp"),
    "an epsilon": (put("model.layers.1.input_layernorm", "variance_epsilon", 0.5), "model.layers.1.input_layernorm"),
    "an activation": (put("model.layers.1.mlp", "act_fn", nn.GELU()), "model.layers.1.mlp.act_fn"),
    "a scale": (put("model.layers.1.self_attn", "scaling", 2.0), "model.layers.1.self_attn"),
    "the config": (another_config, "model.layers.0.input_layernorm"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_module_is_named_that_computes_otherwise_than_its_class(change):
    model = testing.make_llama()
    make, path = CHANGES[change]
    make(model)
    with expect_error(ModelError, name=path):
        prune(model)


def test_a_graph_holds_the_hook_that_a_class_does_not():
    model = testing.make_llama(layers=1)
    hooked(model)
    small = prune(model, target="graph", onnx=False).model
    assert torch.isfinite(small(IDS)).all()


def test_a_proof_that_fails_by_little_names_the_module_too():
    model = testing.make_llama()
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, result: result * 1.003)
    with expect_error(ModelError, name="model.layers.0.mlp"):
        prune(model)


@pytest.mark.parametrize("there_and_back", [False, True])
def test_a_model_that_was_converted_to_half_precision_by_hand(there_and_back):
    """``.to`` rounds the rotary frequencies, which the class of the folder makes anew."""
    model = testing.draw_weights(testing.make_llama(max_position_embeddings=512), 0.3).to(torch.bfloat16)
    model = model.float() if there_and_back else model
    rounded = model.model.rotary_emb.inv_freq.clone()
    small = prune(model, data=torch.arange(600).view(2, 300) % 290 + 3, length=300)
    assert torch.equal(model.model.rotary_emb.inv_freq, rounded), "the caller's model stays as it is"
    assert small.model.dtype is (torch.float32 if there_and_back else torch.bfloat16)


def test_a_module_in_two_layers_is_cut_once():
    model = testing.make_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    small = prune(model, families=("ffn",)).model
    first, second = (layer.mlp.gate_proj.weight for layer in small.model.layers)
    assert first.shape[0] < 64
    assert torch.equal(first, second)


# ---- two runs of a module differ ----


class Dropped(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(self.up(x).relu(), 0.5, training=True))


class Written(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.add_(1.0))


class Harmless(Net):
    """Draws numbers that change nothing, and writes what is there."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training).clamp_(-9.0, 9.0)) + 0.0 * torch.rand(1)


@pytest.mark.parametrize("module", [Dropped, Written])
def test_two_runs_that_differ_are_said_before_any_work(module):
    with expect_error(TraceError, name=module.__name__):
        mptk.prune(module().eval(), sparsity=0.3, align="1", example_inputs=X, progress=None)


def test_a_cut_of_a_module_that_draws_is_not_called_wrong():
    analysis = mptk.analyze(Dropped().eval(), (X,))
    plan = mptk.Plan({"ffn": mptk.FamilyPlan(20, 40, {"": (tuple(range(20)),)})})
    with expect_error(TraceError, name="the module"):
        mptk.rewrite(analysis, plan)


def test_what_draws_or_writes_without_effect_is_pruned():
    assert mptk.prune(Harmless().eval(), sparsity=0.3, align="1", tolerance=0.3, example_inputs=X, progress=None)


# ---- inputs, hooks and types ----


class Sum(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x - 2 * y)


@pytest.mark.parametrize("given", [(X, X), (X, X[:]), {"x": X, "y": X}], ids=["twice", "a view", "by name"])
def test_one_tensor_for_two_inputs_is_two_inputs(given):
    net, other = Sum().eval(), torch.randn_like(X)
    program = mptk.trace(net, given)
    assert torch.equal(program(X, other), net(X, other))
    small = mptk.prune(net, sparsity=0.3, align="1", tolerance=0.3, example_inputs=given, progress=None)
    assert small is not None
    assert small.model(X, other).shape == (3, 6, 4)


def test_a_hook_that_reads_its_inputs_by_position_gets_them():
    net = Net().eval()
    net.register_forward_pre_hook(lambda module, given: (given[0] * 2,))
    net.register_forward_hook(lambda module, given, result: result + given[0].mean())
    small = mptk.prune(net, sparsity=0, example_inputs=X, progress=None)
    assert small is not None
    assert torch.allclose(small.model(X), net(X), atol=1e-5)
