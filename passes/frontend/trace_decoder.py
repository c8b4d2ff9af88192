"""trace_decoder: a causal language model → a Program of one decode step that takes and returns the KV cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from mptk.compat.torch import FakeTensorMode, check
from mptk.errors import MptkError, TraceError
from mptk.ir import Program
from mptk.staged.staged import EXECUTOR, Executor
from passes.frontend.trace import export_program, hold_evaluation_mode

BATCH, SEQUENCE, PAST = 2, 11, 23
"""Example sizes. They are distinct, and neither they nor PAST + SEQUENCE = 34 are likely to occur in a config."""

ONLY = "a decoder can be traced only if every layer caches its keys and values"

PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
"""Cache layers that hold only keys and values. Their subclasses may hold more."""

LogitsScope = Literal["all", "last"]


@dataclass(frozen=True)
class CacheLayerShape:
    """The shapes of a layer's cache: keys [batch, heads, tokens, key_dim], values [batch, heads, tokens, value_dim]."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype


class DecoderStep(nn.Module):
    """Calls a causal language model with a flat cache.

    Inputs: input_ids [B, S], attention_mask [B, P + S], position_ids [B, S] from 0, then each layer's past key and
    past value [B, heads, P, dim]. Returns (logits, key, value, key, value, ...), the cache now of length P + S.

    ``first_position`` is the model's own number of the first token. None: the model derives positions itself.

    Every layer's cache is kept whole, even if the model attends through a sliding window (its mask does that), since
    ONNX consumers expect one past length for all layers.
    """

    def __init__(self, module: PreTrainedModel, logits: LogitsScope = "all") -> None:
        super().__init__()
        self.module = module
        accepted = inspect.signature(module.forward).parameters
        self.cache_argument = cache_argument(module)
        # ``trace_decoder`` tries other numbers for the first position if 0 gives other logits.
        self.first_position = 0 if "position_ids" in accepted else None
        self.keywords: dict[str, int] = {"use_cache": True}
        # The model's own switch saves the output projection of all other positions. Without it they are sliced off.
        if logits == "last" and "logits_to_keep" in accepted:
            self.keywords["logits_to_keep"] = 1
        self.slice_last = logits == "last" and "logits_to_keep" not in accepted
        self.train(module.training)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        input_ids, *others = inputs
        return self.step({"input_ids": input_ids}, *others)

    def step(
        self, tokens: Mapping[str, Tensor], attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """The outputs for new ``tokens``, by the argument: ids [B, S] or embeddings [B, S, hidden]."""
        (new,) = tokens.values()
        # Tell torch.export that the mask covers past and new tokens. Otherwise it is a third, unrelated length.
        check(attention_mask.shape[1] == past[0].shape[2] + new.shape[1])
        cache = fill_cache(past)
        keywords = {**self.keywords, "attention_mask": attention_mask, self.cache_argument: cache}
        if self.first_position is not None:
            # No addition of 0: it would be a call in every graph.
            keywords["position_ids"] = position_ids + self.first_position if self.first_position else position_ids
        logits: Tensor = self.module(**tokens, **keywords).logits
        if self.slice_last:
            logits = logits[:, -1:]
        return (logits, *(tensor for key_value in cache for tensor in key_value[:2]))


def cache_argument(module: nn.Module) -> str:
    """The argument of a model's ``forward`` that takes the cache."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def fill_cache(past: Iterable[Tensor], kind: type[DynamicLayer] = DynamicLayer) -> DynamicCache:
    """A cache that holds ``past``: key, value, key, value, ..., each [batch, heads, tokens, dim]."""
    cache = DynamicCache()
    tensors = iter(past)
    for key in tensors:
        layer = kind()
        layer.keys, layer.values = key, next(tensors)
        layer.device, layer.is_initialized = key.device, True  # otherwise the first update replaces what it holds
        cache.layers.append(layer)
    return cache


def trace_decoder(
    model: PreTrainedModel,
    *,
    logits: LogitsScope = "all",
    weights: Callable[[Program], Program] = lambda program: program,
    dense: Callable[[Tensor], Tensor] | None = None,
    executor: Executor = EXECUTOR,
) -> Program:
    """Trace one decode step of ``model``, with batch, sequence and past length symbolic.

    The program has the inputs and outputs of :class:`DecoderStep`. The past may be empty (prefill). The number of
    layers, heads and head sizes come from the cache that the model's plain forward fills.

    Args:
        model: a causal language model of transformers whose cache holds attention keys and values. Weights may be
            real (the program shares their storage) or on meta (the program's weights are fake).
        logits: ``"all"`` positions, [B, S, vocab], or only the ``"last"``, [B, 1, vocab]. The last one saves the
            output projection of all others in prefill; batches must then be padded on the left.
        weights: gives the program real weights, if the model has none.
        dense: token ids → logits of the model's plain forward; None: the model itself runs it.
        executor: runs the program.

    Raises:
        MptkError: the model keeps another kind of state (a recurrent or convolutional one) or shares the cache between
            layers; torch.export refuses it; or, with real weights, the step has other logits than the model's
            plain forward.
    """
    shapes = cache_shapes(model)
    inputs = step_inputs(shapes)
    step = DecoderStep(model, logits)
    # No config says from where a model counts positions. So each way is traced, until the logits are the model's own.
    for first in list_first_positions(step):
        step.first_position = first
        program = weights(export_step(step, inputs))
        if not program.has_values or _has_model_logits(program, model, shapes, dense, executor):
            return program
    raise TraceError(
        f"one decode step of {type(model).__name__} with its own cache computes other logits than the whole sequence; "
        f"{ONLY}",
        name=type(model).__name__,
    )


def export_step(
    step: DecoderStep, inputs: tuple[Tensor, ...], before: Sequence[tuple[Tensor, Collection[int]]] = ()
) -> Program:
    """Export for all lengths; if the model slices a table of positions, for the lengths that the table has.

    ``before``: inputs that the step takes before ``inputs``, each with the dimensions whose sizes are open.
    """
    longest = getattr(step.module.config.get_text_config(), "max_position_embeddings", None)
    given = (*(tensor for tensor, _ in before), *inputs)
    others = [dict.fromkeys(dims, Dim.AUTO) for _, dims in before]
    try:
        return export_program(step, given, dynamic={"inputs": (*others, *_list_open_sizes(inputs))})
    except MptkError:
        # Past and new tokens share the table, and a symbolic size is at least 2: so each has at most ``longest`` − 2.
        if not isinstance(longest, int) or longest - 2 <= PAST:
            raise
        return export_program(step, given, dynamic={"inputs": (*others, *_list_open_sizes(inputs, longest - 2))})


def _list_open_sizes(inputs: Sequence[Tensor], longest: int | None = None) -> list[dict[int, object]]:
    """The open sizes of a step's inputs. ``longest``: most new tokens, and most past tokens; None: any number."""
    batch, sequence, past = (
        Dim("batch_size"),
        Dim("sequence_length", max=longest),
        Dim("past_sequence_length", max=longest),
    )
    ids, _, positions, *cache = inputs
    tokens, numbers = ({x.ndim - 2: batch, x.ndim - 1: sequence} for x in (ids, positions))
    return [tokens, {0: batch, 1: Dim.AUTO}, numbers, *({0: batch, 2: past} for _ in cache)]


def list_first_positions(step: DecoderStep) -> list[int | None]:
    """Candidates for ``first_position``: 0, padding id + 1 (some models reserve the numbers below), None."""
    padding = getattr(step.module.config.get_text_config(), "pad_token_id", None)
    if step.first_position is None:
        return [None]
    return [0, None] if padding is None else [0, padding + 1, None]


@torch.no_grad()
def _has_model_logits(
    program: Program,
    model: PreTrainedModel,
    shapes: list[CacheLayerShape],
    dense: Callable[[Tensor], Tensor] | None,
    executor: Executor,
) -> bool:
    """Whether a prompt and two more tokens get the logits of the model's plain forward, which sets positions itself."""
    # Padding ids would get positions of their own. Ids below 3 are often special tokens.
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids = torch.tensor([[token for token in range(3, 9) if token != padding]])
    positions = torch.arange(ids.shape[1])[None]
    cache = make_zero_cache(shapes, 1, 0)
    if dense is None:
        with hold_evaluation_mode(model):
            expected = model(input_ids=ids.to(model.device), use_cache=False).logits[:, -1]
    else:
        expected = dense(ids)[:, -1]

    def step(start: int, end: int, past: Sequence[Tensor]) -> tuple[Tensor, ...]:
        given = (ids[:, start:end], torch.ones_like(ids[:, :end]), positions[:, start:end], *past)
        made: tuple[Tensor, ...] = next(executor.run_programs([program], [given]))
        return made

    _, *cache = step(0, ids.shape[1] - 2, cache)
    found = step(ids.shape[1] - 2, ids.shape[1], cache)[0][:, -1].to(expected.device)
    # Rounding moves logits by far less, and a wrong position or mask by far more: 3e-4 in float32.
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


class FilledCache(nn.Module):
    """Calls a model with named tensors and returns the keys and values of its cache, flat.

    For an encoder–decoder: each layer's keys and values of the text, then the ones that it reads from the encoder.
    """

    def __init__(self, module: PreTrainedModel, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, tuple(names)
        self.train(module.training)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        output = self.module(**dict(zip(self.names, inputs, strict=True)), use_cache=True)
        cache = output["cache"] if "cache" in output else output.get("past_key_values")
        both = isinstance(cache, EncoderDecoderCache)
        # A subclass may hold more than keys and values, so only the exact type will do.
        parts = (cache.self_attention_cache, cache.cross_attention_cache) if both else (cache,)
        if not all(type(part) is DynamicCache for part in parts):
            raise TraceError(
                f"{type(self.module).__name__} returns no cache that holds only keys and values; {ONLY}",
                name=type(self.module).__name__,
            )
        layers = enumerate(zip(*(part.layers for part in parts), strict=True))
        return tuple(x for index, layer in layers for part in layer for x in _read_keys_values(index, part))


def _read_keys_values(index: int, layer: object) -> tuple[Tensor, Tensor]:
    if (
        not isinstance(layer, DynamicLayer)
        or layer.keys is None
        or layer.values is None
        or type(layer) not in PLAIN_LAYERS
    ):
        raise TraceError(f"layer {index} caches more or less than keys and values; {ONLY}", name=index)
    return layer.keys, layer.values


def cache_shapes(model: PreTrainedModel, example: Mapping[str, Tensor] | None = None) -> list[CacheLayerShape]:
    """The cache layers of ``model`` in order, from a plain forward on fake tensors (nothing is computed).

    ``example``: inputs of the model; None: token ids. A layer of an encoder–decoder has two (``FilledCache``).

    Raises:
        MptkError: the cache holds anything but keys and values, or the forward fails.
    """
    given = {"input_ids": torch.ones(BATCH, SEQUENCE, dtype=torch.long)} if example is None else example
    tensors = _make_fake_cache(FilledCache(model, list(given)), tuple(given.values()))
    return [
        CacheLayerShape(key.shape[1], key.shape[3], value.shape[3], key.dtype)
        for key, value in zip(tensors[::2], tensors[1::2], strict=True)
    ]


def _make_fake_cache(filled: FilledCache, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            named = [*filled.named_parameters(), *filled.named_buffers()]
            weights = {name: torch.empty_like(tensor, device="cpu") for name, tensor in named}
            cache: tuple[Tensor, ...] = torch.func.functional_call(filled, weights, tuple(x.clone() for x in given))
    except RuntimeError:  # a kernel without a fake version. In an export, which takes longer, models avoid these
        program = export_program(filled, given)
        outputs = cast("Sequence[fx.Node]", program.graph.graph.output_node().args[0])
        cache = tuple(node.meta["val"] for node in outputs)
    except MptkError:
        raise
    except Exception as error:  # a model's own check of its cache
        name = type(filled.module).__name__
        raise TraceError(
            f"{name} fails when it fills its own cache: {str(error) or type(error).__name__}; {ONLY}", name=name
        ) from error
    return cache


def make_zero_cache(shapes: Iterable[CacheLayerShape], batch: int, length: int) -> list[Tensor]:
    """A cache of zeros: key, value, key, value, ..., each [batch, heads, length, dim]."""
    return [
        torch.zeros(batch, shape.heads, length, dim, dtype=shape.dtype)
        for shape in shapes
        for dim in (shape.key_dim, shape.value_dim)
    ]


def step_inputs(shapes: Iterable[CacheLayerShape]) -> tuple[Tensor, ...]:
    """Inputs of a :class:`DecoderStep` to trace it with."""
    input_ids = torch.arange(BATCH * SEQUENCE).reshape(BATCH, SEQUENCE) % 11 + 1
    attention_mask = torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.long)
    position_ids = torch.arange(PAST, PAST + SEQUENCE).expand(BATCH, -1).contiguous()
    return input_ids, attention_mask, position_ids, *make_zero_cache(shapes, BATCH, PAST)
