"""What must not be offered: axes whose removal changes the result, or whose masked model is another one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from made_modules import Made, MadeOfMore
from small_modules import offered as sizes
from small_modules import prove
from torch import Tensor, nn

from mptk import FamilyPlan, Plan, analyze, trace
from mptk.ir import Analysis
from mptk.testing import cut_and_compare, draw_plan
from passes.frontend.trace import export_program

VOCAB, HIDDEN, INNER, OUT = 13, 12, 10, 11
IDS = torch.arange(14).reshape(2, 7) % VOCAB


def layers(inner: int = INNER) -> dict[str, nn.Module]:
    """An embedding, two linear layers, and a head."""
    up, down = nn.Linear(HIDDEN, inner), nn.Linear(inner, HIDDEN)
    return {"embed": nn.Embedding(VOCAB, HIDDEN), "up": up, "down": down, "head": nn.Linear(HIDDEN, OUT)}


def block(middle: Callable[[Tensor], Tensor]) -> Made:
    """``middle`` acts between the linear layers."""

    def forward(m: Made, ids: Tensor) -> Tensor:
        x = m.embed(ids)
        return m.head(x + m.down(middle(m.up(x))))

    return Made(forward, **layers(), **({"middle": middle} if isinstance(middle, nn.Module) else {}))


def offered(found: Analysis) -> set[int]:
    return set(sizes(found))


def reasons(found: Analysis, size: int) -> str:
    return "; ".join(reason for b in found.blocked if b.size == size for reason in b.reasons)


def test_the_control_is_offered():
    assert offered(prove(block(torch.relu), IDS)) == {HIDDEN, INNER}


def centred(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


NOT_EXACT: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "softmax by hand": (lambda x: x.exp() / x.exp().sum(-1, keepdim=True), "summed over while not zero"),
    "layer norm by hand": (centred, "averaged over while not zero"),
    "variance by hand": (lambda x: x / (x - x.mean(-1, True)).square().sum(-1, True), "summed over while not zero"),
    "running sum of positive numbers": (lambda x: x.sigmoid().cumsum(-1), "summed over while not zero"),
    "running product": (lambda x: x.cumprod(-1), "the order of its positions matters"),
    "winner compared with a constant": (lambda x: x * (x.argmax(-1, True) > 3), "its positions are computed with"),
    "winner as a number": (lambda x: x * x.topk(2, -1)[1].sum(-1, True), "its positions are computed with"),
    "sorted": (lambda x: x.sort(-1)[0], "sorted"),
    "reversed": (lambda x: x.flip(-1), "the order of its positions matters"),
    "read in two orders": (lambda x: x + x.view(2, 7, 2, 5).mT.flatten(2), "cuts across its boundaries"),
    "distance of channels": (lambda x: (x[..., None] - x[..., None, :]).exp().sum(-1), "summed over while not zero"),
    "logarithm": (lambda x: x.abs().log(), "infinite where it is zero"),
    "neighbours": (lambda x: F.avg_pool1d(x, 3, 1, 1), "positions in space"),
}


@pytest.mark.parametrize("name", NOT_EXACT)
def test_an_axis_whose_cut_would_change_the_result_is_refused_with_the_reason(name):
    function, reason = NOT_EXACT[name]
    found = prove(block(function), IDS)
    assert INNER not in offered(found)
    assert reason in reasons(found, INNER) + reasons(found, INNER // 2)
    assert HIDDEN in offered(found)


class Snake(nn.Module):
    """x + sin²(αx)/α (Ziyin, Hartwig and Ueda 2020)."""

    def __init__(self, times: Callable[[Tensor], Tensor] = lambda alpha: 1 / alpha) -> None:
        super().__init__()
        self.alpha, self.times = nn.Parameter(torch.rand(INNER) + 0.5), times

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.alpha * x).square() * self.times(self.alpha)


@pytest.mark.parametrize("times", [lambda a: 1 / a, lambda a: a.abs().rsqrt(), lambda a: a.log(), lambda a: a**-2.0])
def test_a_weight_that_something_is_divided_by_is_cut_with_what_it_divides(times):
    """It keeps its numbers in the masked model, where they multiply a zero."""
    assert offered(prove(block(Snake(times)), IDS)) == {HIDDEN, INNER}


def test_what_is_not_zero_by_the_other_weights_is_not_divided():
    def forward(m: Made, ids: Tensor) -> Tensor:
        x = m.up(m.embed(ids))
        return m.head(m.down(x * (x.exp() / m.alpha).sum(-1, keepdim=True)))

    found = prove(Made(forward, alpha=nn.Parameter(torch.rand(INNER) + 0.5), **layers()), IDS)
    assert offered(found) == {HIDDEN}
    assert "summed over while not zero" in reasons(found, INNER)


class Joined(nn.Module):
    """Attention whose biases of queries and values are weights, and that of keys a buffer of zeros between them."""

    def __init__(self, key: float = 0.0, persistent: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(8, 30, bias=False), nn.Linear(10, OUT)
        self.query, self.value = nn.Parameter(torch.randn(10)), nn.Parameter(torch.randn(10))
        self.register_buffer("key", torch.full((10,), key), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.query, self.key, self.value])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, 2, 5)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Written(Joined):
    """A part of the buffer is written before it is read."""

    def forward(self, x: Tensor) -> Tensor:
        self.key[:4].fill_(0.3)
        return super().forward(x)


X = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1))


def test_a_buffer_of_zeros_blocks_no_head_size():
    assert offered(prove(Joined(), X)) == {2, 5}
    assert offered(prove(Joined(persistent=True), X)) == {2, 5}
    assert offered(analyze(trace(Joined().to("meta"), (X,)))) == {2}


@pytest.mark.parametrize("make", [lambda: Joined(0.3), Written])
def test_a_buffer_that_is_not_zero_or_is_written_blocks_it(make):
    found = analyze(trace(make().eval(), (X,)))
    assert offered(found) == {2}
    assert "summed over while not zero" in reasons(found, 5)


def on_embedding(middle: Callable[[Tensor], Tensor]) -> Made:
    """``middle`` acts on the residual stream itself."""

    def forward(m: Made, ids: Tensor) -> Tensor:
        x = middle(m.embed(ids))
        return m.head(x + m.down(m.up(x).relu()))

    return Made(forward, **layers(), **({"middle": middle} if isinstance(middle, nn.Module) else {}))


def test_layer_norm_as_an_op_has_kept_statistics_and_by_hand_has_not():
    assert offered(prove(on_embedding(nn.LayerNorm(HIDDEN)), IDS)) == {HIDDEN, INNER}
    assert offered(prove(on_embedding(nn.RMSNorm(HIDDEN)), IDS)) == {HIDDEN, INNER}
    assert offered(prove(on_embedding(centred), IDS)) == {INNER}


def test_positions_that_are_the_output_cannot_be_cut():
    found = analyze(trace(Made(lambda m, ids: m.up(m.embed(ids)).argmax(-1), **layers()), (IDS,)))
    assert INNER not in offered(found)
    assert "it is the model's output" in reasons(found, INNER)


def route(k: int, offset: int = 0) -> Made:
    """A router picks ``k`` experts; their outputs are weighted and summed. Experts are looked up by position."""

    def forward(m: Made, ids: Tensor) -> Tensor:
        x = m.embed(ids)
        share, chosen = m.router(x).softmax(-1).topk(k, -1)
        chosen = chosen + offset if offset else chosen
        inner = torch.einsum("bskih,bsh->bski", m.experts[chosen], x).relu()
        return m.head(x + torch.einsum("bskhi,bski,bsk->bsh", m.out[chosen], inner, share))

    experts, out = (torch.randn(6 + offset, *size) * 0.3 for size in ((INNER, HIDDEN), (HIDDEN, INNER)))
    parts = {"router": nn.Linear(HIDDEN, 6, bias=False), "experts": nn.Parameter(experts), "out": nn.Parameter(out)}
    return Made(forward, embed=nn.Embedding(VOCAB, HIDDEN), head=nn.Linear(HIDDEN, OUT), **parts)


def test_experts_are_one_family_of_at_least_as_many_as_are_chosen():
    found = prove(route(2), IDS)
    experts = next(f for f in found.families if f.size == 6)
    assert experts.minimum == 2
    assert {m.weight for m in experts.groups[0].members} == {"router.weight", "experts", "out"}
    assert offered(found) == {6, HIDDEN, INNER}


def test_experts_looked_up_by_a_computed_position_stay():
    found = prove(route(2, offset=1), IDS)
    assert offered(found) == {HIDDEN, INNER}
    assert "its positions are computed with" in reasons(found, 6)


def test_a_router_that_takes_all_experts_leaves_no_choice():
    assert 6 not in offered(prove(route(6), IDS))


def test_a_constant_that_is_written_through_a_view_is_followed():
    def forward(m: Made, ids: Tensor) -> Tensor:
        x, buffer = m.up(m.embed(ids)), torch.zeros(2, 7, INNER)
        view = buffer[:, 1:]
        view.copy_(x[:, :-1].exp())
        return m.head(m.down(x)) + buffer.sum(-1, keepdim=True)

    found = prove(Made(forward, **layers()), IDS)
    assert offered(found) == {HIDDEN}
    assert "summed over while not zero" in reasons(found, INNER)


def test_constants_do_not_tie_the_layers_that_use_them():
    def forward(m: Made, ids: Tensor) -> Tensor:
        x, table = m.embed(ids), torch.linspace(0.5, 1.5, INNER)
        for layer in m.layers:
            x = x + layer["down"]((layer["up"](x) * table).relu())
        return m.head(x)

    found = prove(Made(forward, layers=nn.ModuleList(nn.ModuleDict(layers()) for _ in range(2)), **layers()), IDS)
    (ffn,) = (f for f in found.families if f.size == INNER)
    assert [g.layer for g in ffn.groups] == ["layers.0", "layers.1"]


def test_a_choice_varies_only_along_a_factor_that_encloses_it_everywhere():
    """Heads in the order [channel, head] in one weight and [head, channel] in the other."""

    def forward(m: Made, ids: Tensor) -> Tensor:
        return m.head(m.up(m.embed(ids)).view(2, 7, 3, 5).mT.flatten(2))

    parts = {"embed": nn.Embedding(VOCAB, HIDDEN), "up": nn.Linear(HIDDEN, 15), "head": nn.Linear(15, OUT)}
    found = prove(Made(forward, **parts), IDS)
    assert offered(found) == {HIDDEN, 3, 5}
    assert all(f.scopes == 1 for f in found.families)


def test_a_choice_may_vary_along_two_dimensions():
    """Each expert's own heads: a head's channel may vary along the expert (another dimension) and the head.

    A choice that does not vary serves every scope.
    """

    def forward(m: Made, ids: Tensor) -> Tensor:
        x = m.embed(ids)
        y = torch.einsum("ech,bsh->bsec", m.up, x).view(2, 7, 4, 3, 5)
        y = (y * y.sum(-1, keepdim=True).sigmoid()).flatten(3)
        return m.head(torch.einsum("ehc,bsec->bsh", m.down, y))

    up, down = (nn.Parameter(torch.randn(4, *size) * 0.3) for size in ((15, HIDDEN), (HIDDEN, 15)))
    found = prove(Made(forward, **{**layers(), "up": up, "down": down}), IDS)
    assert {f.size: f.scopes for f in found.families} == {HIDDEN: 1, 4: 1, 3: 4, 5: 12}
    channels = next(f for f in found.families if f.size == 5)
    unscoped = Plan({channels.name: FamilyPlan(3, 5, {g.layer: ((0, 2, 3),) for g in channels.groups})})
    for plan in (draw_plan(found, seed=3, share=0.5), unscoped):
        assert cut_and_compare(found, plan, (IDS,)).error <= 1e-5


def remember(function: Callable[[Tensor], Tensor], *, returns: bool = True) -> MadeOfMore:
    """Adds a value a token to a cache, and sums over what was in it. ``returns``: the cache, or its sum in the result."""

    def forward(m: Made, ids: Tensor, past: Tensor) -> object:
        x = m.embed(ids)
        cache = torch.cat((past, function(m.up(x))), 1)
        y = m.head(x) * past.sum((1, 2), keepdim=True)
        return (y, cache) if returns else y + cache.sum((1, 2))[:, None, None]

    return MadeOfMore(forward, **layers())


CACHED = IDS, torch.zeros(2, 3, INNER)


def test_a_cache_is_zero_only_where_all_that_is_added_to_it_is():
    keeps, fills = (
        analyze(export_program(MadeOfMore(lambda m, *given: m.module(*given), module=remember(function)), CACHED))
        for function in (torch.relu, torch.exp)
    )
    assert offered(keeps) == {HIDDEN, INNER}
    assert offered(fills) == {HIDDEN}
    assert "summed over while not zero" in reasons(fills, INNER)


def test_an_input_that_is_no_cache_cannot_be_cut():
    """The same program but for the cache's way out."""
    found = analyze(trace(remember(torch.relu, returns=False), CACHED))
    assert offered(found) == {HIDDEN}
    assert "comes from the model's input" in reasons(found, INNER)
