"""The minimax solver on problems whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mptk.config import Learning, Rates
from mptk.errors import BudgetError, InputError
from mptk.methods.maskprune.solver import Solver
from mptk.methods.maskprune.updates import UPDATES
from mptk.methods.maskprune.updates.proximal import Proximal
from mptk.testing import expect_error

both_updates = pytest.mark.parametrize("masks", ["proximal", "hard"])
SHAPES = {"heads": (3, 1, 8), "ffn": (3, 1, 40)}
PRICES = {"heads": 5.0, "ffn": 1.0}
"""Cost of a unit of each family in each layer."""
DENSE = sum(PRICES[c] * SHAPES[c][2] for c in SHAPES)


def resource(widths: dict[str, float]) -> float:
    return sum(PRICES[c] * w for c, w in widths.items()) / DENSE


def curvatures(seed: int) -> dict[str, Tensor]:
    """h of the loss Σ ½ h (m − 1)²: what removing each unit costs. Log-normal, another scale for each family."""
    g = torch.Generator().manual_seed(seed)
    return {c: (torch.randn(s, generator=g) * 1.5).exp() * (4e-3 if c == "heads" else 1e-3) for c, s in SHAPES.items()}


def solve(h: dict[str, Tensor], budget: float, steps: int = 400, noise: float = 1.0, **options: Any) -> Solver:
    """Gradients as a batch of text gives them: the quadratic's, and noise whose variance is the curvature over n."""
    tokens = 1000
    g = torch.Generator().manual_seed(1)
    solver = Solver(SHAPES, resource, budget, steps, **options)
    for _ in range(20):
        for c, m in solver.masks.items():
            m.grad = noise * (h[c] / tokens).sqrt() * torch.randn(m.shape, generator=g)
        solver.observe(tokens)
    for _ in range(steps):
        for c, m in solver.masks.items():
            pull = h[c] * (m.detach() - 1)
            m.grad = pull + noise * (h[c] / tokens).sqrt() * torch.randn(m.shape, generator=g)
        solver.step(tokens)
    return solver


def lost(h: dict[str, Tensor], widths: dict[str, int]) -> float:
    """The loss of these widths, each layer keeping its best units."""
    return sum(float(h[c].sort(-1).values[..., : SHAPES[c][2] - w].sum()) for c, w in widths.items())


@both_updates
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("budget", "steps"), [(0.8, 400), (0.6, 400), (0.4, 400), (0.6, 10)])
def test_it_finds_the_best_widths_and_meets_the_budget(seed, budget, steps, masks):
    h = curvatures(seed)
    solver = solve(h, budget, steps, masks=masks)
    assert resource(solver.compute_widths()) == pytest.approx(budget, abs=0.02)
    every = [{"heads": h, "ffn": f} for h in range(1, SHAPES["heads"][2] + 1) for f in range(1, SHAPES["ffn"][2] + 1)]
    near = [w for w in every if abs(resource(w) - budget) <= 0.02]
    best, worst = min(lost(h, w) for w in near), max(lost(h, w) for w in near)
    chosen = min(near, key=lambda w: sum(((w[c] - v) / SHAPES[c][2]) ** 2 for c, v in solver.compute_widths().items()))
    assert lost(h, chosen) <= (1.2 if steps > 10 else 1.3) * best, (solver.compute_widths(), chosen)
    assert best < worst / 1.8


@pytest.mark.parametrize("width", [10, 36])
def test_a_given_width_is_held_and_the_rest_meets_the_budget(width):
    solver = solve(curvatures(0), 0.6, given={"ffn": width})
    assert solver.compute_widths()["ffn"] == width
    assert resource(solver.compute_widths()) == pytest.approx(0.6, abs=0.02)
    given = {"ffn": width, "heads": 3}
    solver = solve(curvatures(0), 0.6, steps=20, given=given)
    assert solver.compute_widths() == given
    found = solver.collect_metrics()
    assert "z" not in found, "no width is left that has a price"
    assert found["y"] > 1
    assert 0 < found["tail"] < 1


