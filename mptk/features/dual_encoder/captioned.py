"""captioned: images with one text each, as models that embed both read them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mptk.config import Settings
from mptk.errors import DataError, FileError, InputError, take_first_line
from mptk.io import RANDOM_DATA, Loaded, check_ids
from mptk.io.data import SELF
from mptk.progress import Count
from mptk.tasks.inputs.base import Inputs, Named, count_measured_only, draw_inputs
from mptk.tasks.inputs.chats import Chat, read_chats
from mptk.tasks.inputs.images import Images
from mptk.tasks.inputs.text import count_vocabulary, limit_length, make_example_ids
from mptk.tasks.padding import IDS, MASK

LEAST_LENGTH = 4
"""Tokens of the shortest text: a trace takes a size of 1 for a constant."""


class Captioned(Inputs):
    """``input_ids``, ``attention_mask`` if the class reads it, and what ``Images`` makes: one image for each text."""

    def make_example(self, model: nn.Module) -> Named:
        ids = put_end_token(model, make_example_ids())
        return {**drop_unread_mask(model, {IDS: ids, MASK: torch.ones_like(ids)}), **Images().make_example(model)}

    def draw_calibration(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Named:
        if settings.data == RANDOM_DATA:
            return draw_pairs(loaded.model, count, settings.seed)
        rows = read_pairs(settings.data)
        rows = rows[count_measured_only(len(rows), settings) :]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed))
        return self.prepare(loaded, [rows[i] for i in order[:count]], settings.length, progress)

    def draw_evaluation(self, loaded: Loaded, settings: Settings) -> Named:
        data, count = settings.eval_data or settings.data, settings.eval_windows
        if data == RANDOM_DATA:
            return draw_pairs(loaded.model, count, settings.seed + 1)
        rows = read_pairs(data)
        measured = rows[: count_measured_only(len(rows), settings) or count]
        return self.prepare(loaded, measured, settings.eval_length, lambda done, total: None)

    def prepare(self, loaded: Loaded, rows: Sequence[Chat], length: int, progress: Count) -> Named:
        """Texts as the model's tokenizer prepares them, at most ``length`` tokens each; images as its processor."""
        images = Images().prepare(loaded, [row.images[0] for row in rows], progress)
        text = encode_texts(loaded, [row.caption for row in rows], limit_length(loaded, length))
        check_ids(loaded.model, text[IDS])
        return {**drop_unread_mask(loaded.model, text), **images}


def read_pairs(data: str) -> list[Chat]:
    """As ``read_chats``. Raises MptkError if a row has several images."""
    if data == SELF:
        raise InputError(
            "this model cannot write text; give a folder of images with captions with --data, or random", name="data"
        )
    rows = read_chats(data)
    if several := next((row for row in rows if len(row.images) > 1), None):
        raise DataError(
            f"{several.where} has {len(several.images)} images, and this model embeds one; leave one",
            name=several.where,
        )
    return rows


def encode_texts(loaded: Loaded, texts: Sequence[str], length: int) -> Named:
    """``input_ids`` and ``attention_mask``, int64 [texts, n], n at most ``length``.

    A tokenizer that makes no mask leaves padding to be read as text: then all texts are filled up to ``length``, as
    in training.
    """
    if loaded.tokenizer is None:
        raise FileError(
            f"{loaded.source} has no tokenizer to read captions with; add its tokenizer files", name=loaded.source
        )
    tokenizer = copy.deepcopy(loaded.tokenizer)  # padding would stay in the tokenizer, and in the file that is written
    most = max(LEAST_LENGTH, min(length, tokenizer.model_max_length))
    padding = "longest" if MASK in tokenizer.model_input_names else "max_length"
    try:
        made = tokenizer(list(texts), padding=padding, truncation=True, max_length=most, return_tensors="pt")
    except ValueError as error:
        raise FileError(
            f"the tokenizer of {loaded.source} does not take the captions: {take_first_line(error)}; give it a "
            "pad_token",
            name=loaded.source,
        ) from error
    ids = made[IDS]
    return {IDS: ids, MASK: made[MASK] if padding == "longest" else torch.ones_like(ids)}


def draw_pairs(model: PreTrainedModel, count: int, seed: int) -> Named:
    """Uniform token ids with the end token last, and images of normal noise."""
    found = draw_inputs(Captioned().make_example(model), count, {IDS: count_vocabulary(model)}, seed)
    return found | {IDS: put_end_token(model, found[IDS])}


def drop_unread_mask(model: nn.Module, text: Named) -> Named:
    """The text with its mask, if the class reads one."""
    return text if MASK in inspect.signature(model.forward).parameters else {IDS: text[IDS]}


def put_end_token(model: Any, ids: Tensor) -> Tensor:
    """The token ids with the end token last, if the config names one: some classes embed a text at that token."""
    end = getattr(model.config.get_text_config(), "eos_token_id", None)
    if not isinstance(end, int) or end >= count_vocabulary(model):
        return ids
    return torch.cat([ids[:, :-1], torch.full_like(ids[:, :1], end)], 1)
