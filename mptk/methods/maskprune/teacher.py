"""teacher: the dense model's outputs on training windows, computed live or kept on disk for several epochs or runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mptk.files import write_file
from mptk.methods.maskprune.losses import TopLogits, shorten

Output = Any
"""What a transformers model returns: ``logits``, and ``hidden_states`` where they were asked for."""

TOP = 64
"""Tokens kept of each distribution."""


class LiveTeacher:
    """Runs the dense model for each batch. ``run`` computes without gradients."""

    def __init__(self, run: Callable[[Tensor], Output]) -> None:
        self.run = run

    def __call__(self, windows: Tensor) -> tuple[Tensor | TopLogits, Any]:
        """(logits or their shortened form, hidden states or None) for ``windows`` [batch, length]."""
        with torch.no_grad():
            output = self.run(windows)
        return output.logits, getattr(output, "hidden_states", None)


class CachedTeacher:
    """Keeps the top ``k`` log probabilities of every window in ``folder``, each computed when first asked for.

    A file is named after its window's tokens, so that runs on the same model may share the folder.

    ``wanted`` turns "this process lacks a window" into "the dense model must run": processes that hold it in shards
    must all run it if one of them does.
    """

    def __init__(
        self, live: LiveTeacher, folder: Path, k: int = TOP, wanted: Callable[[bool], bool] = lambda missing: missing
    ) -> None:
        self.live, self.folder, self.k, self.wanted = live, folder, k, wanted
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, windows: Tensor) -> tuple[Tensor | TopLogits, Any]:
        files = [self._file(ids) for ids in windows]
        if self.wanted(not all(file.is_file() for file in files)):
            self._keep(windows, files)
        found = [load_file(file) for file in files]
        tokens, logs, rest = (torch.stack([f[name] for f in found]) for name in ("tokens", "logs", "rest"))
        device = windows.device
        return TopLogits(tokens.long().to(device), logs.float().to(device), rest.float().to(device)), None

    def _file(self, ids: Tensor) -> Path:
        name = hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:32]
        return self.folder / f"{name}-{self.k}.safetensors"

    def _keep(self, windows: Tensor, files: list[Path]) -> None:
        """All together, though some may be there: a resumed run must get the same bits."""
        logits, _ = self.live(windows)
        assert isinstance(logits, Tensor)
        for file, rows in ((f, r) for f, r in zip(files, logits, strict=True) if not f.is_file()):
            top = shorten(rows, self.k)
            half = {"tokens": top.tokens.int(), "logs": top.logs.half(), "rest": top.rest.half()}
            write_file(file, partial(save_file, {name: t.contiguous().cpu() for name, t in half.items()}))


def fingerprint(model: nn.Module) -> str:
    """A name for a model's weights: the same for equal ones, and another if any of them changes."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        x = p.detach().double()
        digest.update(f"{name} {tuple(p.shape)} {x.sum().item()!r} {x.square().sum().item()!r}".encode())
    return digest.hexdigest()[:16]
