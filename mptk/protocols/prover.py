"""prover: the protocol of a kind of file that is proven against the folder that it was made from, by features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from torch import nn

from passes.verify import Difference


class Prover(ABC):
    """How ``verify`` proves a kind of file. ``kind``: its name in messages."""

    kind: ClassVar[str]

    @abstractmethod
    def takes(self, path: Path) -> bool:
        """Whether a path names such a file. There may be no such file."""

    @abstractmethod
    def prove(
        self, file: Path, like: str | Path | None, model: str | Path | nn.Module | None
    ) -> tuple[Sequence[Difference], Sequence[str]]:
        """The stages of the proof, and notes on what it does not cover. The arguments are those of ``verify``.

        Raises:
            MptkError: there is no such file, or an argument is missing or cannot be read.
            ProofError: the file differs from the folder.
        """
