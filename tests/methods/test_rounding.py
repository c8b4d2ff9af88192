"""Training for the weights of a quantised graph."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from learning_runs import LEARNING, SETTINGS, TRAINING, metrics
from torch import Tensor

import mptk
from mptk import testing
from mptk.errors import InputError
from mptk.methods.maskprune.rounding import WeightRounding, round_rows
from mptk.testing import expect_error
from passes.targets.onnx.block_weights import choose_format, round_to_blocks

AWARE = replace(LEARNING, steps=4, rank=None, quantize_aware=True, training=replace(TRAINING, lr=1e-4))


def unpack(weight: Tensor, bits: int, block: int) -> Tensor:
    """The values [outputs, inputs] that ONNX Runtime's quantiser makes of a weight, from its codes."""
    codes, scales, *points = round_to_blocks(weight.T.numpy(), bits, block)
    outputs, blocks = codes.shape[:2]
    zeros = np.full((outputs, blocks), 128.0)
    if points:
        codes, packed = (np.stack([a & 15, a >> 4], -1) for a in (codes, points[0].reshape(outputs, -1)))
        zeros = packed.reshape(outputs, -1)[:, :blocks]
    steps = codes.reshape(outputs, blocks, -1).astype(np.float32) - zeros[..., None].astype(np.float32)
    return torch.from_numpy(steps * scales.reshape(outputs, blocks, 1)).reshape(outputs, -1)[:, : weight.shape[1]]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [20, 64, 100, 300])
def test_weights_are_rounded_as_onnx_runtime_rounds_them(bits, inputs):
    weight = torch.randn(6, inputs)
    weight[1], weight[2], weight[3] = 0, weight[2].abs(), -weight[3].abs()
    _, block = choose_format(bits, inputs, logits=False)
    assert torch.equal(round_rows(weight, bits, block), unpack(weight, bits, block))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_inside_each_product_has_rounded_weights_whose_gradient_the_exact_ones_get(kind):
    model = testing.make_decoder(kind)
    exact = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = testing.draw_tokens()
    with WeightRounding(model, "int4").round_weights():
        inside = {name: p.detach().clone() for name, p in model.named_parameters()}
        rounded = model(input_ids=ids).logits
        rounded.square().mean().backward()
    matrices = {name for name, p in exact.items() if p.ndim == 2 and "norm" not in name}
    assert {name for name in exact if not torch.equal(exact[name], inside[name])} == matrices
    assert all(torch.equal(exact[name], p) for name, p in model.named_parameters())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.load_state_dict(inside, strict=False)
    logits = model(input_ids=ids).logits
    logits.square().mean().backward()
    torch.testing.assert_close(logits, rounded)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)


def test_a_run_trains_the_rounded_weights_and_writes_the_exact_ones(llama, tmp_path):
    settings = replace(SETTINGS, method="wanda", onnx=True, quantize=("int4",), learning=AWARE)
    aware = mptk.prune(llama, tmp_path / "aware", settings)
    plain = mptk.prune(llama, tmp_path / "plain", replace(settings, learning=replace(AWARE, quantize_aware=False)))
    losses = [run.report.recovery["losses"] for run in (aware, plain)]
    assert losses[0]["0"] != losses[1]["0"]  # before the first step the two differ only by the rounding
    assert losses[0]["4"] < losses[0]["0"]
    first = [metrics(tmp_path / name)[0]["loss"] for name in ("aware", "plain")]
    assert first[0] != first[1]  # so do the steps, which start from the same weights and samples
    assert all(stage["ok"] for stage in aware.report.proof)
    weight = aware.model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    _, block = choose_format(4, weight.shape[1], logits=False)
    assert not torch.equal(weight, round_rows(weight, 4, block))


@pytest.mark.parametrize(("quantize", "rank"), [((), 0), (("fp16",), 0), (("int8", "int4"), 0), (("int4",), 4)])
def test_it_needs_one_graph_and_all_weights(quantize, rank):
    with expect_error(InputError, name="quantize_aware"):
        replace(SETTINGS, onnx=True, learning=replace(AWARE, rank=rank or None), quantize=quantize)


def test_a_graph_has_no_layers_to_round(llama, tmp_path):
    settings = replace(SETTINGS, method="wanda", onnx=True, quantize=("int4",), learning=AWARE, target="graph")
    with expect_error(InputError, name="quantize_aware"):
        mptk.prune(llama, tmp_path / "out", settings)
