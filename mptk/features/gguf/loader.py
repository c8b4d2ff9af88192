"""loader: a GGUF file as a model."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

from mptk.io.loaders import Loader
from mptk.reading import check_regular, make_damage_error
from mptk.trust import Trust

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


HEADER_BYTES = 1 << 16
"""Bytes at the start of a file in which the sizes of its model stand."""
GGUF_COUNTS = 1 << 20
"""Tensors, and fields of metadata, that a GGUF file has at most."""


class GgufLoader(Loader):
    """A file whose name ends in ``.gguf``."""

    conversion = 3
    endings = (".gguf",)

    def count_layers(self, path: Path) -> int | None:
        return _find_number(path, b".block_count")

    def count_positions(self, path: Path) -> int | None:
        return _find_number(path, b".context_length")

    def check_file(self, file: Path) -> None:
        check_regular(file)
        # A GGUF file begins with its mark (4 bytes), a version (4), and two counts (8 each).
        with file.open("rb") as opened:
            start = opened.read(24)
        if len(start) < 24 or start[:4] != b"GGUF":
            raise make_damage_error(file)("it does not begin as a GGUF file does")
        tensors, fields = struct.unpack("<QQ", start[8:])
        if max(tensors, fields) > GGUF_COUNTS:
            raise make_damage_error(file)(f"it claims {tensors} tensors and {fields} fields")

    def read_config(self, path: Path, trust: Trust) -> PreTrainedConfig:
        from mptk.features.gguf.reading import read_gguf_config

        return read_gguf_config(path)

    def convert(self, path: Path, folder: Path) -> None:
        from mptk.features.gguf.reading import write_float_checkpoint

        write_float_checkpoint(path, folder)


def _find_number(file: Path, field: bytes) -> int | None:
    """A number of a file's metadata, if it stands at the start."""
    # gguf's reader takes seconds for the vocabulary. Sizes stand before it: a field's name, then 4 for uint32.
    with file.open("rb") as opened:
        head = opened.read(HEADER_BYTES)
    _, found, after = head.partition(field + b"\x04\0\0\0")
    return int.from_bytes(after[:4], "little") if found and len(after) >= 4 else None


GGUF = GgufLoader()