@both_updates
@pytest.mark.parametrize("given", [{}, {"ffn": 12}])
def test_after_a_larger_cut_it_starts_there_and_takes_back_nothing(given, masks):
    """Of every layer other units are gone, and their removal would cost most."""
    h, stays = curvatures(0), {c: torch.ones(s, dtype=torch.bool) for c, s in SHAPES.items()}
    for layer in range(3):
        stays["ffn"][layer, 0, layer : layer + 10] = False
        h["ffn"][layer, 0, layer : layer + 10] = 1.0
    begun = Solver(SHAPES, resource, 0.5, 400, given=given, stays=stays)
    assert torch.equal(begun.masks["ffn"], stays["ffn"].float())
    assert begun.compute_widths()["ffn"] == 30
    assert begun.compute_target() == pytest.approx(resource({"heads": 8, "ffn": 30}), abs=0.02)
    solver = solve(h, 0.5, given=given, stays=stays, masks=masks)
    assert resource(solver.compute_widths()) == pytest.approx(0.5, abs=0.02)
    assert solver.compute_widths()["ffn"] <= 30
    assert not (solver.masks["ffn"].bool() & ~stays["ffn"]).any()
    assert not given or solver.compute_widths()["ffn"] == 12


@both_updates
def test_it_removes_the_units_that_cost_least(masks):
    h = curvatures(0)
    solver = solve(h, 0.6, masks=masks)
    for c in SHAPES:
        tail = solver.mark_tail(c)
        kept_least = h[c].masked_fill(tail, math.inf).amin(-1)
        removed_most = h[c].masked_fill(~tail, 0).amax(-1)
        assert (removed_most <= 3 * kept_least).all()
        m = solver.masks[c].detach()
        if masks == "hard":
            assert torch.equal(m, (~tail).float()), "while it learns, the model runs as it will be cut"
        else:
            assert m[tail].square().mean().sqrt() < 0.2, "masks of what goes fade"
            assert m[~tail].mean() > 0.95


def test_all_layers_and_scope_rows_lose_the_same_number_of_units():
    solver = Solver({"q": (2, 3, 6)}, lambda w: w["q"] / 6, 0.5, 60)
    g = torch.Generator().manual_seed(0)
    for _ in range(60):
        solver.masks["q"].grad = torch.randn(2, 3, 6, generator=g)
        solver.step(10)
        assert (solver.mark_tail("q").sum(-1) == math.ceil(solver.removed["q"])).all()


@both_updates
def test_a_removed_unit_comes_back_once_the_loss_needs_it(masks):
    solver = Solver({"ffn": (1, 1, 4)}, lambda widths: widths["ffn"] / 4, 0.75, 20, masks=masks)
    worth = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]) * 1e-3
    gone = []
    for step in range(60):
        if step == 30:
            worth = worth.flip(-1)  # as if its neighbours had gone
        m = solver.masks["ffn"]
        m.grad = worth * (m.detach() - 1)
        solver.watch("ffn", 0, (worth.flatten() / 1000 / 1000).sqrt().expand(1000, 4))
        solver.step(1000)
        gone.append(m.detach().flatten().argmin().item())
    assert gone[29] == 0
    assert gone[-1] == 3
    assert 0 < solver.collect_metrics()["returned"] < 1
    assert m.max() == 1


def test_the_proximal_step_is_the_least_of_its_sum_and_y_grows_with_what_it_leaves():
    """argmin_x ½ (x − m)² + η y x², by search; without a gradient y rises by η_y · mean m² of the tail."""
    m, tail, nothing = torch.full((1, 1, 4), 0.8), torch.tensor([[[True, True, False, False]]]), torch.zeros(1, 1, 4)
    update = Proximal(Rates(proximal=5.0, dual=2.0), 10)
    y = update.move_masks(m, tail, nothing, nothing, torch.tensor([1.5]))
    x = torch.linspace(0, 1, 100_001)
    least = float(x[(0.5 * (x - 0.8).square() + 5.0 / 10 * 1.5 * x.square()).argmin()])
    assert m.flatten().tolist() == pytest.approx([least, least, 0.8, 0.8], abs=1e-4)
    assert y.tolist() == pytest.approx([1.5 + 2.0 / 10 * least**2], abs=1e-4)


def rising(cost: Callable[[dict[str, float]], float]) -> Solver:
    """Units of which each costs more than the one before it."""
    solver = Solver({"ffn": (1, 1, 4)}, cost, 0.5, 10)
    solver.masks["ffn"].grad = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    solver.observe(1000)
    return solver


def test_the_price_of_a_unit_is_that_of_the_next_one_to_go():
    solver = rising(lambda widths: widths["ffn"] / 4)
    values = solver.compute_saliency("ffn").clamp_min(0).flatten().sort().values
    for removed, k in ((0.0, 0), (1.2, 2), (3.0, 3), (3.5, 3)):
        solver.removed["ffn"] = removed
        assert solver._predict_marginal("ffn") == pytest.approx(float(values[k]))


def test_the_first_price_is_what_the_next_unit_costs_over_what_it_saves():
    solver = rising(lambda widths: widths["ffn"] ** 2 / 16)
    solver._move_widths(["ffn"])
    assert solver.removed["ffn"] > 0
    solver.removed["ffn"] = 0.0
    assert solver.z == pytest.approx(solver._predict_marginal("ffn") / (2 * 4 / 16))


