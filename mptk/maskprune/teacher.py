"""teacher: the dense model's outputs on training windows, computed live or kept on disk for several epochs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mptk.maskprune.losses import TopLogits, shorten

Output = Any
"""What a transformers model returns: ``logits``, and ``hidden_states`` where they were asked for."""

TOP = 64
"""Tokens kept of each distribution."""


class LiveTeacher:
    """Runs the dense model for each batch. ``run`` computes without gradients."""

    def __init__(self, run: Callable[[Tensor], Output]) -> None:
        self.run = run

    def __call__(self, windows: Tensor, rows: Tensor) -> tuple[Tensor | TopLogits, Any]:
        """(logits or their shortened form, hidden states or None) for ``windows`` [batch, length], rows of the set."""
        with torch.no_grad():
            output = self.run(windows)
        return output.logits, getattr(output, "hidden_states", None)


class CachedTeacher:
    """Keeps the top ``k`` log probabilities of every window in ``folder``, each computed when first asked for.

    ``wanted`` turns "this process lacks a window" into "the dense model must run": processes that hold it in shards
    must all run it if one of them does.
    """

    def __init__(
        self, live: LiveTeacher, folder: Path, k: int = TOP, wanted: Callable[[bool], bool] = lambda missing: missing
    ) -> None:
        self.live, self.folder, self.k, self.wanted = live, folder, k, wanted
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, windows: Tensor, rows: Tensor) -> tuple[Tensor | TopLogits, Any]:
        found = [self._window(int(row), ids) for row, ids in zip(rows, windows, strict=True)]
        tokens, logs, rest = (torch.stack(part).to(windows.device) for part in zip(*found, strict=True))
        return TopLogits(tokens.long(), logs.float(), rest.float()), None

    def _window(self, row: int, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        path = self.folder / f"{row:08d}.safetensors"
        if self.wanted(not path.is_file()):
            logits, _ = self.live(ids[None], torch.tensor([row]))
            assert isinstance(logits, Tensor)
            top = shorten(logits[0], self.k)
            half = {"tokens": top.tokens.int(), "logs": top.logs.half(), "rest": top.rest.half()}
            temporary = path.with_suffix(".tmp")
            save_file({name: t.contiguous().cpu() for name, t in half.items()}, temporary)
            temporary.replace(path)
        with safe_open(path, "pt") as file:
            return file.get_tensor("tokens"), file.get_tensor("logs"), file.get_tensor("rest")
