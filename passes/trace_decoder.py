"""trace_decoder: a causal language model → a Program of one decoding step, with the KV cache as inputs and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mptk.errors import MptkError
from mptk.program import Program
from passes.trace import export_program

BATCH, SEQUENCE, PAST = 2, 11, 23
"""Example sizes: distinct, and neither they nor PAST + SEQUENCE = 34 are likely to equal a size in a config."""

Logits = Literal["all", "last"]


@dataclass(frozen=True)
class CacheLayerShape:
    """What one layer keeps of each token: keys [batch, heads, tokens, key_dim], values [batch, heads, tokens, value_dim]."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype


class DecoderStep(nn.Module):
    """Calls a causal language model with a flat cache.

    Positional inputs: input_ids [B, S], attention_mask [B, P + S], position_ids [B, S] (ignored by a model whose
    forward takes none), then for each layer the past key and the past value [B, heads, P, dim]. Returns (logits,
    key, value, key, value, ...), the cache now of length P + S.

    Every layer's cache is kept whole, also where the model attends through a sliding window (the mask does that): one
    past length for all layers is what ONNX consumers expect.
    """

    def __init__(self, module: PreTrainedModel, logits: Logits = "all") -> None:
        super().__init__()
        self.module = module
        accepted = inspect.signature(module.forward).parameters
        self.cache_argument = "cache" if "cache" in accepted else "past_key_values"
        self.takes_positions = "position_ids" in accepted
        self.keywords: dict[str, Any] = {"use_cache": True}
        if logits == "last" and "logits_to_keep" in accepted:
            self.keywords["logits_to_keep"] = 1
        self.slice_last = logits == "last" and "logits_to_keep" not in accepted
        self.train(module.training)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        input_ids, attention_mask, position_ids, *past = inputs
        torch._check(attention_mask.shape[1] == past[0].shape[2] + input_ids.shape[1])
        cache = filled_cache(past)
        keywords = {**self.keywords, "attention_mask": attention_mask, self.cache_argument: cache}
        if self.takes_positions:
            keywords["position_ids"] = position_ids
        logits: Tensor = self.module(input_ids=input_ids, **keywords).logits
        if self.slice_last:
            logits = logits[:, -1:]
        return (logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


def filled_cache(past: Iterable[Tensor]) -> DynamicCache:
    """A cache that holds ``past``: key, value, key, value, ..., each [batch, heads, tokens, dim]."""
    cache = DynamicCache()
    tensors = iter(past)
    for key in tensors:
        layer = DynamicLayer()
        layer.keys, layer.values = key, next(tensors)
        layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
        cache.layers.append(layer)
    return cache


def trace_decoder(model: PreTrainedModel, *, logits: Logits = "all") -> Program:
    """Trace one decoding step of ``model``, with batch, sequence and past length symbolic.

    The program's inputs and outputs are those of :class:`DecoderStep`; a past length of 0 is allowed (prefill). Number
    of layers, heads and head dimensions are read off the cache that a forward pass on fake tensors fills.

    Args:
        model: a causal language model of transformers whose cache holds attention keys and values. Weights may be
            real (the program shares their storage) or on the meta device (the program's weights are fake tensors).
        logits: ``"all"`` positions, [B, S, vocab], or the ``"last"`` only, [B, 1, vocab], which saves the output
            projection of the others in prefill; batches must then be padded on the left.

    Raises:
        MptkError: the model keeps another kind of state (a recurrent or convolutional one), shares the cache
            between layers, or torch.export refuses it.
    """
    shapes = cache_shapes(model)
    inputs = _example_inputs(shapes)
    batch, sequence, past = Dim("batch_size"), Dim("sequence_length"), Dim("past_sequence_length")
    token = {0: batch, 1: sequence}
    dynamic = (token, {0: batch, 1: Dim.AUTO}, token, *({0: batch, 2: past} for _ in inputs[3:]))
    return export_program(DecoderStep(model, logits), inputs, dynamic={"inputs": dynamic})


def cache_shapes(model: PreTrainedModel) -> list[CacheLayerShape]:
    """The cache layers of ``model`` in order, found by a forward pass on fake tensors (nothing is computed)."""
    cache = DynamicCache()
    step = DecoderStep(model)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        named = [*model.named_parameters(), *model.named_buffers()]
        weights = {name: torch.empty_like(tensor, device="cpu") for name, tensor in named}
        keywords = {"use_cache": True, step.cache_argument: cache}
        torch.func.functional_call(model, weights, (torch.ones(BATCH, SEQUENCE, dtype=torch.long),), keywords)
    return [_layer_shape(index, layer) for index, layer in enumerate(cache.layers)]


def _layer_shape(index: int, layer: Any) -> CacheLayerShape:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or type(layer) is not DynamicLayer:
        raise MptkError(
            f"cannot trace the decoder: layer {index} keeps no keys and values of its own in the cache; "
            "only models in which every layer does can be exported with a KV cache"
        )
    return CacheLayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)


def _example_inputs(shapes: list[CacheLayerShape]) -> tuple[Tensor, ...]:
    input_ids = torch.arange(BATCH * SEQUENCE).reshape(BATCH, SEQUENCE) % 11 + 1
    attention_mask = torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.long)
    position_ids = torch.arange(PAST, PAST + SEQUENCE).expand(BATCH, -1).contiguous()
    past = [
        torch.zeros(BATCH, shape.heads, PAST, dim, dtype=shape.dtype)
        for shape in shapes
        for dim in (shape.key_dim, shape.value_dim)
    ]
    return input_ids, attention_mask, position_ids, *past
