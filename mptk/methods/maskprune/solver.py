"""solver: the minimax updates of masks, widths and duals, in the algorithm's order.

    min_{θ,m,s} max_{y,z ≥ 0}  L(θ, m) + Σ_{l,c} y[l,c] · ‖m[l,c]‖²_{⌈s_c⌉} + z · (R(s) − B)

- m[l,c]: the masks of family c in layer l, 1 at the start. ‖·‖²_k: of the tail, the k units that cost least to remove.
- s_c: the number of units removed from each layer, the same for all layers.
- R: the cost of the pruned model, as a share of the dense model's cost. B: the budget.
- F: the variance of the loss's gradient in a mask. This is the diagonal of the empirical Fisher matrix, a curvature.
- F̂: F combined with Wanda's estimate (``saliency``).
- d: the part of the gradient that a quadratic of curvature F does not explain.
- v = ½ F̂ + d: the predicted rise of the loss, in nats a token, if the unit is removed.

How m follows s is an update of its own (``updates``). The gradient in a mask at 0 is the loss's own, so a removed unit
whose v rises comes back. Masks of all families, layers and models are measured in one unit, and no step size depends on
the model's size. ``docs/maskprune.md`` gives each equation with these names, and the differences from the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from mptk.config import Rates
from mptk.distributed.processes import find_widest_float
from mptk.errors import BudgetError, InputError
from mptk.methods.criteria.fisher import combine_curvature, subtract_noise
from mptk.methods.maskprune.updates import UPDATES

Resource = Callable[[Mapping[str, float]], float]
"""R: widths (family → units kept, real numbers) → cost, as a share of the dense model's."""

EPSILON = 1e-12
"""Least divisor, and least price."""
DIVERGED = 1e100
"""A price above this shows that no widths meet the budget. It is far from float64's largest number, so the error still
has the price."""
LARGEST_EXPONENT = 700.0
"""exp(709) is the largest in float64."""
ROUNDS = 120
"""Least number of updates of widths and z. They need this many, and cost nothing compared with a step of the model."""


