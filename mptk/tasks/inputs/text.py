"""text: windows of token ids."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mptk.config.settings import Settings
from mptk.io import data
from mptk.io.data import positions_of, protocol_name
from mptk.io.models import Loaded
from mptk.io.text.sources import RANDOM_DATA
from mptk.progress import Count
from mptk.tasks.inputs.base import EXAMPLES, Inputs, Named

TEXT_LENGTH = 7


def example_ids(batch: int = EXAMPLES, length: int = TEXT_LENGTH) -> Tensor:
    """Small token ids, int64 [batch, length]."""
    return torch.arange(batch * length).reshape(batch, length) % 11 + 1


class TextWindows(Inputs):
    """``input_ids``: windows of a text without padding. They are no longer than the model's positions."""

    def example(self, model: nn.Module) -> Named:
        return {"input_ids": example_ids()}

    def calibration(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Named:
        if settings.data == RANDOM_DATA:
            return random_ids(loaded, count, settings.length, settings.seed)
        s, model = settings, loaded.whole() if settings.data == data.SELF else loaded.model
        found = data.calibration(model, loaded.tokenizer, s.data, count, s.length, seed=s.seed, progress=progress)
        return {"input_ids": found}

    def evaluation(self, loaded: Loaded, settings: Settings) -> Named:
        length = fitting(loaded, settings.eval_length)
        if (source := settings.eval_data or settings.data) == RANDOM_DATA:
            return random_ids(loaded, settings.eval_windows, length, settings.seed + 1)
        windows = data.evaluation_windows(loaded.tokenizer, source, length, settings.eval_windows)
        data.check_ids(loaded.model, windows)
        return {"input_ids": windows}

    def named(self, data: str) -> str:
        return protocol_name(data)


def fitting(loaded: Loaded, length: int) -> int:
    """``length``, or the model's number of positions if that is less."""
    return min(length, positions_of(loaded.model.config) or length)


def random_ids(loaded: Loaded, count: int, length: int, seed: int) -> Named:
    """Uniform token ids."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, fitting(loaded, length))
    return {"input_ids": torch.randint(vocabulary(loaded.model), shape, generator=generator)}


def vocabulary(model: PreTrainedModel) -> int:
    """How many tokens a transformers model has."""
    size: int = model.config.get_text_config().vocab_size
    return size
