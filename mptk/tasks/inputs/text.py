"""text: windows of token ids."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mptk.config import Settings
from mptk.errors import DataError
from mptk.io import RANDOM_DATA, Aside, Loaded, data, find_position_limit, name_data
from mptk.ir import IGNORED, Samples
from mptk.progress import Count
from mptk.tasks.inputs.base import EXAMPLES, Inputs, Named

LEAST_ROW = 2
"""Tokens of the shortest text that is measured on: a trace takes a size of 1 for a constant."""
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
            model,
            loaded.tokenizer,
            s.data,
            count,
            s.length,
            seed=s.seed,
            aside=find_aside(loaded, s),
            progress=progress,
        )
        return {"input_ids": found}

    def draw_evaluation(self, loaded: Loaded, settings: Settings) -> Named:
        length = limit_length(loaded, settings.eval_length)
        if (source := settings.eval_data or settings.data) == RANDOM_DATA:
            return draw_ids(loaded, settings.eval_windows, length, settings.seed + 1)
        windows = data.load_evaluation_windows(
            loaded.tokenizer, source, length, settings.eval_windows, find_aside(loaded, settings)
        )
        data.check_ids(loaded.model, windows)
        return {"input_ids": windows}

    def name_data(self, data: str) -> str:
        return name_data(data)


def make_text_rows(loaded: Loaded, texts: Iterable[str], length: int) -> Samples:
    """A row of token ids for each text, as the tokenizer makes it: with its special tokens, at most ``length``.

    Shorter rows end with ``IGNORED``, which ``split_rows`` removes. Raises MptkError if there is no text.
    """
    assert loaded.tokenizer is not None
    # Truncation would stay in the tokenizer, and in the file that is written.
    tokenizer, most = copy.deepcopy(loaded.tokenizer), limit_length(loaded, length)
    found = (tokenizer(text, truncation=True, max_length=most, verbose=False).input_ids for text in texts)
    rows = [torch.tensor(ids) for ids in found if len(ids) >= LEAST_ROW]
    if not rows:
        raise DataError("there is no text to measure on; give more, or other --eval-data", name="data")
    data.check_ids(loaded.model, torch.cat(rows))
    return Samples({"input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)})


def split_rows(samples: Samples) -> list[Samples]:
    """Batches of one sample; of a row of text without what it is padded with."""
    ids = samples.inputs.get("input_ids")
    batches = samples.split(1)
    if ids is None or samples.together is not None:
        return batches
    lengths = (ids != IGNORED).sum(1).tolist()
    return [batch.shorten(1, length) for batch, length in zip(batches, lengths, strict=True)]


def has_texts(samples: Samples) -> bool:
    """Whether they are single texts of several lengths (``make_text_rows``)."""
    ids = samples.inputs.get("input_ids")
    return ids is not None and bool((ids == IGNORED).any())


def describe_rows(samples: Samples) -> str:
    """How many samples, and how long those of text are."""
    if not has_texts(samples):
        return f"{len(samples)} samples"
    lengths = (samples.inputs["input_ids"] != IGNORED).sum(1)
    return f"{len(samples)} single texts of {int(lengths.min())} to {int(lengths.max())} tokens"


def find_aside(loaded: Loaded, settings: Settings) -> Aside | None:
    """What a run sets aside of its text to measure on; None if it measures on another one."""
    if settings.eval_data is not None:
        return None
    return Aside(settings.eval_windows, limit_length(loaded, settings.eval_length))


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