class Solver:
    """Masks, widths and duals. Masks and y are float32, F and d are float64 if the device has that.

    Args:
        shapes: family → (layers, scopes, size).
        resource: R(widths).
        budget: B, the share of the dense cost to keep.
        steps: number of steps that learn masks.
        ramp: share of the steps after which the budget is reached.
        given: fixed widths. They are approached at the pace of the target; the other families meet the budget.
        device: of the masks and all tensors of their shape; the activations' device.
        blocks: family whose units are whole blocks → the blocks that cannot be removed.
        stays: family → the units of a larger cut, boolean [layers, scopes, size], as many in each row. Only these are
            chosen from. The target then falls from that cut's cost.
        masks: name of the update of the masks (``UPDATES``).

    ``prior``: family → square root of another estimate of F, in any unit, [layers, scopes, size]. It may stay empty.
    For blocks it is the order of removal.
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
        device: torch.device | None = None,
        blocks: Mapping[str, Collection[int]] | None = None,
        stays: Mapping[str, Tensor] | None = None,
        masks: str = "proximal",
    ) -> None:
        self.shapes, self.resource, self.budget = dict(shapes), resource, budget
        self.ramp, self.given, self.totals, self.masking = ramp, dict(given or {}), rates or Rates(), masks
        self.blocks = {family: sorted(stay) for family, stay in (blocks or {}).items()}
        self.device = device or torch.device("cpu")
        self._divide_over(steps)

        # m: 1, or 0 for the units that a larger cut removed.
        whole = {family: torch.ones(shape, dtype=torch.bool, device=self.device) for family, shape in shapes.items()}
        self.stays = {family: (stays or {}).get(family, units) for family, units in whole.items()}
        self.masks = {family: units.float().requires_grad_() for family, units in self.stays.items()}

        # F, d, the last g, and the sum of squares of the tokens' gradients since the last ``observe``.
        self.fisher, self.drift, self.last, self.squares = (self._make_zeros() for _ in range(4))
        self.prior: dict[str, Tensor] = {}

        # The units that have been in the tail. Those that are out of it again came back.
        self.faded = {family: torch.zeros_like(units) for family, units in whole.items()}

        # s, y, z, and their start. A row of a larger cut keeps as many units as any other, so one row tells s.
        self.gone = {family: float((~units[0, 0]).sum()) for family, units in self.stays.items()}
        self.removed = dict(self.gone)
        self.begin = resource(self.compute_widths()) if stays else 1.0
        self.fixed: dict[str, int] = {}
        self.y = {family: torch.ones(shape[0], device=self.device) for family, shape in shapes.items()}
        self.z = 0.0
        self.step_count = self.seen = self.tokens = 0

    def _make_zeros(self) -> dict[str, Tensor]:
        dtype = find_widest_float(self.device)
        return {family: torch.zeros(shape, dtype=dtype, device=self.device) for family, shape in self.shapes.items()}

    def _divide_over(self, steps: int) -> None:
        """Set the number of steps, and what each does of the totals."""
        self.steps, self.rates = steps, self.totals.divide_over(steps)
        self.rounds = max(1, math.ceil(ROUNDS / steps))
        self.update = UPDATES[self.masking](self.rates, steps)

    def plan_steps(self, steps: int) -> None:
        """Learn masks in another number of steps than was planned. F stays as it is known, and the rest goes on."""
        curvature = {family: self.compute_curvature(family) for family in self.fisher}
        self._divide_over(steps)
        # A moving average is divided by the weight of what it has seen, which the new memory makes another.
        for family, known in curvature.items():
            self.fisher[family] = known * (1 - self.rates.fisher**self.seen)

    # ---- derived values ----

    def get_mask(self, family: str, layer: int) -> Tensor:
        """The mask that the model applies, [scopes, size]."""
        return self.masks[family][layer]

    def compute_saliency(self, family: str) -> Tensor:
        """v = ½ F̂ + d: predicted rise of the loss in nats a token if a unit goes to 0: [layers, scopes, size].

        F̂ is the geometric mean of F and the prior P², scaled to the mean of F over a layer's units. The two estimates
        have different errors, so their mean ranks units better than either. For a block F̂ is F.
        """
        fisher = self.compute_curvature(family)
        if family in self.prior and family not in self.blocks:
            fisher = combine_curvature(fisher, self.prior[family])
        return 0.5 * fisher + self.compute_beyond(family)

    def compute_scores(self, family: str) -> Tensor:
        """The scores of units, [layers, scopes, size], the lowest removed first: v or, for blocks, the prior.

        Those of units that a larger cut removed are −∞.
        """
        scores = self.prior[family] if family in self.blocks else self.compute_saliency(family)
        return scores.masked_fill(~self.stays[family], -torch.inf)

    def order(self, family: str) -> Tensor:
        """The units of each layer and scope row in the order of removal; blocks that must stay come last."""
        scores = self.compute_scores(family).clone()
        for unit in self.blocks.get(family, ()):
            scores[..., unit] = torch.inf
        return scores.argsort(dim=-1, stable=True)

    def compute_beyond(self, family: str) -> Tensor:
        """d, moved towards 0 by two standard errors, so that noise gives 0."""
        # F is the variance of one token's gradient, d a moving average of means over ``tokens``. Such an average has
        # (1 − memory) / (1 + memory) of the variance of one term.
        drift, memory = self.drift[family], self.rates.drift
        error = (self.compute_curvature(family) * (1 - memory) / (1 + memory) / max(self.tokens, 1)).sqrt()
        return subtract_noise(drift, error)

    def compute_curvature(self, family: str) -> Tensor:
        """F: the running average, corrected for its start at 0."""
        return self.fisher[family] / max(1 - self.rates.fisher**self.seen, EPSILON)

    def compute_widths(self) -> dict[str, float]:
        return {family: shape[2] - self.removed[family] for family, shape in self.shapes.items()}

    def mark_tail(self, family: str) -> Tensor:
        """The first ⌈s⌉ units to remove in each layer and scope row: boolean [layers, scopes, size]."""
        return self.order(family).argsort(dim=-1) < math.ceil(self.removed[family])

    def compute_target(self) -> float:
        """The budget of the current step. It falls to B over the ramp, along a cubic (Zhu & Gupta 2017).

        It begins with 1 or, after a larger cut, with that one's cost.
        """
        # The cubic cuts fast while many units cost nothing, and slowly near B.
        done = min(1.0, (self.step_count + 1) / max(1.0, self.ramp * self.steps))
        return self.budget + (self.begin - self.budget) * (1 - done) ** 3

    # ---- the updates ----

    def watch(self, family: str, layer: int, gradients: Tensor) -> None:
        """Accumulate squares of the mean loss's gradients in a layer's masks, by token: [tokens, scopes · size]."""
        squares = gradients.float().square().sum(0)
        self.squares[family][layer] += squares.reshape(self.shapes[family][1:]).to(self.squares[family])

    def observe(self, tokens: int) -> None:
        """Update F and d with the gradients of the mean loss of one batch of ``tokens`` tokens.

        F is the variance of the gradient of one token's loss.

        1. If ``watch`` received the tokens' own gradients, F comes from these: thousands of samples a batch.
        2. If not, F is half the mean square difference of the gradients of successive batches.

        A quadratic loss would give −g = F (1 − m). d averages the difference of −g from that.
        """
        for family, m in self.masks.items():
            assert m.grad is not None
            if not m.grad.isfinite().all():
                raise InputError(
                    f"the gradient of {family}'s masks is not finite; lower --lr or train in float32", name="lr"
                )
            g = m.grad.to(self.last[family].dtype)
            # g is a mean over n tokens: n times the squares of what each adds is the mean square of one token's.
            if self.squares[family].any():
                noise = (tokens * self.squares[family] - g.square()).clamp_min(0)
            else:  # the first batch has no earlier one: its own square stands in
                noise = 0.5 * tokens * (g - self.last[family]).square() if self.seen else tokens * g.square()
            self.fisher[family].mul_(self.rates.fisher).add_(noise, alpha=1 - self.rates.fisher)
            self.last[family] = g
            self.squares[family].zero_()
        self.seen += 1
        self.tokens = tokens
        # After F of all families, whose correction depends on ``seen``.
        for family, m in self.masks.items():
            beyond = -self.last[family] - self.compute_curvature(family) * (1 - m.detach().to(self.last[family].dtype))
            self.drift[family].mul_(self.rates.drift).add_(beyond, alpha=1 - self.rates.drift)

    def step(self, tokens: int) -> None:
        """Update everything except θ from the gradients in ``masks``, then clear the gradients."""
        # The order of the equations in docs/maskprune.md: F and d, then s and z, and m and y for the new s.
        self.observe(tokens)
        for _ in range(self.rounds):
            self._resize()
        self._move_masks()
        self.step_count += 1
        self.clear()

    @torch.no_grad()
    def _move_masks(self) -> None:
        """m and y, as the update has it."""
        for family, m in self.masks.items():
            stays, y = self.stays[family], self.y[family]
            tail = self.mark_tail(family) & stays
            known = self.compute_curvature(family), self.compute_beyond(family)
            self.y[family] = self.update.move_masks(m, tail, *known, y)
            self._require_dual("y", float(self.y[family].max()))
            m.mul_(stays)  # what a larger cut removed has no way back
            self.faded[family] |= tail

    def _resize(self) -> None:
        """One update of the widths, then one of z. Given widths follow the budget's ramp."""
        if self.fixed:
            return
        ramped = (self.begin - self.compute_target()) / (self.begin - self.budget) if self.budget < self.begin else 1.0
        for family, width in self.given.items():
            gone = self.gone[family]
            self.removed[family] = gone + ramped * (self.shapes[family][2] - gone - width)
        free = [family for family in self.shapes if family not in self.given]
        if free:
            self._move_widths(free)
            self._move_price()

    def _move_widths(self, free: Sequence[str]) -> None:
        """s ← s + η_s (a − b) / (a + b), with a = −z' ∂R/∂s and b = Σ_l y q.

        If one more unit goes, a is the value of the saved cost and b the predicted loss. z' is z, raised while R
        exceeds the budget. The division by a + b makes the step independent of their unit. The first call sets z to the
        mean price at which a = b.
        """
        losses = {family: self._predict_marginal(family) for family in free}
        slopes = {family: self._compute_slope(family) for family in free}
        if self.z <= 0:
            prices = [losses[family] / slopes[family] for family in free if slopes[family] > EPSILON]
            self.z = max(sum(prices) / max(1, len(prices)), EPSILON)
        # Rates are totals over all updates; z's are for a budget that is missed by a tenth, hence the 10.
        price = self.z * math.exp(10 * self.rates.urgency * self._compute_excess())
        rate = self.rates.width / (self.steps * self.rounds)
        for family in free:
            size, saved = self.shapes[family][2], price * slopes[family]
            direction = (saved - losses[family]) / max(saved + losses[family], EPSILON)
            moved = self.removed[family] + rate * size * direction
            self.removed[family] = min(max(moved, self.gone[family]), self._count_removable(family))

    def _move_price(self) -> None:
        """z ← z · exp(η_z (R − B)): it stays above 0, and falls once the budget is met."""
        rate = 10 * self.rates.price / (self.steps * self.rounds)
        self.z *= math.exp(min(rate * self._compute_excess(), LARGEST_EXPONENT))
        self._require_dual("z", self.z)

    def _require_dual(self, name: str, value: float) -> None:
        if not 0 <= value < DIVERGED:
            raise BudgetError(
                f"step {self.step_count}: the dual {name} is {value:.3g} at "
                f"{self.resource(self.compute_widths()):.3f} of the cost, so the budget of {self.budget:.3f} cannot be "
                "met; ask for less",
                name="sparsity",
            )

    def _compute_excess(self) -> float:
        """R − B: the cost above the current budget, as a share of the dense cost."""
        return self.resource(self.compute_widths()) - self.compute_target()

    def _predict_marginal(self, family: str) -> float:
        """Σ_l y_l q_l, the predicted cost of one more unit. q is v of the (⌈s⌉+1)-th to go, summed over scope rows.

        It is the subgradient of y ‖m‖²_{⌈s⌉} in s, straight through the ceiling.
        """
        # A negative v counts as 0: a price must not become negative.
        values = self.compute_saliency(family).clamp_min(0).gather(-1, self.order(family))
        k = min(math.ceil(self.removed[family]), self.shapes[family][2] - 1)
        return float((self.y[family] * values[..., k].sum(-1)).sum())

    def _count_removable(self, family: str) -> float:
        """The most units that can be removed."""
        return float(self.shapes[family][2] - max(1, len(self.blocks.get(family, ()))))

    def _compute_slope(self, family: str) -> float:
        """−∂R/∂s: the cost that one more unit saves, by a central difference."""
        widths = self.compute_widths()
        below, above = max(widths[family] - 0.5, 0.0), widths[family] + 0.5
        return (self.resource(widths | {family: above}) - self.resource(widths | {family: below})) / (above - below)

    # ---- the end ----

    def fix(self, widths: Mapping[str, int]) -> None:
        """Fix the widths; only masks change from now on."""
        self.fixed = dict(widths)
        self.removed = {family: float(self.shapes[family][2] - width) for family, width in widths.items()}

    def clear(self) -> None:
        """Clear the gradients of the masks."""
        for m in self.masks.values():
            m.grad = None

    @torch.no_grad()
    def harden(self, kept: Mapping[str, Tensor]) -> None:
        """Set the masks to what is folded into weights: 0 for removed units. ``kept``: family → the units that stay."""
        for family, m in self.masks.items():
            if family in kept:
                self.update.harden_masks(m, kept[family].to(m.device), family in self.blocks)
            else:
                m.fill_(1)

    @torch.no_grad()
    def collect_metrics(self) -> dict[str, float]:
        """Cost and target, the widths, z if it moves any of them, what became of the tail, and mean y if that fades.

        ``tail``: the root mean square of the masks in it. ``returned``: of all units that were ever in it, the share
        that is not now.
        """
        tails = {family: self.mark_tail(family) & self.stays[family] for family in self.masks}
        left = torch.cat([m[tails[family]] for family, m in self.masks.items()])
        faded = sum(int(units.sum()) for units in self.faded.values())
        back = sum(int((units & ~tails[family]).sum()) for family, units in self.faded.items())
        duals = {"z": self.z} if self.shapes.keys() - self.given.keys() else {}
        if self.update.fades:
            duals["y"] = float(torch.cat(list(self.y.values())).mean())
            duals["tail"] = float(left.square().mean().sqrt()) if len(left) else 0.0
        return {
            "cost": self.resource(self.compute_widths()),
            "target": self.compute_target(),
            **duals,
            "returned": back / max(1, faded),
            **{f"width/{family}": width for family, width in self.compute_widths().items()},
        }

    # ---- checkpoints ----

    def state(self) -> dict[str, Tensor]:
        """The state that a resumed run needs: name → tensor."""
        counts = [self.z, self.step_count, self.seen, self.tokens, bool(self.fixed), self.steps]
        removed = {family: torch.tensor(count, dtype=torch.float64) for family, count in self.removed.items()}
        each = {**self._collect_tensors(), "removed": removed, "prior": self.prior}
        found = {f"solver.{family}.{name}": t.detach() for name, of in each.items() for family, t in of.items()}
        return {"solver.z": torch.tensor(counts, dtype=torch.float64), **found}

    def _collect_tensors(self) -> dict[str, dict[str, Tensor]]:
        moved = {"mask": self.masks, "y": self.y, "faded": self.faded}
        return {**moved, "fisher": self.fisher, "drift": self.drift, "last": self.last}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``state`` returned."""
        z, count, seen, tokens, fixed, steps = tensors["solver.z"].tolist()
        self._divide_over(int(steps))
        self.z, self.step_count, self.seen, self.tokens = z, int(count), int(seen), int(tokens)
        for name, of in self._collect_tensors().items():
            for family, tensor in of.items():
                tensor.copy_(tensors[f"solver.{family}.{name}"])
        self.removed = {family: float(tensors[f"solver.{family}.removed"]) for family in self.shapes}
        priors = {family: tensors.get(f"solver.{family}.prior") for family in self.shapes}
        self.prior = {family: prior.to(self.device) for family, prior in priors.items() if prior is not None}
        if fixed:
            self.fix({family: round(width) for family, width in self.compute_widths().items()})
