"""teacher: the dense model's outputs on training samples, computed live or cached on disk for more epochs or runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mptk.errors import FileError, MptkError
from mptk.files import tidy, write_file
from mptk.io import load_tensors
from mptk.ir import Samples
from mptk.methods.maskprune.losses import TopLogits, shorten_logits

TeacherOutputs = tuple[Tensor | TopLogits, Sequence[Tensor] | None]
"""Logits or their shortened form, and each layer's hidden states [batch, length, hidden] or None."""
Output = tuple[Tensor, Sequence[Tensor] | None]
"""A model's output (logits or features), and each layer's hidden states if they were asked for."""

TOP = 64
"""Number of tokens kept of each distribution."""
OUTPUT = "output"
"""Name of an output that is kept whole, in its file."""


class CachedTeacher:
    """Keeps the dense model's output on each sample in ``folder``, and computes it at the first request.

    ``k``: how many top log probabilities of logits are kept; with 0 outputs are kept whole.

    ``live`` runs the dense model on samples as they are given, on the host. A file is named after its sample's inputs,
    so runs on the same model may share the folder.

    ``wanted`` maps "this process lacks a sample" to "the dense model must run". If the model is sharded over processes,
    all of them must run it when one does. ``device``: where the outputs go; by default they stay on the host.
    """

    def __init__(
        self,
        live: Callable[[Samples], Output],
        folder: Path,
        k: int = TOP,
        wanted: Callable[[bool], bool] = lambda missing: missing,
        device: torch.device | None = None,
    ) -> None:
        self.live, self.folder, self.k, self.wanted, self.device = live, folder, k, wanted, device
        folder.mkdir(parents=True, exist_ok=True)
        tidy(folder)

    def __call__(self, samples: Samples) -> TeacherOutputs:
        # Outputs are always read back, also just after they were computed: so each epoch sees the same rounded numbers.
        files = [self._locate([tensor[row] for tensor in samples.tensors]) for row in range(len(samples))]
        if self.wanted(not all(file.is_file() for file in files)):
            self._keep(samples, files)
        found = [load_tensors(file, partial(_explain_damage, file)) for file in files]
        device = self.device or samples.tensors[0].device
        each = {name: torch.stack([f[name] for f in found]).to(device) for name in found[0]}
        if not self.k:
            return each[OUTPUT], None
        return TopLogits(each["tokens"].long(), each["logs"].float(), each["rest"].float()), None

    def _locate(self, sample: Sequence[Tensor]) -> Path:
        digest = hashlib.sha256()
        for tensor in sample:
            digest.update(tensor.contiguous().numpy().tobytes())
        return self.folder / f"{digest.hexdigest()[:32]}-{self.k}.safetensors"

    def _keep(self, samples: Samples, files: list[Path]) -> None:
        """Run all samples together, even if some are cached: a resumed run must get identical numbers."""
        output, _ = self.live(samples)
        for file, rows in ((f, r) for f, r in zip(files, output, strict=True) if not f.is_file()):
            kept = self._shorten_rows(rows) if self.k else {OUTPUT: rows}
            write_file(file, partial(save_file, {name: t.contiguous().cpu() for name, t in kept.items()}))

    def _shorten_rows(self, logits: Tensor) -> dict[str, Tensor]:
        # int32 and float16: a window's file has 6 bytes for each kept token of each position.
        top = shorten_logits(logits, self.k)
        return {"tokens": top.tokens.int(), "logs": top.logs.half(), "rest": top.rest.half()}


def _explain_damage(file: Path, why: str) -> MptkError:
    return FileError(f"{file} is not a teacher's output ({why}); remove it, and it is computed again", name=file)


def hash_model_weights(model: nn.Module) -> str:
    """A name for a model's weights: equal for equal weights, different for others."""
    # Sums in float64 in place of the bytes: these would have to be copied to the host and hashed.
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        x = p.detach().double()
        digest.update(f"{name} {tuple(p.shape)} {x.sum().item()!r} {x.square().sum().item()!r}".encode())
    return digest.hexdigest()[:16]
