"""optimizers: AdamW, and Muon for the matrices of a model whose own weights are trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from mptk.config.learning import Learning, Training
from mptk.distributed.processes import gather_tensor, shard_like
from mptk.ir.program import ProgramModule

MUON_RATE = 12.0
"""Muon's rate beside AdamW's (``benchmarks/recovery.md``)."""
MOMENTUM, SIZE = 0.95, 0.2
"""``SIZE``: root mean square of an update at a rate of 1, about as of AdamW's (arXiv 2502.16982)."""
ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.775, 2.0315)
"""Of the Newton–Schulz iteration."""
PRODUCT_TOKENS = 8
"""Tokens of a forward pass that take as long as a step's products, over the hidden size: 7.9 for SmolLM2-135M on one
core in float32, 4.3 in bfloat16."""
BFLOAT16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
"""Whether this processor multiplies in bfloat16."""


def make_optimizer(student: nn.Module, settings: Training) -> AdamW:
    """The optimizer of all parameters that require a gradient. A group's ``peak`` is its highest rate."""
    rate, trained = settings.lr, [p for p in student.parameters() if p.requires_grad]
    assert rate is not None
    if settings.optimizer == "adamw":
        return AdamW([{"params": trained, "peak": rate}], lr=rate, weight_decay=0.0, fused=True)
    chosen = {id(p) for p in find_matrices(student)}
    return Muon([p for p in trained if id(p) in chosen], [p for p in trained if id(p) not in chosen], rate)


def count_product_tokens(settings: Learning, hidden: int) -> float:
    """Tokens of a forward pass of the dense model that take as long as Muon's products in a step."""
    return 0.0 if settings.rank or settings.training.optimizer == "adamw" else PRODUCT_TOKENS * hidden


def find_matrices(model: nn.Module) -> list[Tensor]:
    """Parameters with two dimensions, but those with a row a token: embeddings, and the head of a language model."""
    tables = [p for module in model.modules() for p in _find_tables(module) if p.ndim == 2]
    rows = max((len(p) for p in tables), default=None)
    own = {id(p) for p in tables}
    return [p for p in model.parameters() if p.ndim == 2 and id(p) not in own and len(p) != rows]


def _find_tables(module: nn.Module) -> Sequence[Tensor]:
    if isinstance(module, ProgramModule):
        return module.tables
    return [module.weight] if isinstance(module, nn.Embedding) else []


class Muon(AdamW):
    """Steps along the nearest orthogonal matrix to the momentum (Jordan et al. 2024), as of ``torch.optim.Muon``.

    torch's multiplies in bfloat16, which takes minutes a step on a processor without it. Each process computes whole
    matrices, of shards, too. ``others``: parameters that AdamW trains, at ``rate``.
    """

    def __init__(self, matrices: Sequence[Tensor], others: Sequence[Tensor], rate: float) -> None:
        groups = [
            {"params": matrices, "peak": MUON_RATE * rate, "muon": True},
            {"params": others, "peak": rate, "muon": False},
        ]
        super().__init__([group for group in groups if group["params"]], lr=rate, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change each parameter that has a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            for p in group["params"] if group["muon"] else ():
                if p.grad is not None:
                    self._turn(p, p.grad, group["lr"])

    def _turn(self, p: Tensor, gradient: Tensor, rate: float) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        update = make_orthogonal(gather_tensor(gradient.lerp(state["momentum"], MOMENTUM)))
        p.add_(shard_like(update, p), alpha=-rate * SIZE * max(update.shape) ** 0.5)


def make_orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix whose singular values are all 1: theirs are from 0.7 to 1.2."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x.bfloat16() if x.device.type != "cpu" or BFLOAT16 else x.float()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)
