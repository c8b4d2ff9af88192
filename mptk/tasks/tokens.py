"""tokens: what tasks share whose models predict tokens: their loss and perplexity."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mptk.errors import MptkError
from mptk.io.evaluation import Runs
from mptk.ir.samples import IGNORED, Samples
from mptk.progress import Count
from mptk.protocols.task import Task


class TokenTask(Task):
    """A task whose samples' targets are token ids at the positions of the logits."""

    def loss(self, output: Tensor, samples: Samples) -> Tensor:
        """Sum of the negative log-likelihoods of the targets, in nats."""
        targets = samples.targets
        assert targets is not None
        if not isinstance(output, Tensor) or output.shape[:-1] != targets.shape or not self.predicted(samples):
            raise MptkError(
                "the gradient of a language model's loss needs logits [batch, length, vocab] and windows of 2 or "
                "more tokens; use magnitude or random for other models"
            )
        flat = output.flatten(0, -2).float()
        return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED, reduction="sum")

    def predicted(self, samples: Samples) -> int:
        assert samples.targets is not None
        return int((samples.targets != IGNORED).sum())

    @torch.no_grad()
    def perplexities(self, runs: Runs, samples: Samples, progress: Count) -> dict[str, float]:
        """Run → e to the mean loss of a target, to 4 decimals."""
        rows, totals = samples.split(1), dict[str, float]()
        for name, i, logits in runs(rows, progress):
            totals[name] = totals.get(name, 0.0) + float(self.loss(logits, rows[i].to(logits.device)))
        tokens = self.predicted(samples)
        return {name: round(math.exp(total / tokens), 4) for name, total in totals.items()}