def test_a_width_that_costs_more_y_is_cut_less():
    """The duals of a family's layers are part of the price of its next unit."""
    solver = Solver({"ffn": (2, 1, 4)}, lambda widths: widths["ffn"] / 4, 0.5, 10)
    solver.masks["ffn"].grad = torch.ones(2, 1, 4)
    solver.observe(1000)
    before = solver._predict_marginal("ffn")
    solver.y["ffn"] = torch.tensor([1.0, 3.0])
    assert solver._predict_marginal("ffn") == pytest.approx(2 * before)


def test_each_update_can_be_chosen():
    (choices,) = [each.setting.choices for each in Learning.declared if each.path == "masks"]
    assert choices is not None
    assert set(choices.names) == set(UPDATES)


def test_a_given_width_is_approached_as_the_budget_falls_and_reached_if_there_is_none_to_meet():
    free, falling = (Solver(SHAPES, resource, *how, given={"ffn": 20}) for how in ((1.0, 10), (0.6, 100)))
    for solver in (free, falling):
        for m in solver.masks.values():
            m.grad = torch.ones_like(m)
        solver.step(1000)
    assert free.removed["ffn"] == 20
    assert 0 < falling.removed["ffn"] < 20


@both_updates
def test_one_unit_stays_if_the_budget_is_below_it(masks):
    solver = Solver({"ffn": (1, 1, 4)}, lambda widths: widths["ffn"] / 4, 0.05, 40, masks=masks)
    for _ in range(40):
        solver.masks["ffn"].grad = torch.full((1, 1, 4), 1e-6)
        solver.step(1000)
    assert solver.removed["ffn"] == 3


def test_the_price_rises_while_the_budget_is_exceeded_and_falls_below_it():
    def list_prices(cost: float) -> list[float]:
        solver = Solver(SHAPES, lambda w: cost + 1e-3 * resource(w), 0.5, 40, Rates(width=0.0), ramp=0.0)
        solver.removed = dict.fromkeys(SHAPES, 3.0)
        prices = []
        for _ in range(10):
            for m in solver.masks.values():
                m.grad = torch.rand(m.shape) * 0.1
            solver.step(10)
            prices.append(solver.z)
        return prices

    above, below = list_prices(0.6), list_prices(0.4)
    assert above == sorted(above)
    assert below == sorted(below, reverse=True)
    assert above[0] < above[-1]
    assert below[0] > below[-1] > 0


def test_masks_at_one_are_passed_on_unchanged_with_their_gradient():
    solver = Solver({"ffn": (1, 1, 3)}, lambda w: 1.0, 0.5, 10)
    applied = solver.get_mask("ffn", 0)
    assert torch.equal(applied, torch.ones(1, 3))
    (applied * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
    assert solver.masks["ffn"].grad.tolist() == [[[1.0, -2.0, 3.0]]]


def test_a_restored_solver_continues_with_the_same_numbers():
    h = curvatures(2)
    whole = solve(h, 0.6, steps=20)
    again = Solver(SHAPES, resource, 0.6, 20)
    again.load({name: t.clone() for name, t in whole.state().items()})
    for solver in (whole, again):
        for c, m in solver.masks.items():
            m.grad = h[c] * (m.detach() - 1)
        solver.step(1000)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, again.state()[name]), name


def test_a_gradient_that_is_not_finite_and_a_dual_that_diverges_stop_the_run():
    solver = Solver({"ffn": (1, 1, 3)}, lambda w: w["ffn"] / 3, 0.5, 10)
    solver.masks["ffn"].grad = torch.tensor([[[1.0, math.nan, 0.0]]])
    with expect_error(InputError):
        solver.step(10)
    # A cost that no width lowers: z rises until it is said.
    solver = Solver({"ffn": (2, 1, 8)}, lambda _: 1.0, budget=0.5, steps=40, rates=Rates(price=1e4))

    def run() -> None:
        for _ in range(40):
            solver.masks["ffn"].grad = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
            solver.step(64)

    with expect_error(BudgetError, name="sparsity"):
        run()


