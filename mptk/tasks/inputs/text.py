"""text: windows of token ids."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mptk.config import Settings
from mptk.io import RANDOM_DATA, Loaded, data, find_position_limit, name_data
from mptk.progress import Count
from mptk.tasks.inputs.base import EXAMPLES, Inputs, Named

TEXT_LENGTH = 7
"""Tokens of each sample of an example."""


def make_example_ids(batch: int = EXAMPLES, length: int = TEXT_LENGTH) -> Tensor:
    """Small token ids, int64 [batch, length]."""
    return torch.arange(batch * length).reshape(batch, length) % 11 + 1  # also a trimmed vocabulary has the first dozen


class TextWindows(Inputs):
    """``input_ids``: windows of a text without padding. They are no longer than the model's positions."""

    def make_example(self, model: nn.Module) -> Named:
        return {"input_ids": make_example_ids()}

    def draw_calibration(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Named:
        if settings.data == RANDOM_DATA:
            return draw_ids(loaded, count, settings.length, settings.seed)
        s, model = settings, loaded.load_all() if settings.data == data.SELF else loaded.model
        found = data.load_calibration_windows(
            model, loaded.tokenizer, s.data, count, s.length, seed=s.seed, progress=progress
        )
        return {"input_ids": found}

    def draw_evaluation(self, loaded: Loaded, settings: Settings) -> Named:
        length = limit_length(loaded, settings.eval_length)
        if (source := settings.eval_data or settings.data) == RANDOM_DATA:
            return draw_ids(loaded, settings.eval_windows, length, settings.seed + 1)
        windows = data.load_evaluation_windows(loaded.tokenizer, source, length, settings.eval_windows)
        data.check_ids(loaded.model, windows)
        return {"input_ids": windows}

    def name_data(self, data: str) -> str:
        return name_data(data)


def limit_length(loaded: Loaded, length: int) -> int:
    """``length``, or the model's number of positions if that is less."""
    return min(length, find_position_limit(loaded.model.config) or length)


def draw_ids(loaded: Loaded, count: int, length: int, seed: int) -> Named:
    """Uniform token ids."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, limit_length(loaded, length))
    return {"input_ids": torch.randint(count_vocabulary(loaded.model), shape, generator=generator)}


def count_vocabulary(model: PreTrainedModel) -> int:
    """How many tokens a transformers model has."""
    size: int = model.config.get_text_config().vocab_size
    return size
