"""losses: the training losses of a student.

Cross entropy and divergence are means over positions, in nats. The hidden error is relative and has no unit.

With a large vocabulary the losses cost as much as several layers, and their temporary tensors take most of the memory.
So ``compute_class_losses`` computes both losses and their gradient together, a few positions at a time. Student and
teacher go through one softmax each, and only the gradient is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mptk.config import LossWeights
from mptk.distributed.processes import find_widest_float
from mptk.ir import IGNORED

CHUNK = 2**18
"""Logits that are processed at once. A few tensors of that size fit the processor's cache."""


@dataclass(frozen=True)
class TopLogits:
    """A shortened distribution: the log probabilities of the k likeliest tokens and of all other tokens together.

    ``tokens`` int64 [..., k], ``logs`` [..., k], ``rest`` [...].
    """

    tokens: Tensor
    logs: Tensor
    rest: Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of ``logits`` [..., classes] on ``targets`` [...]; ``IGNORED`` ones do not count."""
    return compute_class_losses(logits, targets, None, LossWeights(kl=0.0))["loss"]


def compute_class_losses(
    logits: Tensor, targets: Tensor, teacher: Tensor | TopLogits | None, weights: LossWeights
) -> dict[str, Tensor]:
    """``loss`` = lm · cross entropy + kl · KL(teacher ‖ student); also each term if its weight is not 0.

    Only ``loss`` has a gradient. The cross entropy is a mean over positions with a target, the divergence a mean
    over all positions. With ``TopLogits`` the tokens outside the top k count as one event. By the log-sum inequality
    this is a lower bound on the full divergence. The bound is tight if student and teacher distribute the rest equally.

    Args:
        logits: [..., classes].
        targets: int64 [...], ``IGNORED`` if there is none.
        teacher: logits of the shape of the student's, or their shortened form; None only if ``kl`` is 0.
    """
    parts: tuple[Tensor, ...] = ()
    if weights.kl:
        assert teacher is not None
        parts = (teacher,) if isinstance(teacher, Tensor) else (teacher.tokens, teacher.logs, teacher.rest)
    flat = tuple(t.flatten(0, targets.ndim - 1) for t in parts)
    fused: Callable[..., tuple[Tensor, ...]] = _Fused.apply
    loss, lm, kl = fused(logits.flatten(0, -2), targets.flatten(), weights, *flat)
    return {"loss": loss} | ({"lm": lm} if weights.lm else {}) | ({"kl": kl} if weights.kl else {})


def compute_distillation_losses(
    output: Tensor, targets: Tensor | None, teacher: Tensor | TopLogits | None, weights: LossWeights, *, classes: bool
) -> dict[str, Tensor]:
    """``compute_class_losses`` if the model gives logits of ``classes``, else the error of its features.

    Without ``targets`` the class that the teacher finds likeliest is the target. The features' error is
    ‖f − f*‖² / ‖f* − mean f*‖², f* of the teacher.
    """
    if not classes:
        assert isinstance(teacher, Tensor)
        return {"loss": compute_hidden_error([output], [teacher])}
    if targets is None:
        assert teacher is not None
        targets = teacher.argmax(-1) if isinstance(teacher, Tensor) else teacher.tokens[..., 0]
    return compute_class_losses(output, targets, teacher, weights)


class _Context(Protocol):
    """What ``_Fused`` uses of its autograd context."""

    needs_input_grad: Sequence[bool]
    gradient: Tensor | None

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...


class _Fused(torch.autograd.Function):
    """(loss, lm, kl) of flat logits [positions, vocab]. The forward pass also computes the gradient of ``loss``.

    The gradient in the logits is a_lm (p − onehot) + a_kl (p − q): p and q are the probabilities of student and
    teacher, a the weight of a position in each mean.
    """

    @staticmethod
    def forward(
        ctx: _Context, logits: Tensor, targets: Tensor, weights: LossWeights, *teacher: Tensor
    ) -> tuple[Tensor, ...]:
        # The weight of each position in the two means: the loss is their weighted sum.
        known = targets != IGNORED
        of_lm = weights.lm / known.sum().clamp_min(1) * known
        of_kl = weights.kl / len(logits)
        # In float16 it would underflow: the loss is scaled only after this.
        kind = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.empty_like(logits, dtype=kind) if ctx.needs_input_grad[0] else None
        wide = find_widest_float(logits.device)
        lm, kl = logits.new_zeros(2, dtype=wide).unbind()
        rows = max(1, min(CHUNK // logits.shape[1], len(logits)))
        # The same memory for all chunks: new memory of this size comes from the system, and takes longer than its use.
        count = 4 if len(teacher) == 1 else 2
        space = [logits.new_empty((rows, logits.shape[1]), dtype=torch.float32) for _ in range(count)]
        for at in (slice(first, first + rows) for first in range(0, len(logits), rows)):
            # Cross entropy: log Σ exp z − z of the target. An ignored target is -100, which no index may be.
            z, p, *more = (each[: len(logits[at])] for each in space)
            torch.softmax(z.copy_(logits[at]), -1, out=p)
            total = _log_total(z, p)
            target = targets[at].clamp_min(0)[:, None]
            lm = lm + ((total - z.gather(-1, target)[:, 0]) * known[at]).sum(dtype=wide)
            # p becomes the gradient in place, since another tensor of this size would not fit the cache.
            share = of_lm[at, None].float()
            if weights.kl:
                found, p = _compute_divergence(z, p, total, [t[at] for t in teacher], share, of_kl, more)
                kl = kl + found
            else:
                p.mul_(share)
            if gradient is not None:
                gradient[at] = p.scatter_add_(-1, target, -share)
        lm, kl = lm / known.sum().clamp_min(1), kl / len(logits)
        ctx.gradient = gradient
        loss = (weights.lm * lm + weights.kl * kl).float()
        lm, kl = lm.float(), kl.float()
        ctx.mark_non_differentiable(lm, kl)
        return loss, lm, kl

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # Taken out of the context and scaled in place: it is as large as the logits.
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None
        return gradient.mul_(gradients[0]), *[None] * (len(ctx.needs_input_grad) - 1)


def _log_total(z: Tensor, p: Tensor) -> Tensor:
    """log Σ exp z from p = softmax(z), without more exponentials. It is stable: the largest p is at least 1 / vocab."""
    return z.amax(-1) - p.amax(-1).log()


def _compute_divergence(
    z: Tensor, p: Tensor, total: Tensor, teacher: Sequence[Tensor], of_lm: Tensor, of_kl: float, space: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Σ KL(q ‖ p) over rows, and (of_lm + of_kl) p − of_kl q, which overwrites ``p`` [rows, vocab].

    ``space``: two tensors of the size of ``p`` to compute in, for a teacher's whole logits.
    """
    # 1. The teacher's whole logits t: log q − log p = (t − log Σ exp t) − (z − log Σ exp z).
    if len(teacher) == 1:
        t, q = space
        torch.softmax(t.copy_(teacher[0]), -1, out=q)
        total_of_teacher = _log_total(t, q)  # before t is overwritten
        apart = t.sub_(z).sub_((total_of_teacher - total)[:, None])
        found = torch.linalg.vecdot(q, apart).sum(dtype=find_widest_float(z.device))
        return found, p.mul_(of_lm + of_kl).sub_(q, alpha=of_kl)
    # 2. Its top k: r is the teacher's probability of all other tokens together, ``others`` the student's. The bound
    # keeps its logarithm finite.
    tokens, logs, rest = teacher[0], teacher[1].float(), teacher[2].float()
    q, r, seen = logs.exp(), rest.exp(), p.gather(-1, tokens)
    others = 1 - seen.sum(-1).clamp(max=1 - 1e-6)
    student = z.gather(-1, tokens) - total[:, None]
    found = (q * (logs - student)).sum() + (r * (rest - others.log())).sum()
    # For each token of the common event, q is r · p / others.
    spread = (r / others)[:, None]
    gradient = p.mul_(of_lm + of_kl * ((q.sum(-1) + r)[:, None] - spread))
    return found, gradient.scatter_add_(-1, tokens, of_kl * (spread * seen - q))


def compute_hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over layers of ‖h − h*‖² / ‖h* − mean h*‖²: h of the student, h* of the teacher, [batch, length, hidden]."""
    errors = []
    for ours, theirs in zip(student, teacher, strict=True):
        # Without the mean, since a large constant part of the states would hide their error.
        ours, theirs = ours.float(), theirs.float()
        spread = (theirs - theirs.mean(tuple(range(theirs.ndim - 1)))).square().sum().clamp_min(1e-12)
        errors.append((ours - theirs).square().sum() / spread)
    return torch.stack(errors).mean()


def shorten_logits(logits: Tensor, k: int) -> TopLogits:
    """The k likeliest tokens of ``logits`` [..., vocab], their log probabilities, and the other tokens' together."""
    logs = logits.float().log_softmax(-1)
    top = logs.topk(min(k, logs.shape[-1]), -1)
    rest = torch.log1p(-top.values.exp().sum(-1).clamp(max=1 - 1e-6))
    return TopLogits(top.indices, top.values, rest)
