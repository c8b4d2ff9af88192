"""hub: data sets of the hub, streamed, and short names for those that models are usually calibrated on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from mptk.errors import MptkError
from mptk.io.text.files import Document, first_line
from mptk.io.text.rows import row_texts


@dataclass(frozen=True)
class HubText:
    """A data set of the hub: id, config, split and column.

    ``held_out``: the split to measure on. ``joined``: what stands between rows that are one text; None if each row is a
    text.
    """

    id: str
    config: str | None = None
    split: str = "train"
    column: str | None = None
    held_out: str = "test"
    joined: str | None = None

    def documents(self, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Document]:
        """The rows' texts, from the first on; no more is downloaded than is read.

        Raises:
            MptkError: it does not load, or as ``row_texts``.
        """
        texts = self._texts(tokenizer)
        if self.joined is None:
            yield from ([text] for text in texts)
        else:
            yield (text + self.joined for text in texts)

    def _texts(self, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
        from datasets import load_dataset

        try:
            rows = load_dataset(self.id, self.config, split=self.split, streaming=True)
            yield from row_texts(rows, self.id, self.column, tokenizer)
        except MptkError:
            raise
        except Exception as error:  # of the hub, and of the library of each format: they have no base class
            said = first_line(error)
            raise MptkError(
                f"{self.id!r} is no file or folder, and does not load as a dataset: {said}; "
                "check the path, or the network and ID:CONFIG:SPLIT; a file of your own needs neither"
            ) from error


_PATH = re.compile(r"^[./~]|/.*/|\.(txt|text|md|raw|jsonl?|parquet|[ct]sv)$")
"""Names that no data set of the hub has. To ask the hub for them takes half a minute without a network."""

PRESETS = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", column="text", joined="\n\n"),
    "c4": HubText("allenai/c4", "en", column="text", held_out="validation"),
    "pile": HubText("NeelNanda/pile-10k", column="text", held_out="train"),
    "ultrachat": HubText("HuggingFaceH4/ultrachat_200k", split="train_sft", column="messages", held_out="test_sft"),
    "openhermes": HubText("teknium/OpenHermes-2.5", column="conversations", held_out="train"),
}
"""Short names for ``--data``. Those without a split to measure on are measured where they are calibrated."""


def hub_text(name: str, *, held_out: bool, split: str | None = None) -> HubText:
    """The data set that ``NAME``, a preset, or ``ID[:CONFIG[:SPLIT[:COLUMN]]]`` names.

    ``held_out``: by default its split to measure on, not that to train on. ``split``: another default.

    Raises:
        MptkError: there are more parts; or the name can only be that of a file, which is not there.
    """
    preset = PRESETS.get(name)
    if preset is None:
        dataset, config, named, column, *rest = [*name.split(":"), "", "", ""]
        if any(rest):
            raise MptkError(
                f"{name!r} has too many colons; write ID, ID:CONFIG, ID:CONFIG:SPLIT or ID:CONFIG:SPLIT:COLUMN"
            )
        if _PATH.search(dataset):
            raise MptkError(f"{dataset!r} is no file or folder; check the path")
        preset = HubText(dataset, config or None, column=column or None)
        split = named or split
    return replace(preset, split=split or (preset.held_out if held_out else preset.split))
