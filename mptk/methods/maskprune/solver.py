"""solver: the minimax updates of masks, widths and duals, in the algorithm's order.

    min_{θ,m,s} max_{y,z ≥ 0}  L(θ, m) + Σ_{l,c} y[l,c] · ‖m[l,c]‖²_{⌈s_c⌉,F} + z · (R(s) − B)

m[l,c] are the masks of family c in layer l, s_c the units removed *from every layer alike*, R the cost of the uniform
model over the dense one's. ‖·‖²_{k,F} sums F m² over the k units whose removal is predicted to cost least. F is the
variance of the loss's gradient in a mask (the diagonal of the empirical Fisher, so a curvature), d what the gradient is
beyond a quadratic of that curvature, and v = ½ F̂ + d the rise of the loss, in nats a token, when the unit goes, where F̂
is F after a second estimate has had its say (``saliency``). So masks of different families, layers and models are
measured in one unit, and no step size depends on the model's size.
``docs/maskprune.md`` gives each equation with these names and what differs from the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mptk.errors import MptkError
from mptk.run.settings import Rates

Resource = Callable[[Mapping[str, float]], float]
"""R: widths (family → units kept, real numbers) → cost over the dense model's."""

EPSILON = 1e-12
DIVERGED = 1e100
LARGEST_EXPONENT = 700.0
ROUNDS = 120
"""Updates of widths and z in all, at least: they cost nothing beside a step of the model, and need this many."""


