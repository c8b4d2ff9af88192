"""losses: what a student is trained on. All are means over positions, in nats, but for the relative hidden error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

ROWS = 1024
"""Positions whose logits are worked on at once: bounds memory at a vocabulary's width."""


@dataclass(frozen=True)
class Weights:
    """Weights of the losses; 0 leaves one out.

    ``lm``: next-token cross entropy. ``kl``: KL divergence from the dense teacher's distribution. ``hidden``: error of
    the hidden states of all layers over their variance.
    """

    lm: float = 1.0
    kl: float = 1.0
    hidden: float = 0.0


@dataclass(frozen=True)
class TopLogits:
    """A teacher's distribution, shortened: log probabilities of its k likeliest tokens, and of all the others together.

    ``tokens`` int64 [..., k], ``logs`` [..., k], ``rest`` [...].
    """

    tokens: Tensor
    logs: Tensor
    rest: Tensor


def language_model(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean next-token cross entropy of ``logits`` [batch, length, vocab] on ``ids`` [batch, length]."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def divergence(logits: Tensor, teacher: Tensor | TopLogits) -> Tensor:
    """KL(teacher ‖ student), the mean over all positions. ``logits`` is [batch, length, vocab].

    With ``TopLogits`` the tokens beyond the top k count as one event: by the log-sum inequality that is a lower bound
    on the full divergence, and the two are equal where student and teacher divide the rest alike.
    """
    flat = logits.flatten(0, 1)
    total = flat.new_zeros((), dtype=torch.float32)
    for start in range(0, len(flat), ROWS):
        rows = slice(start, start + ROWS)
        student = log_softmax(flat[rows].float(), -1)
        if isinstance(teacher, TopLogits):
            tokens, logs, rest = (t.flatten(0, 1)[rows] for t in (teacher.tokens, teacher.logs, teacher.rest))
            total = total + _top_divergence(student, tokens, logs, rest)
        else:
            target = log_softmax(teacher.flatten(0, 1)[rows].float(), -1)
            total = total + kl_div(student, target, reduction="sum", log_target=True)
    return total / len(flat)


def _top_divergence(student: Tensor, tokens: Tensor, logs: Tensor, rest: Tensor) -> Tensor:
    seen = student.gather(-1, tokens)
    others = torch.log1p(-seen.exp().sum(-1).clamp(max=1 - 1e-6))
    return (logs.exp() * (logs - seen)).sum() + (rest.exp() * (rest - others)).sum()


def hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over layers of ‖h − h*‖² / ‖h* − mean h*‖², hidden states [batch, length, hidden] of student and teacher."""
    errors = []
    for ours, theirs in zip(student, teacher, strict=True):
        spread = (theirs - theirs.mean((0, 1))).square().sum().clamp_min(1e-12)
        errors.append((ours - theirs).float().square().sum() / spread)
    return torch.stack(errors).mean()


def shorten(logits: Tensor, k: int) -> TopLogits:
    """The k likeliest tokens of ``logits`` [..., vocab] with their log probabilities and the others' mass."""
    logs = log_softmax(logits.float(), -1)
    top = logs.topk(min(k, logs.shape[-1]), -1)
    rest = torch.log1p(-top.values.exp().sum(-1).clamp(max=1 - 1e-6))
    return TopLogits(top.indices, top.values, rest)
