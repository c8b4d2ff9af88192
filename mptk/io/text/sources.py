"""sources: what ``--data`` names: files, folders and data sets, each with its weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mptk.errors import MptkError
from mptk.files import path_of
from mptk.io.text.files import Document, check_ordinary, file_documents, folder_documents, shown
from mptk.io.text.hub import HubText, hub_text
from mptk.publish.manifest import file_sha256

SELF = "self"
"""The value of ``data`` for text that the model writes."""
RANDOM = "random"
"""The value of ``data`` for seeded random inputs. They show that all works, and nothing of how good a model is."""
RANDOM_NAME = "random inputs, which say nothing of real data"


@dataclass(frozen=True)
class Source:
    """A file, a folder or a data set of the hub. ``column``: of a table in it. ``weight``: its share of the windows."""

    name: str
    place: Path | HubText
    column: str | None = None
    weight: float = 1.0

    @property
    def is_folder(self) -> bool:
        """Whether it is sampled over its files."""
        return isinstance(self.place, Path) and self.place.is_dir()

    def documents(
        self, tokenizer: PreTrainedTokenizerBase | None, characters: int | None = None, least: int = 0, seed: int = 0
    ) -> Iterator[Document]:
        """Its documents. Of a folder, about ``characters`` from all of its files (``folder_documents``)."""
        if isinstance(self.place, HubText):
            return self.place.documents(tokenizer)
        if self.is_folder:
            return folder_documents(self.place, self.column, tokenizer, characters=characters, least=least, seed=seed)
        return file_documents(self.place, self.column, tokenizer)

    def digests(self) -> dict[str, str]:
        """Path → SHA-256 of each file that it names or holds; nothing for a data set of the hub."""
        if isinstance(self.place, HubText):
            return {}
        return {str(file): file_sha256(file) for file in (shown(self.place) if self.is_folder else [self.place])}


def parse(data: str, *, held_out: bool = False, split: str | None = None) -> tuple[Source, ...]:
    """The sources that ``SOURCE[=WEIGHT],…`` names. A path that is there is one source, whatever is in its name.

    Raises:
        MptkError: a weight is no positive number, or ``self`` stands beside other sources.
    """
    parts = [data] if _is_there(data) else [part.strip() for part in data.split(",")]
    if len(parts) > 1 and any(part.partition("=")[0] == SELF for part in parts):
        raise MptkError(f"{data}: text that the model writes cannot be mixed with other text; give {SELF} alone")
    return tuple(_source(*_weighted(part), held_out, split) for part in parts)


def _is_there(name: str) -> bool:
    try:
        return path_of(name).exists()
    except (OSError, ValueError):  # too long for a path; a null character
        return False


def _weighted(part: str) -> tuple[str, float]:
    """``c4.jsonl=0.7`` → ("c4.jsonl", 0.7)."""
    name, equals, weight = part.rpartition("=")
    if not equals or _is_there(part):
        return part, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not name or not 0 < value < math.inf:
        raise MptkError(f"{part}: write SOURCE=WEIGHT with a weight above 0, as c4.jsonl=0.7")
    return name, value


def _source(name: str, weight: float, held_out: bool, split: str | None) -> Source:
    if not name:
        raise MptkError("'' names no text; give a file, folder or dataset")
    if _is_there(name):
        check_ordinary(path_of(name))
        return Source(name, path_of(name), weight=weight)
    before, colon, column = name.rpartition(":")
    if colon and _is_there(before):
        check_ordinary(path_of(before))
        return Source(name, path_of(before), column, weight)
    return Source(name, hub_text(name, held_out=held_out, split=split), weight=weight)


def shared(count: int, weights: Sequence[float]) -> list[int]:
    """``count`` shared out by weight, to whole numbers (largest remainder; on a tie the earlier one)."""
    exact = [count * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    for i in sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])[: count - sum(whole)]:
        whole[i] += 1
    return whole
