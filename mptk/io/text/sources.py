"""sources: what ``--data`` names: files, folders and data sets, each with its weight.

Names are looked at before torch is imported, which takes seconds: a wrong one is to cost less.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mptk.errors import DataError, FileError, InputError, MptkError
from mptk.files import expand_path
from mptk.io.aside import TextPart
from mptk.io.text.files import (
    JSON_LINES,
    PLAIN_TEXT,
    Document,
    check_ordinary,
    check_plain_text,
    list_visible_files,
    read_file_documents,
    read_folder_documents,
    read_json_rows,
    read_row_texts,
    with_cause,
)
from mptk.publish.manifest import hash_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class HubText:
    """A data set of the hub: id, config, split and column.

    ``held_out``: the split to measure on. ``joined``: the text between rows, if all rows are one text; None if each row
    is a text of its own.
    """

    id: str
    config: str | None = None
    split: str = "train"
    column: str | None = None
    held_out: str = "test"
    joined: str | None = None

    def read_documents(self, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Document]:
        """The rows' texts, from the first on; no more is downloaded than is read.

        Raises:
            MptkError: it does not load, or as ``read_row_texts``.
        """
        texts = self._read_texts(tokenizer)
        if self.joined is None:
            yield from ([text] for text in texts)
        else:
            yield (text + self.joined for text in texts)

    def _read_texts(self, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
        from datasets import load_dataset

        try:
            rows = load_dataset(self.id, self.config, split=self.split, streaming=True)
            yield from read_row_texts(rows, self.id, self.column, tokenizer)
        except MptkError:
            raise
        except Exception as error:  # of the hub, and of the library of each format: they have no base class
            said = with_cause(error)
            raise FileError(
                f"{self.id!r} is not a file or folder, and does not load as a dataset: {said}; "
                "check the path, or the network and ID:CONFIG:SPLIT; a file of your own needs neither",
                name=self.id,
            ) from error


# Names that no data set of the hub has. To ask the hub for them would take half a minute without a network.
_PATH = re.compile(r"^[./~]|/.*/|\.(txt|text|md|raw|jsonl?|parquet|[ct]sv)$")

PRESETS = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", column="text", joined="\n\n"),
    "c4": HubText("allenai/c4", "en", column="text", held_out="validation"),
    "pile": HubText("NeelNanda/pile-10k", column="text", held_out="train"),
    "ultrachat": HubText("HuggingFaceH4/ultrachat_200k", split="train_sft", column="messages", held_out="test_sft"),
    "openhermes": HubText("teknium/OpenHermes-2.5", column="conversations", held_out="train"),
}
"""Short names for ``--data``. A data set without a split to measure on is measured on the split of calibration."""


def parse_hub_text(name: str, *, held_out: bool) -> HubText:
    """The data set that ``NAME``, a preset, or ``ID[:CONFIG[:SPLIT[:COLUMN]]]`` names.

    ``held_out``: whether the split that is not named is the one to measure on, and not the one to train on.

    Raises:
        MptkError: there are more parts; or the name can only be a file's, which does not exist.
    """
    preset, split = PRESETS.get(name), ""
    if preset is None:
        # Parts that are left out are empty; ``rest`` holds what is too much.
        dataset, config, named, column, *rest = [*name.split(":"), "", "", ""]
        if any(rest):
            raise InputError(
                f"{name!r} has too many colons; write ID, ID:CONFIG, ID:CONFIG:SPLIT or ID:CONFIG:SPLIT:COLUMN",
                name="data",
            )
        if _PATH.search(dataset):
            raise FileError(f"{dataset!r} is not a file or folder; check the path", name=dataset)
        preset = HubText(dataset, config or None, column=column or None)
        split = named
    return replace(preset, split=split or (preset.held_out if held_out else preset.split))


SELF = "self"
"""The value of ``data`` for text that the model writes."""
RANDOM_DATA = "random"
"""The value of ``data`` for seeded random inputs. They show that all works, and nothing of how good a model is."""
RANDOM_NAME = "random inputs, which say nothing of real data"


@dataclass(frozen=True)
class TextSource:
    """A file, a folder or a data set of the hub. ``column``: of a table in it. ``weight``: its share of the windows."""

    name: str
    place: Path | HubText
    column: str | None = None
    weight: float = 1.0

    @property
    def is_folder(self) -> bool:
        """Whether it is sampled over its files."""
        return isinstance(self.place, Path) and self.place.is_dir()

    def read_documents(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        characters: int | None = None,
        least: int = 0,
        seed: int = 0,
        part: TextPart | None = None,
    ) -> Iterator[Document]:
        """Its documents. Of a folder, about ``characters`` from all of its files (``read_folder_documents``)."""
        if isinstance(self.place, HubText):
            return self.place.read_documents(tokenizer)
        if self.is_folder:
            return read_folder_documents(
                self.place, self.column, tokenizer, characters=characters, least=least, seed=seed, part=part
            )
        return read_file_documents(self.place, self.column, tokenizer)

    def hash_source_files(self) -> dict[str, str]:
        """Path → SHA-256 of each file that it names or holds; nothing for a data set of the hub."""
        if isinstance(self.place, HubText):
            return {}
        return {
            str(file): hash_file(file) for file in (list_visible_files(self.place) if self.is_folder else [self.place])
        }


def parse(data: str, *, held_out: bool = False) -> tuple[TextSource, ...]:
    """The sources that ``SOURCE[=WEIGHT],…`` names. A path that is there is one source, whatever is in its name.

    Raises:
        MptkError: a weight is not a positive number, or ``self`` stands beside other sources.
    """
    # A folder may be named ``a,b`` or ``a=2``.
    parts = [data] if _is_there(data) else [part.strip() for part in data.split(",")]
    if len(parts) > 1 and any(part.partition("=")[0] == SELF for part in parts):
        raise InputError(
            f"{data}: text that the model writes cannot be mixed with other text; give only {SELF}", name="data"
        )
    return tuple(_make_source(*_split_weight(part), held_out) for part in parts)


def _is_there(name: str) -> bool:
    try:
        return expand_path(name).exists()
    except (OSError, ValueError):  # too long for a path; a null character
        return False


def _split_weight(part: str) -> tuple[str, float]:
    """``c4.jsonl=0.7`` → ("c4.jsonl", 0.7)."""
    # At the last sign, since a name may have some.
    name, equals, weight = part.rpartition("=")
    if not equals or _is_there(part):
        return part, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = 0.0
    if not name or not 0 < value < math.inf:
        raise InputError(f"{part}: write SOURCE=WEIGHT with a weight above 0, as c4.jsonl=0.7", name="data")
    return name, value


def _make_source(name: str, weight: float, held_out: bool) -> TextSource:
    if not name:
        raise InputError("'' names no text; give a file, folder or dataset", name="data")
    if _is_there(name):
        check_ordinary(expand_path(name))
        return TextSource(name, expand_path(name), weight=weight)
    # FILE:COLUMN of a table that is there. Any other colon belongs to a data set of the hub.
    before, colon, column = name.rpartition(":")
    if colon and _is_there(before):
        check_ordinary(expand_path(before))
        return TextSource(name, expand_path(before), column, weight)
    return TextSource(name, parse_hub_text(name, held_out=held_out), weight=weight)


def share_count(count: int, weights: Sequence[float]) -> list[int]:
    """``count`` shared out by weight, to whole numbers (largest remainder; on a tie the earlier one)."""
    exact = [count * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    # What rounding down left over goes to the largest remainders.
    for i in sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])[: count - sum(whole)]:
        whole[i] += 1
    return whole


def read_places(*data: str | None) -> list[Path]:
    """The files and folders that the sources ``data`` name."""
    return [source.place for source in _list_sources(*data) if isinstance(source.place, Path)]


def hash_text_files(*data: str | None) -> dict[str, str]:
    """Path → SHA-256 of each text file that the sources ``data`` name. Data sets of the hub have none."""
    return {path: found for source in _list_sources(*data) for path, found in source.hash_source_files().items()}


def check_sources(*data: str | None) -> None:
    """Raise MptkError if a source is not there, an empty folder, a text file without text, or lines that are no JSON.

    Only the start of a file is read whose name says what is in it: what others are, the model's kind decides.
    """
    for place in read_places(*data):
        if place.is_dir():
            if not any(file.is_file() for file in place.rglob("*")):
                raise DataError(f"{place} has no files in it; give a folder or a file with data", name=place)
        elif place.suffix.lower() in PLAIN_TEXT:
            check_plain_text(place)
        elif place.suffix.lower() == JSON_LINES:
            next(read_json_rows(place), None)


def count_plain_text(data: str) -> int | None:
    """The bytes of the text in ``data``, which bound its tokens; None if a source is no plain text file."""
    if data in (SELF, RANDOM_DATA):
        return None
    places = [source.place for source in parse(data)]
    plain = [place for place in places if isinstance(place, Path) and place.suffix.lower() in PLAIN_TEXT]
    if len(plain) < len(places) or not all(place.is_file() for place in plain):
        return None
    return sum(place.stat().st_size for place in plain)


def _list_sources(*data: str | None) -> list[TextSource]:
    return [source for each in data if each not in (None, SELF, RANDOM_DATA) for source in parse(str(each))]
