"""inputs: what the caller of a run holds in memory.

Settings hold only names, so that they can be written into a report and a recipe. What has no name is in ``Inputs``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import length_hint
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mptk.config import IN_MEMORY, Settings
from mptk.errors import DataError
from mptk.ir import Samples

GivenInputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""Tensors for ``forward``, by position or by the argument's name, samples in the first dimension."""
Data = str | Path | Samples | Tensor | Mapping[str, Tensor] | Iterable[object]
"""A name as in ``--data``; or samples, ids [n, length], inputs by name, texts, rows of text, or batches of inputs."""


@dataclass(frozen=True)
class Inputs:
    """What the caller gives in memory; None: as the settings say.

    ``data``, ``eval_data``: samples, in any form of ``Data`` but a name. ``texts``: of settings
    that name texts, by setting.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    example_inputs: GivenInputs | None = None
    data: Data | None = None
    eval_data: Data | None = None
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @staticmethod
    def of(
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        example_inputs: GivenInputs | None = None,
        data: Data | None = None,
        eval_data: Data | None = None,
        texts: Mapping[str, Sequence[str]] | None = None,
    ) -> Inputs:
        """The arguments of a call that are in memory. Names of files are settings (``name_given``).

        Raises:
            MptkError: there are no samples in ``data`` or ``eval_data``.
        """
        for name, given in (("data", data), ("eval_data", eval_data)):
            if is_in_memory(given) and not length_hint(given, 1):  # a stream does not say how many it has
                raise DataError(f"{name} is empty; give texts, token ids [n, length], or batches of inputs", name=name)
        return Inputs(
            tokenizer,
            example_inputs,
            data if is_in_memory(data) else None,
            eval_data if is_in_memory(eval_data) else None,
            texts or {},
        )

    @property
    def has_samples(self) -> bool:
        """Whether there are samples to train, calibrate or measure on."""
        return self.data is not None or self.eval_data is not None


def split_texts(keywords: Mapping[str, object]) -> tuple[dict[str, object], dict[str, list[str]]]:
    """Keywords as settings take them, and the texts in memory that were given for some, by keyword."""
    sources = {each.name for each in Settings.declared if each.setting.form == "source"}
    texts: dict[str, list[str]] = {
        name: list(value)
        for name, value in keywords.items()
        if name in sources and isinstance(value, Iterable) and not isinstance(value, str)
    }
    return {**keywords, **dict.fromkeys(texts, IN_MEMORY)}, texts


def is_in_memory(data: Data | None) -> bool:
    """Whether ``data`` holds samples, not a name."""
    return data is not None and not isinstance(data, str | Path)


def name_given(**given: Data | None) -> dict[str, str]:
    """Argument → its name in settings, for each argument that is given."""
    return {n: IN_MEMORY if is_in_memory(data) else str(data) for n, data in given.items() if data is not None}