def test_tokens_own_gradients_give_the_curvature_in_one_batch():
    tokens, h, g = 1000, curvatures(0), torch.Generator().manual_seed(2)
    one, many = Solver(SHAPES, resource, 0.5, 10), Solver(SHAPES, resource, 0.5, 10)
    for c, (layers, scopes, size) in SHAPES.items():
        each = h[c][:, None].sqrt() * torch.randn(layers, tokens, scopes, size, generator=g) / tokens
        for solver in (one, many):
            solver.masks[c].grad = each.sum(1)
        for layer in range(layers):
            for part in each[layer].flatten(1).split(300):
                many.watch(c, layer, part)
    for solver in (one, many):
        solver.observe(tokens)
    for c in SHAPES:
        assert (many.compute_curvature(c) / h[c]).log().abs().max() < 0.25
        assert (one.compute_curvature(c) / h[c]).log().abs().max() > 1
        assert not many.squares[c].any()
    solver, of_scopes = Solver({"heads": (1, 2, 3)}, lambda _: 1.0, 1.0, 10), torch.randn(5, 6)
    solver.watch("heads", 0, of_scopes)
    assert torch.allclose(solver.squares["heads"][0].flatten(), of_scopes.square().sum(0).to(solver.squares["heads"]))


def test_a_prior_in_any_unit_makes_a_noisy_curvature_rank_units_better():
    g = torch.Generator().manual_seed(5)
    h = torch.rand(3, 1, 400, generator=g).mul(6).exp() * 1e-3

    def noisy() -> Tensor:
        return h * torch.randn(h.shape, generator=g).mul(0.7).exp()

    solver = Solver({"ffn": (3, 1, 400)}, lambda widths: widths["ffn"] / 400, 0.7, 10)
    solver.masks["ffn"].grad = (noisy() / 1000).sqrt()
    solver.observe(1000)
    alone, scale = solver.compute_saliency("ffn"), torch.tensor([3.0, 0.1, 40.0])[:, None, None]
    solver.prior = {"ffn": noisy().sqrt().float()}
    both = solver.compute_saliency("ffn")

    def wrong(ranking: Tensor) -> int:
        least = h.argsort(-1).argsort(-1) < 120
        return int((least & (ranking.argsort(-1).argsort(-1) >= 120)).sum())

    assert wrong(both) < 0.9 * min(wrong(alone), wrong(solver.prior["ffn"]))
    assert both.sum().item() == pytest.approx(alone.sum().item(), rel=0.2), "prices of families stay in nats"
    solver.prior = {"ffn": solver.prior["ffn"] * scale}
    torch.testing.assert_close(solver.compute_saliency("ffn"), both, rtol=1e-5, atol=0)
    again = Solver({"ffn": (3, 1, 400)}, lambda widths: widths["ffn"] / 400, 0.7, 10)
    again.load(solver.state())
    torch.testing.assert_close(again.compute_saliency("ffn"), solver.compute_saliency("ffn"))


@both_updates
def test_blocks_go_in_their_order_and_those_that_stay_never(masks):
    """How many go follows from their worth, and which from the order that was given."""
    h = {"layers": torch.tensor([[[4.0, 1.0, 2.0, 3.0, 5.0]]]) * 1e-3}
    solver = Solver({"layers": (1, 1, 5)}, lambda w: w["layers"] / 5, 0.6, 40, blocks={"layers": [3]}, masks=masks)
    solver.prior = {"layers": torch.tensor([[[0.5, 0.4, 0.3, 0.1, 0.2]]])}
    for _ in range(40):
        m = solver.masks["layers"]
        m.grad = h["layers"] * (m.detach() - 1)
        solver.watch("layers", 0, (h["layers"].flatten() / 1000 / 1000).sqrt().expand(1000, 5))
        solver.step(1000)
    assert solver.compute_widths()["layers"] == pytest.approx(3, abs=0.1)
    solver.fix({"layers": 3})
    assert solver.mark_tail("layers").flatten().tolist() == [False, False, True, False, True]
    if masks == "hard":
        assert solver.masks["layers"].detach().flatten().tolist() == [1, 1, 0, 1, 0]
    solver.harden({"layers": torch.tensor([[[True, True, False, True, False]]])})
    assert solver.masks["layers"].detach().flatten().tolist() == [1, 1, 0, 1, 0]
    solver.fix({"layers": 1})
    assert int((~solver.mark_tail("layers")).nonzero()[0, 2]) == 3


def test_what_a_run_remembers_of_its_gradients_does_not_depend_on_its_steps():
    """At the end of d, which starts at 0, the same part of a gradient that stays as it was."""
    found = []
    for steps in (4, 8, 80):
        solver = Solver({"ffn": (1, 1, 4)}, lambda _: 1.0, budget=0.5, steps=steps)
        for _ in range(steps):
            solver.masks["ffn"].grad = -torch.ones(1, 1, 4)
            solver.observe(10**9)
        found.append(float(solver.drift["ffn"][0, 0, 0]))
    assert found == pytest.approx([1 - 0.9**8] * 3, rel=0.05)
