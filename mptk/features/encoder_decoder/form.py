"""encoder_decoder_form: an encoder–decoder as ONNX: two graphs, divided at the encoder's last hidden state.

The whole is traced, analysed and cut as one program, so both parts follow the plan. The encoder's last hidden state is
no output meanwhile: the plan may cut its channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from mptk.compat.torch import check
from mptk.errors import TargetError
from mptk.ir import Samples
from mptk.ort.decoder import DECODER_IDS, DECODER_NAMES, ENCODER_FILE, HIDDEN, OrtEncoderDecoder
from mptk.ort.graph_files import MERGED_FILE
from mptk.protocols import PROOF_SHAPE, Dense, GraphCase, OnnxForm, Part, Traced, Use
from mptk.tasks.decoder_form import UNPADDED
from mptk.tasks.inputs import choose_inputs
from mptk.tasks.inputs.base import PIXELS, Named
from mptk.tasks.inputs.text import make_example_ids
from mptk.tasks.model_form import LOGITS
from mptk.tasks.onnx_export import is_same_output, trace_named
from mptk.tasks.onnx_proof import compare_logits, draw_row_counts, draw_texts, list_whole_cases
from mptk.tasks.padding import IDS, MASK, TYPES, with_mask
from passes.frontend.trace_decoder import (
    PAST,
    CacheLayerShape,
    cache_argument,
    cache_shapes,
    fill_cache,
    make_zero_cache,
)
from passes.targets.onnx.names import CACHE, Axes

ENCODER_INPUTS = (IDS, MASK, TYPES, PIXELS, "input_features", "input_values")
"""Of text, images and sound."""
TEXT_AXES: Axes = ("batch_size", "encoder_sequence_length")
DECODER_AXES: dict[str, Axes] = {
    "input_features": ("batch_size", "feature_size", "encoder_sequence_length"),
    DECODER_IDS: ("batch_size", "decoder_sequence_length"),
}
SIDES = ("decoder", "encoder")
"""Of a layer's caches, in their order: of the text, and of what the decoder reads of the encoder."""
POSITIONS_READ = 3
"""Positions of the second cache in a trace: some of the encoder's."""


class RestLayer(DynamicLayer):
    """A layer's cache of the encoder's output. Each call gives it all positions; it adds the missing ones."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        rest = slice(self.keys.shape[2], None)
        return super().update(key_states[:, :, rest], value_states[:, :, rest], *args, **kwargs)


class EncoderDecoderStep(nn.Module):
    """Calls an encoder–decoder with named tensors and both caches.

    Inputs: the model's, by ``names``, then for each layer the keys and values of the text so far [B, heads, P, dim] and
    of the encoder's output [B, heads, E, dim], in which E is 0 or as long as that output. Returns the logits, the
    caches now, and the encoder's last hidden state.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, tuple(names)
        self.cache_argument = cache_argument(module)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, inputs, strict=True))
        text, read = ([x for name, x in given.items() if f".{side}." in name] for side in SIDES)
        # Otherwise the trace would give each layer's cache a length of its own.
        for part in (text, read):
            check(all(x.shape[2] == part[0].shape[2] for x in part))
        cache = EncoderDecoderCache(fill_cache(text), fill_cache(read, RestLayer))
        # transformers takes a layer marked as updated as it is. Unmarked, it computes keys and values of the encoder's
        # output again, and ``RestLayer`` takes the ones that the cache lacks: all in the first call, none later.
        cache.is_updated = dict.fromkeys(cache.is_updated, False)
        named: dict[str, Any] = {name: x for name, x in given.items() if not name.startswith(CACHE)}
        output = self.module(**named, **{self.cache_argument: cache}, use_cache=True)
        both: Any = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
        now = [x for layer in both for part in layer for x in (part.keys, part.values)]
        return (output.logits, *now, output.encoder_last_hidden_state)


