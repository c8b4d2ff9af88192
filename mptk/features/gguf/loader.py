"""loader: a GGUF file as a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mptk.io.loaders import Loader
from mptk.trust import Trust

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class GgufLoader(Loader):
    """A file whose name ends in ``.gguf``."""

    conversion = 3
    endings = (".gguf",)

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
