"""loader: a GGUF file as a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mptk.io.loaders import Loader
from mptk.trust import Trust

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


HEADER_BYTES = 1 << 16
"""Bytes at the start of a file in which the number of layers stands."""


class GgufLoader(Loader):
    """A file whose name ends in ``.gguf``."""

    conversion = 3
    endings = (".gguf",)

    def count_layers(self, path: Path) -> int | None:
        # gguf's reader takes seconds for the vocabulary. This field stands before it: its name, then 4 for uint32.
        with path.open("rb") as opened:
            head = opened.read(HEADER_BYTES)
        _, found, after = head.partition(b".block_count\x04\0\0\0")
        return int.from_bytes(after[:4], "little") if found and len(after) >= 4 else None

    def check_file(self, file: Path) -> None:
        from mptk.features.gguf.reading import check_gguf

        check_gguf(file)

    def read_config(self, path: Path, trust: Trust) -> PreTrainedConfig:
        from mptk.features.gguf.reading import read_gguf_config

        return read_gguf_config(path)

    def convert(self, path: Path, folder: Path) -> None:
        from mptk.features.gguf.reading import write_float_checkpoint

        write_float_checkpoint(path, folder)


GGUF = GgufLoader()
