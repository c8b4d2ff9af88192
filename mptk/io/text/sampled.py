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

from mptk.errors import ModelError
from mptk.files import write_file
from mptk.io.cache import cache_dir
from mptk.plain import hash_text
from mptk.progress import Count

SAMPLED_NAME = "text sampled from the dense model (compares runs of this model only)"
"""What a perplexity on such text is said to be measured on."""

# Tokens that are written at once by default: their KV cache is in memory.
BATCH_TOKENS = 16384
# How text is sampled, in the names of files in the cache. Raise it if the same seed now gives other text.
_VERSION = 2


def sample_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    count: int,
    length: int,
    seed: int,
    first: int = 0,
    batch_size: int | None = None,
    progress: Count | None = None,
) -> Tensor:
    """Rows ``first`` to ``count`` of the text that the model writes, as tokens, int64 [count - first, length].

    This is ancestral sampling at temperature 1 from the full distribution, with a KV cache. Each row starts with the
    begin-of-sequence token, else the end-of-sequence token, else a uniformly random token. It does not stop at an end
    of sequence: the model continues with the next text, as in text packed for training. For one model, the result
    depends only on the seed, except for how batch size, device and threads round. Each row has random numbers of its
    own, so that a run that wants more rows gets the same ones first. The caller's random state does not change.

    Args:
        batch_size: rows sampled at once, by default as many as have 16,384 tokens. More take more memory and less time.
        progress: called with (tokens done, all tokens).

    Raises:
        MptkError: the model cannot generate text.
    """
    if not can_write_text(model):
        raise ModelError(
            f"{type(model).__name__} cannot write text to calibrate on; give some with --data",
            name=type(model).__name__,
        )
    report, total = progress or (lambda done, total: None), (count - first) * length
    size, rows = batch_size or count_rows_at_once(length), list[Tensor]()
    for start in range(first, count, size):
        # The numbers of a row depend on its own number and the seed, not on the batch.
        chances = torch.stack([_draw_chances(seed, row, length) for row in range(start, min(start + size, count))])
        draw = _Draw(chances, report, done=(start - first) * length, total=total)
        rows.append(_continue_rows(model, _choose_starts(model, tokenizer, chances[:, 0]), length, draw))
    report(total, total)
    return torch.cat(rows)


def count_rows_at_once(length: int) -> int:
    """Rows of ``length`` tokens that are written at once."""
    return max(1, BATCH_TOKENS // length)


def can_write_text(model: PreTrainedModel) -> bool:
    """Whether the model can write text without any to begin with: an encoder-decoder cannot."""
    return model.can_generate() and not model.config.is_encoder_decoder


def from_cache(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    count: int,
    length: int,
    seed: int,
    progress: Count | None = None,
) -> Tensor:
    """``sample_text``, whose rows are kept in the cache. Only rows that are not there are sampled."""
    # The first tokens are the tokenizer's, all else is the model's.
    start = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    known = (_VERSION, _hash_model(model), start, seed, length)
    path = cache_dir() / "self" / f"{hash_text(repr(known), 24)}.safetensors"
    found = _read(path, length)
    if len(found) < count:
        more = sample_text(model, tokenizer, count=count, length=length, seed=seed, first=len(found), progress=progress)
        found = torch.cat([found, more])
        _store(path, found)
    return found[:count]


def _read(path: Path, length: int) -> Tensor:
    """The rows of a file, [n, length]; none if it cannot be read or holds something else."""
    try:
        tokens = load_file(path)["tokens"]
        if tokens.dtype == torch.int64 and tokens.ndim == 2 and tokens.shape[1] == length:
            return tokens
    except (OSError, SafetensorError, KeyError):
        pass
    return torch.empty(0, length, dtype=torch.int64)


def _store(path: Path, tokens: Tensor) -> None:
    """Write it for the next run. If the cache cannot be written, the run goes on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda file: save_file({"tokens": tokens.contiguous()}, file))
    except OSError:
        return


def _hash_model(model: PreTrainedModel) -> str:
    """SHA-256 of a model's config and of the values of its weights."""
    found = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _draw_chances(seed: int, row: int, length: int) -> Tensor:
    """The random numbers from which a row is drawn, one a token, in [0, 1)."""
    own = hashlib.sha256(f"{seed} {row}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(own[:8], "big"))
    return torch.rand(length, generator=generator, dtype=torch.float64)


class _Draw(LogitsProcessor):
    """Draws the next token from the model's distribution, with one random number a row, and reports each step.

    Generation then takes the likeliest token, which is the drawn one. ``torch.multinomial`` would take a random number
    for each token of the vocabulary, a quarter of a small model's time.
    """

    def __init__(self, chances: Tensor, report: Count, done: int, total: int) -> None:
        self.chances, self.report, self.done, self.total = chances, report, done, total

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        at = input_ids.shape[1]
        self.report(self.done + len(scores) * at, self.total)
        # Inversion: the first token whose summed probability exceeds the random number. In float64, since the sum over
        # a vocabulary rounds; its last entry, near 1, scales the number.
        summed = scores.cpu().double().softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(summed, self.chances[:, at, None] * summed[:, -1:], right=True)
        drawn = drawn.clamp(max=scores.shape[-1] - 1).to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def _choose_starts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, chances: Tensor) -> Tensor:
    """The first token of each row, [rows, 1]; ``chances`` [rows] draw it if the model has no token to begin with."""
    # The beginning of both owners before the end of either.
    owners: Sequence[object] = (tokenizer, model.config)
    known = [getattr(owner, name, None) for name in ("bos_token_id", "eos_token_id") for owner in owners]
    first = next((token for token in known if isinstance(token, int)), None)
    if first is not None:
        return torch.full((len(chances), 1), first)
    size: int = model.config.get_text_config().vocab_size
    return (chances[:, None] * size).long()


@torch.no_grad()
def _continue_rows(model: PreTrainedModel, start: Tensor, length: int, draw: _Draw) -> Tensor:
    """Continue ``start`` [rows, 1] to [rows, length]."""
    # It replaces the checkpoint's generation config, whose settings would fill each gap of a config that is passed.
    # Without an end-of-sequence token no row ends early.
    settings = GenerationConfig(do_sample=False, max_new_tokens=length - 1)
    settings.pad_token_id = 0  # only silences a warning of transformers
    start = start.to(model.device)
    writer = cast("GenerationMixin", model)  # PreTrainedModel does not declare what generation needs
    own, writer.generation_config = writer.generation_config, settings
    try:
        tokens: Tensor = writer.generate(
            start, attention_mask=torch.ones_like(start), logits_processor=LogitsProcessorList([draw])
        )
    finally:
        writer.generation_config = own
    return tokens.cpu()
