"""Tiny models with the inputs and gradients of their layers, recorded by module hooks, for the criteria's formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu
from transformers import AutoModelForCausalLM

from mptk import analyze, testing, trace
from mptk.ir import Analysis
from mptk.testing.decoders import HEAD_SIZE, KV_COUNT, LAYER_COUNT, VOCAB_SIZE

Q, EXPERTS = 3, 5  # query heads: KV_COUNT · Q = 6
WINDOWS = torch.randint(3, VOCAB_SIZE, (80, 31), generator=torch.Generator().manual_seed(1))
"""Two batches of different sizes forward (``OBSERVED_TOKENS``), and five with gradients (``GRADIENT_TOKENS``)."""


@dataclass(frozen=True)
class Case:
    model: Any
    analysis: Analysis
    inputs: dict[str, Tensor]
    """Module name → its first input over all of WINDOWS, [rows, features]; for experts the tuple of inputs."""
    grads: dict[str, Tensor]

    def weight(self, name: str) -> Tensor:
        return self.analysis.program.state[name].detach()


def make_case(architecture: str) -> Case:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(testing.make_config(architecture)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3) if p.ndim > 1 else p.data.add_(torch.randn_like(p) * 0.2)
    inputs: dict[str, Any] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: Any) -> None:
            inputs[name] = args if name.endswith("experts") else args[0].detach().flatten(0, -2)

        return hook

    def mixes(name: str, module: nn.Module) -> bool:
        matrix = getattr(module, "weight", nn.Parameter()).ndim == 2
        return name.endswith("experts") or (matrix and not isinstance(module, nn.Embedding))

    hooks = [m.register_forward_pre_hook(record(n)) for n, m in model.named_modules() if mixes(n, m)]
    logits = model(WINDOWS, use_cache=False).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten()).backward()
    for hook in hooks:
        hook.remove()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    return Case(model, analyze(trace(model, dynamic=True)), inputs, grads)


def norm(x: Tensor) -> Tensor:
    return x.square().sum(0).sqrt()


def wanda(case: Case, name: str) -> Tensor:
    """|W_ij| · ‖x_j‖ of one linear layer, [out, in]."""
    return case.weight(f"{name}.weight").abs() * norm(case.inputs[name])


def layers(f: Callable[[str], Tensor], prefix: str = "model.layers") -> Tensor:
    return torch.stack([f(f"{prefix}.{i}") for i in range(LAYER_COUNT)])


def heads_of(positions: Tensor) -> Tensor:
    """[KV_COUNT · Q · HEAD_SIZE] → [KV_COUNT, Q, HEAD_SIZE]."""
    return positions.view(KV_COUNT, Q, HEAD_SIZE)


def assert_scores(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected.float(), rtol=2e-4, atol=1e-7)


def saliency(case: Case, name: str) -> Tensor:
    return (case.weight(name) * case.grads[name]).abs()


def pull(case: Case, name: str) -> Tensor:
    """The loss's gradient in a mask on each input of a linear layer: Σ_i w_ij · ∂L/∂w_ij."""
    return (case.weight(f"{name}.weight") * case.grads[f"{name}.weight"]).sum(0)


def position_slopes(case: Case, name: str) -> Tensor:
    """What each position adds to that gradient, times their number: [positions, in]."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: Any) -> None:
        args[0].retain_grad()
        seen.append(args[0])

    hook = case.model.get_submodule(name).register_forward_pre_hook(keep)
    logits = case.model(WINDOWS, use_cache=False).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten()).backward()
    hook.remove()
    (x,) = seen
    return (x.detach() * x.grad).flatten(0, 1) * WINDOWS.numel()


def routed(case: Case, n: str, expert: int) -> tuple[Tensor, Tensor]:
    """An expert's own tokens: its input rows and its inner activations."""
    x, chosen = case.inputs[f"{n}.mlp.experts"][:2]
    x = x[(chosen == expert).any(1)].detach()
    gate, up = (x @ case.weight(f"{n}.mlp.experts.gate_up_proj")[expert].T).chunk(2, -1)
    return x, silu(gate) * up


class SharedLayer(nn.Module):
    """One feed-forward layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB_SIZE, 7), nn.Linear(7, 13)
        self.inner, self.outer = nn.Linear(7, 12), nn.Linear(12, 7)

    def forward(self, ids: Tensor) -> Any:
        x = self.embed(ids)
        for _ in range(2):
            x = x + self.outer(self.inner(x).relu())
        return self.head(x)
