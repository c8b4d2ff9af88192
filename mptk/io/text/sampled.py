"""sampled: text that the model writes, in batches with a KV cache, and its copy in the cache folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mptk.errors import MptkError
from mptk.files import write_file
from mptk.io.cache import cache_dir
from mptk.progress import Count

NAME = "text sampled from the dense model (compares runs of this model only)"
"""What a perplexity on such text is said to be measured on."""

_VERSION = 1
"""Of how text is sampled: another number, and no text of another version is taken from the cache."""


def sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    count: int,
    length: int,
    seed: int,
    batch_size: int = 32,
    progress: Count | None = None,
) -> Tensor:
    """Text that the model writes, as tokens, int64 [count, length]: ``data.self_sampled``."""
    if not writes(model):
        raise MptkError(f"{type(model).__name__} cannot write text to calibrate on; give some with --data")
    report = progress or (lambda done, total: None)
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    for first in range(0, count, batch_size):
        start = _starts(model, tokenizer, min(batch_size, count - first), generator)
        draw = _Draw(generator, report, done=first * length, rows=len(start), total=count * length)
        rows.append(_continued(model, start, length, draw))
    report(count * length, count * length)
    return torch.cat(rows)


def writes(model: PreTrainedModel) -> bool:
    """Whether the model writes text from nothing."""
    return model.can_generate() and not model.config.is_encoder_decoder


def kept(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    count: int,
    length: int,
    seed: int,
    progress: Count | None = None,
) -> Tensor:
    """As ``sampled``. Text for the same weights, seed, count and length is sampled once, then read from the cache."""
    start = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    known = (_VERSION, _digest(model), start, seed, count, length)
    path = cache_dir() / "self" / f"{hashlib.sha256(repr(known).encode()).hexdigest()[:24]}.safetensors"
    found = _read(path, (count, length))
    if found is None:
        found = sampled(model, tokenizer, count=count, length=length, seed=seed, progress=progress)
        _keep(path, found)
    return found


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    try:
        tokens = load_file(path)["tokens"]
    except (OSError, SafetensorError, KeyError):
        return None
    return tokens if tuple(tokens.shape) == shape and tokens.dtype == torch.int64 else None


def _keep(path: Path, tokens: Tensor) -> None:
    """Write it for the next run. A cache that cannot be written is no reason to stop."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda file: save_file({"tokens": tokens.contiguous()}, file))
    except OSError:
        return


def _digest(model: PreTrainedModel) -> str:
    """SHA-256 of a model's config and of the values of its weights."""
    found = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


class _Draw(LogitsProcessor):
    """Draws the next token from the model's distribution, with one random number a row, and reports each step.

    Generation then takes the likeliest token, which is the drawn one. To draw with ``torch.multinomial`` would take a
    random number for each token of the vocabulary, a quarter of a small model's time.
    """

    def __init__(self, generator: torch.Generator, report: Count, done: int, rows: int, total: int) -> None:
        self.generator, self.report, self.done, self.rows, self.total = generator, report, done, rows, total

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.report(self.done + self.rows * input_ids.shape[1], self.total)
        summed = scores.cpu().double().softmax(-1).cumsum(-1)
        at = torch.rand(len(scores), 1, generator=self.generator, dtype=torch.float64) * summed[:, -1:]
        drawn = torch.searchsorted(summed, at, right=True).clamp(max=scores.shape[-1] - 1).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def _starts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, rows: int, generator: torch.Generator
) -> Tensor:
    """The first token of each row, [rows, 1]."""
    owners: Sequence[object] = (tokenizer, model.config)
    known = [getattr(owner, name, None) for name in ("bos_token_id", "eos_token_id") for owner in owners]
    first = next((token for token in known if isinstance(token, int)), None)
    if first is not None:
        return torch.full((rows, 1), first)
    return torch.randint(model.config.get_text_config().vocab_size, (rows, 1), generator=generator)


@torch.no_grad()
def _continued(model: PreTrainedModel, start: Tensor, length: int, draw: _Draw) -> Tensor:
    """Continue ``start`` [rows, 1] to [rows, length]."""
    # It replaces the checkpoint's generation config, whose settings would fill each gap of a config that is passed.
    settings = GenerationConfig(do_sample=False, max_new_tokens=length - 1)
    settings.pad_token_id = 0  # Only silences a warning of transformers: no row ends early.
    start = start.to(model.device)
    writer = cast("GenerationMixin", model)  # PreTrainedModel does not declare what generation needs.
    own, writer.generation_config = writer.generation_config, settings
    try:
        tokens: Tensor = writer.generate(
            start, attention_mask=torch.ones_like(start), logits_processor=LogitsProcessorList([draw])
        )
    finally:
        writer.generation_config = own
    return tokens.cpu()