class Solver:
    """Masks, widths and duals. Tensors are on the CPU, in float32 but for F.

    Args:
        shapes: family → (layers, scopes, size).
        resource: R(widths).
        budget: B, the share of the dense cost to keep.
        steps: in how many steps masks are learned; the budget is reached after ``ramp`` of them.
        given: widths that are not to be learned; they are approached as the target is, and the rest meets the budget.

    ``prior``, by family, may be given another estimate of F by its square root, in any unit: [layers, scopes, size].
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int, int]],
        resource: Resource,
        budget: float,
        steps: int,
        rates: Rates | None = None,
        ramp: float = 0.6,
        given: Mapping[str, int] | None = None,
    ) -> None:
        self.shapes, self.resource, self.budget, self.steps = dict(shapes), resource, budget, steps
        self.rates, self.ramp, self.given = rates or Rates(), ramp, dict(given or {})
        self.rounds = max(1, math.ceil(ROUNDS / steps))
        self.masks = {c: torch.ones(shape, requires_grad=True) for c, shape in shapes.items()}
        self.fisher = {c: torch.zeros(shape, dtype=torch.float64) for c, shape in shapes.items()}
        self.drift = {c: torch.zeros(shape, dtype=torch.float64) for c, shape in shapes.items()}
        self.last = {c: torch.zeros(shape, dtype=torch.float64) for c, shape in shapes.items()}
        self.squares = {c: torch.zeros(shape, dtype=torch.float64) for c, shape in shapes.items()}
        self.prior: dict[str, Tensor] = {}
        self.removed = dict.fromkeys(shapes, 0.0)
        self.fixed: dict[str, int] = {}
        self.y = {c: torch.ones(shape[0]) for c, shape in shapes.items()}
        self.z = 0.0
        self.step_count = self.seen = self.tokens = 0

    # ---- what is read ----

    def applied(self, family: str, layer: int) -> Tensor:
        """The mask that the model applies, [scopes, size]: the learned one, at most 1."""
        return Clamp.apply(self.masks[family][layer])  # type: ignore[no-any-return, no-untyped-call]

    def saliency(self, family: str) -> Tensor:
        """v = ½ F̂ + d: predicted rise of the loss, nats a token, when a unit goes to 0: [layers, scopes, size].

        F̂ is the geometric mean of F and the prior P², which is first given F's mean over a layer's units. The errors of
        the two are of different kinds, so that their mean ranks units better than either.
        """
        f = self.curvature(family)
        if family in self.prior:
            p = self.prior[family].double().square()
            f = (f * p * f.mean(-1, keepdim=True) / p.mean(-1, keepdim=True).clamp_min(EPSILON)).sqrt()
        return 0.5 * f + self.beyond(family)

    def beyond(self, family: str) -> Tensor:
        """d, moved towards 0 by two of its standard errors: where it is noise, it is 0."""
        drift, memory = self.drift[family], self.rates.drift
        error = (self.curvature(family) * (1 - memory) / (1 + memory) / max(self.tokens, 1)).sqrt()
        return drift.sign() * (drift.abs() - 2 * error).clamp_min(0)

    def curvature(self, family: str) -> Tensor:
        """F, corrected for the start of its average."""
        return self.fisher[family] / max(1 - self.rates.fisher**self.seen, EPSILON)

    def widths(self) -> dict[str, float]:
        return {c: shape[2] - self.removed[c] for c, shape in self.shapes.items()}

    def tail(self, family: str) -> Tensor:
        """Which units are among the ⌈s⌉ least of their layer and scope row: boolean, [layers, scopes, size]."""
        order = self.saliency(family).argsort(dim=-1, stable=True).argsort(dim=-1)
        return order < math.ceil(self.removed[family])

    def target(self) -> float:
        """The budget now: it falls from 1 to B along a cubic (Zhu & Gupta 2017) over the ramp."""
        done = min(1.0, (self.step_count + 1) / max(1.0, self.ramp * self.steps))
        return self.budget + (1 - self.budget) * (1 - done) ** 3

    # ---- the updates ----

    def watch(self, family: str, layer: int, gradients: Tensor) -> None:
        """Take gradients of the mean loss in a layer's masks, token by token: [tokens, scopes · size]."""
        squares = gradients.float().square().sum(0)
        self.squares[family][layer] += squares.reshape(self.shapes[family][1:]).to(self.squares[family])

    def observe(self, tokens: int) -> None:
        """Take the gradients of one batch of ``tokens`` into F and d. Gradients are of the mean loss over the tokens.

        F is the variance of the gradient of one token's loss. 1. From the tokens' own gradients, where ``watch`` saw
        them: thousands of samples a batch. 2. Else half the mean square difference of successive batches' gradients,
        which masks that move slowly do not touch. A quadratic would give −g = F (1 − m); d averages what −g has beyond.
        """
        for c, m in self.masks.items():
            assert m.grad is not None
            g = m.grad.double()
            if self.squares[c].any():
                noise = (tokens * self.squares[c] - g.square()).clamp_min(0)
            else:
                noise = 0.5 * tokens * (g - self.last[c]).square() if self.seen else tokens * g.square()
            self.fisher[c].mul_(self.rates.fisher).add_(noise, alpha=1 - self.rates.fisher)
            self.last[c] = g
            self.squares[c].zero_()
        self.seen += 1
        self.tokens = tokens
        for c, m in self.masks.items():
            beyond = -self.last[c] - self.curvature(c) * (1 - m.detach().double())
            self.drift[c].mul_(self.rates.drift).add_(beyond, alpha=1 - self.rates.drift)

    def step(self, tokens: int) -> None:
        """One step of everything but θ, from the gradients in ``masks``; then the gradients are cleared."""
        self.observe(tokens)
        self._descend()
        self._shrink()
        for _ in range(self.rounds):
            self._resize()
        self._ascend()
        self.step_count += 1
        self.clear()

    @torch.no_grad()
    def _descend(self) -> None:
        """m ← m + η_m (F (1 − m) + d) / (F + mean F): a damped Newton step along what the gradient is known to be.

        The gradient of one batch is noise for most masks, and noise only drives a mask below 1, never above.
        """
        rate = min(1.0, self.rates.mask / self.steps)
        for c, m in self.masks.items():
            if not self.last[c].isfinite().all():
                raise MptkError(f"the gradient of {c}'s masks is not finite; lower --lr or train in float32")
            curvature = self.curvature(c)
            pull = curvature * (1 - m.double()) + self.beyond(c)
            m.add_((rate * pull / (curvature + curvature.mean()).clamp_min(EPSILON)).float()).clamp_(0, 1)

    @torch.no_grad()
    def _shrink(self) -> None:
        """The proximal step of y‖m‖²_{k,F} in the metric F: m / (1 + 2 η y) on the tail, the identity elsewhere."""
        rate = self.rates.prox / self.steps
        for c, m in self.masks.items():
            m.copy_(torch.where(self.tail(c), proximal(m, rate, self.y[c][:, None, None]), m))

    def _resize(self) -> None:
        """s ← s − η_s ∂/∂s: Σ_l y q against z ∂R/∂s, over their sum, so that a step has no unit; then z.

        z ← z · exp(η_z (R − B)): never below 0, falling once the budget is met.
        """
        if self.fixed:
            return
        share = (1 - self.target()) / (1 - self.budget) if self.budget < 1 else 1.0
        self.removed |= {c: share * (self.shapes[c][2] - w) for c, w in self.given.items()}
        free = [c for c in self.shapes if c not in self.given]
        if not free:
            return
        pains = {c: self._marginal(c) for c in free}
        slopes = {c: self._slope(c) for c in free}
        if self.z <= 0:
            prices = [pains[c] / slopes[c] for c in pains if slopes[c] > EPSILON]
            self.z = max(sum(prices) / max(1, len(prices)), EPSILON)
        urgency = self.z * math.exp(10 * self.rates.urgency * (self.resource(self.widths()) - self.target()))
        for c in free:
            size = self.shapes[c][2]
            gain = urgency * slopes[c]
            direction = (gain - pains[c]) / max(gain + pains[c], EPSILON)
            self.removed[c] = min(
                max(self.removed[c] + self.rates.width / (self.steps * self.rounds) * size * direction, 0.0), size - 1.0
            )
        missed = self.resource(self.widths()) - self.target()
        self.z *= math.exp(min(10 * self.rates.price / (self.steps * self.rounds) * missed, LARGEST_EXPONENT))
        self._require(self.z, f"dual z is {self.z:.3g} at {self.resource(self.widths()):.3f} of the cost")

    def _require(self, dual: float, what: str) -> None:
        if not 0 <= dual < DIVERGED:
            raise MptkError(
                f"step {self.step_count}: the {what}, so the budget of {self.budget:.3f} cannot be met; ask for less"
            )

    def _ascend(self) -> None:
        """y ← y + η_y ‖m‖²_k, over what it was with the tail at 1."""
        for c, m in self.masks.items():
            tail = self.tail(c)
            left = (m.detach().square() * tail).sum((1, 2)) / tail.sum((1, 2)).clamp_min(1)
            self.y[c] = self.y[c] + self.rates.dual / self.steps * left
            self._require(float(self.y[c].max()), f"dual y of {c} is {float(self.y[c].max()):.3g}")

    def _marginal(self, family: str) -> float:
        """Σ_l y_l q_l: q is the (⌈s⌉+1)-th smallest v, straight through the ceiling; summed over scope rows."""
        values = self.saliency(family).clamp_min(0).sort(dim=-1).values
        k = min(math.ceil(self.removed[family]), values.shape[-1] - 1)
        return float((self.y[family] * values[..., k].sum(-1)).sum())

    def _slope(self, family: str) -> float:
        """−∂R/∂s of one unit, by a central difference."""
        widths = self.widths()
        below, above = max(widths[family] - 0.5, 0.0), widths[family] + 0.5
        return (self.resource(widths | {family: above}) - self.resource(widths | {family: below})) / (above - below)

    # ---- the end ----

    def fix(self, widths: Mapping[str, int]) -> None:
        """Widths are settled: from now on only masks move."""
        self.fixed = dict(widths)
        self.removed = {c: float(self.shapes[c][2] - w) for c, w in widths.items()}

    def clear(self) -> None:
        """Forget the gradients."""
        for m in self.masks.values():
            m.grad = None

    @torch.no_grad()
    def harden(self, kept: Mapping[str, Tensor]) -> None:
        """Masks of removed units become exactly 0; all other families' masks become 1."""
        for c, m in self.masks.items():
            m.copy_(m * kept[c] if c in kept else torch.ones_like(m))

    def metrics(self) -> dict[str, float]:
        """What is shown: cost and target, widths, and how much of the tail is left (root of the mean square)."""
        left = [m.detach()[self.tail(c)] for c, m in self.masks.items()]
        norm = torch.cat(left).square().mean().sqrt().item() if sum(map(len, left)) else 0.0
        widths = {f"width/{c}": w for c, w in self.widths().items()}
        return {"cost": self.resource(self.widths()), "target": self.target(), "tail": norm, "z": self.z, **widths}

    # ---- checkpoints ----

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as tensors by name."""
        counts = [self.z, self.step_count, self.seen, self.tokens, bool(self.fixed)]
        tensors = {"solver.z": torch.tensor(counts, dtype=torch.float64)}
        for c in self.shapes:
            tensors[f"solver.{c}.mask"] = self.masks[c].detach()
            tensors[f"solver.{c}.fisher"] = self.fisher[c]
            tensors[f"solver.{c}.drift"] = self.drift[c]
            tensors[f"solver.{c}.last"] = self.last[c]
            tensors[f"solver.{c}.y"] = self.y[c]
            tensors[f"solver.{c}.removed"] = torch.tensor(self.removed[c], dtype=torch.float64)
        tensors |= {f"solver.{c}.prior": prior for c, prior in self.prior.items()}
        return tensors

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the state that ``state`` gave."""
        z, count, seen, tokens, fixed = tensors["solver.z"].tolist()
        self.z, self.step_count, self.seen, self.tokens = z, int(count), int(seen), int(tokens)
        for c in self.shapes:
            self.masks[c].copy_(tensors[f"solver.{c}.mask"])
            self.fisher[c].copy_(tensors[f"solver.{c}.fisher"])
            self.drift[c].copy_(tensors[f"solver.{c}.drift"])
            self.last[c].copy_(tensors[f"solver.{c}.last"])
            self.y[c] = tensors[f"solver.{c}.y"].clone()
            self.removed[c] = float(tensors[f"solver.{c}.removed"])
        self.prior = {c: tensors[f"solver.{c}.prior"] for c in self.shapes if f"solver.{c}.prior" in tensors}
        if fixed:
            self.fix({c: round(w) for c, w in self.widths().items()})


class Clamp(torch.autograd.Function):
    """min(max(m, 0), 1), with the gradient straight through."""

    @staticmethod
    def forward(_: object, m: Tensor) -> Tensor:
        return m.clamp(0, 1)

    @staticmethod
    def backward(_: object, *gradients: Tensor) -> Tensor:
        return gradients[0]


def proximal(m: Tensor, rate: float | Tensor, y: float | Tensor) -> Tensor:
    """argmin_x ½ (x − m)² + rate · y · x²: m / (1 + 2 · rate · y)."""
    return m / (1 + 2 * rate * y)