def trace_both(dense: Dense, samples: Samples | None) -> Traced:
    """A step with both caches, which also gives the encoder's last hidden state."""
    model = dense.loaded.model
    example = {**choose_inputs(model).make_example(model), DECODER_IDS: make_example_ids(length=5)}
    past = make_trace_caches(cache_shapes(model, example))
    shown = Samples(example) if samples is None else samples.shorten(*PROOF_SHAPE)
    traced = trace_named(dense, EncoderDecoderStep, {**example, **past}, shown, keep_output)
    check_continues(traced, dense, with_mask(shown.inputs))
    return replace(traced, axes={name: name_cache_axes(name) for name in past})


def keep_output(output: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits, of which none are at padding: that is in the encoder's text."""
    return output


def make_trace_caches(shapes: Sequence[CacheLayerShape]) -> Named:
    """Both caches to trace with, under optimum's names."""
    layers, places = range(len(shapes) // 2), zip(shapes, (PAST, POSITIONS_READ) * len(shapes), strict=False)
    names = [f"{CACHE}{layer}.{side}.{part}" for layer in layers for side in SIDES for part in ("key", "value")]
    found = [x for shape, length in places for x in make_zero_cache([shape], 2, length)]
    return dict(zip(names, found, strict=True))


def name_cache_axes(name: str) -> Axes:
    """The names of the axes of a cache."""
    side = next(side for side in SIDES if f".{side}." in name)
    return "batch_size", None, f"past_{side}_sequence_length", None


def check_continues(traced: Traced, dense: Dense, inputs: Mapping[str, Tensor]) -> None:
    """Raise MptkError if the logits after a cache differ from a whole text's."""
    executor, ids = dense.executor, inputs[DECODER_IDS]
    caches = [name for name in traced.names if name.startswith(CACHE)]
    # Half of the text, then the other half behind the cache of the first.
    first, second = (ids.shape[1] + 1) // 2, slice((ids.shape[1] + 1) // 2, None)
    start, *present, _ = traced.run_all(executor, {**inputs, DECODER_IDS: ids[:, :first]})
    cache = dict(zip(caches, present, strict=True))
    end = traced.run(executor, {**inputs, DECODER_IDS: ids[:, second], **cache})
    if not is_same_output(torch.cat([start, end], 1), traced.run(executor, inputs)):
        name = type(dense.loaded.model).__name__
        raise TargetError(f"{name} with its own cache computes other logits than for the whole text", name=name)


def run_steps(graphs: OrtEncoderDecoder, use: Use, samples: Samples) -> Tensor:
    """The logits of the text in several calls."""
    ids = samples.inputs[DECODER_IDS]
    prompts, calls = UNPADDED.split_calls(len(ids), ids.shape[1], use.crossed)
    return graphs(with_mask(samples.inputs), [prompts[0], *calls])


def draw_lengths(samples: Samples, seed: str, longer: bool) -> Iterable[Samples]:
    """Texts of other lengths if the program takes any, else more samples at once."""
    return (draw_texts if longer and IDS in samples.inputs else draw_row_counts)(samples, seed)


WHOLE_CASE, PADDED_CASE = list_whole_cases(OrtEncoderDecoder.__call__, keep_output)
ENCODER_DECODER_FORM = OnnxForm(
    trace_both,
    OrtEncoderDecoder,
    (WHOLE_CASE, GraphCase("ONNX Runtime steps", run_steps), PADDED_CASE),
    compare_logits,
    outputs=(LOGITS,),
    axes=DECODER_AXES,
    other_axes=TEXT_AXES,
    parts=(
        Part(ENCODER_FILE, {name: name for name in ENCODER_INPUTS}, (HIDDEN,)),
        Part(MERGED_FILE, DECODER_NAMES),
    ),
    between=(HIDDEN,),
    draw=draw_lengths,
    float_only="an encoder-decoder",
)
"""``encoder_model.onnx``, and ``decoder_model_merged.onnx`` with both its caches."""
