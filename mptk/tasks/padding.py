"""padding: the inputs by which a text model knows its padding, and batches with padding to prove that it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from mptk.io import Loaded
from mptk.tasks.inputs.base import Named, select_accepted

IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"
EXTRA_TOKENS = 3
"""Tokens of padding that the proof adds to each row."""
PADDING_KEY = "padding_token"
"""The key in a graph's metadata of the token that pads its rows; missing if padding changes what it computes."""
POSITIONS_KEY = "positions"
"""The key of the longest row; missing if any length will do."""
Unpadded = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""Outputs and the inputs without padding → the outputs without those at padding."""


def has_token_ids(inputs: Mapping[str, Tensor]) -> bool:
    """Whether a model reads text."""
    return IDS in inputs


def with_mask(inputs: Mapping[str, Tensor]) -> Named:
    """The inputs with a mask of ones and types of zeros after the token ids, if they are token ids."""
    if not has_token_ids(inputs):
        return dict(inputs)
    ids = inputs[IDS]
    given = {IDS: ids, MASK: torch.ones_like(ids), TYPES: torch.zeros_like(ids)}
    return given | {name: tensor for name, tensor in inputs.items() if name != IDS}


def pad_samples(inputs: Mapping[str, Tensor], token: int) -> Named:
    """``with_mask`` with padding to the right of each row, between a row that is longer and one that is shorter.

    These two are the first row once more; nobody asks what a model computes for them.
    """
    given, length = with_mask(inputs), inputs[IDS].shape[1]
    fill = {IDS: token, MASK: 0, TYPES: 0}

    def pad_rows(name: str, x: Tensor) -> Tensor:
        if name not in fill:
            return torch.cat([x[:1], x, x[:1]])
        longer, shorter = torch.cat([x, x], 1)[:1, : length + EXTRA_TOKENS], x[:1, : length // 2]
        return torch.cat(
            [F.pad(part, (0, length + EXTRA_TOKENS - part.shape[1]), value=fill[name]) for part in (longer, x, shorter)]
        )

    return {name: pad_rows(name, x) for name, x in given.items()}


def list_input_choices(loaded: Loaded, inputs: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """The names of the inputs that a text model may be given, the tokenizer's first: with types of tokens and without.

    The types are left out first if neither the tokenizer nor the config knows any.
    """
    # ``forward`` of many classes takes token types that their tokenizer never makes.
    names = list(select_accepted(loaded.model, with_mask(inputs)))
    plain = [name for name in names if name != TYPES]
    known = getattr(loaded.tokenizer, "model_input_names", None) or []
    typed = TYPES in known or (getattr(loaded.model.config, "type_vocab_size", None) or 0) > 1
    if TYPES in names and typed:
        yield names
    yield plain


def describe_padding(model: PreTrainedModel) -> dict[str, str]:
    """What a graph's metadata says of padding, if the model computes the same with it."""
    config = model.config.get_text_config()
    token, positions = (getattr(config, name, None) for name in ("pad_token_id", "max_position_embeddings"))
    said = {PADDING_KEY: str(token if isinstance(token, int) and token >= 0 else 0)}
    return said | ({POSITIONS_KEY: str(positions)} if isinstance(positions, int) and positions > 0 else {})


def pad_by_metadata(inputs: Mapping[str, Tensor], said: Mapping[str, str]) -> tuple[Named, slice]:
    """``pad_samples`` as a graph's metadata says, and which of its rows are the rows of ``inputs``.

    Without padding if the metadata say nothing of it, or rows would be too long.
    """
    longest = int(said.get(POSITIONS_KEY, "0")) or inputs[IDS].shape[1] + EXTRA_TOKENS
    if PADDING_KEY not in said or inputs[IDS].shape[1] + EXTRA_TOKENS > longest:
        return with_mask(inputs), slice(None)
    return pad_samples(inputs, int(said[PADDING_KEY])), slice(1, -1)


def remove_padding(output: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """An output [samples, positions, channels] at the positions of ``inputs``; one of whole samples stays."""
    return output[:, : inputs[IDS].shape[1]] if output.ndim > 2 else output
