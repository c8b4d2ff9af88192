"""What must not be offered: axes whose removal changes the result, or whose masked model is another one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_modules import offered as sizes
from small_modules import prove
from torch import Tensor, nn

from mptk import FamilyPlan, Plan, analyze, trace
from mptk.ir import Analysis
from mptk.testing import cut_and_compare, draw_plan
from passes.frontend.trace import export_program

VOCAB, HIDDEN, INNER, OUT = 13, 12, 10, 11
IDS = torch.arange(14).reshape(2, 7) % VOCAB


class Block(nn.Module):
    """Embedding, two linear layers with ``middle`` between them, and a head."""

    def __init__(self, middle: Callable[[Tensor], Tensor], inner: int = INNER) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, inner), nn.Linear(inner, HIDDEN)
        self.head = nn.Linear(HIDDEN, OUT)
        self.middle = middle

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed(ids)
        x = x + self.down(self.middle(self.up(x)))
        return self.head(x)  # type: ignore[no-any-return]


def offered(found: Analysis) -> set[int]:
    return set(sizes(found))


def reasons(found: Analysis, size: int) -> str:
    return "; ".join(reason for b in found.blocked if b.size == size for reason in b.reasons)


def test_the_control_is_offered() -> None:
    assert offered(prove(Block(torch.relu), IDS)) == {HIDDEN, INNER}


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
def test_an_axis_whose_cut_would_change_the_result_is_refused_with_the_reason(name: str) -> None:
    function, reason = NOT_EXACT[name]
    found = prove(Block(function), IDS)
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
def test_a_weight_that_something_is_divided_by_is_cut_with_what_it_divides(times: Callable[[Tensor], Tensor]) -> None:
    """It keeps its numbers in the masked model, where they multiply a zero."""
    assert offered(prove(Block(Snake(times)), IDS)) == {HIDDEN, INNER}


class Shifted(nn.Module):
    """Divides by a weight what is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.rand(INNER) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.exp() / self.alpha).sum(-1, keepdim=True)


def test_what_is_not_zero_by_the_other_weights_is_not_divided() -> None:
    found = prove(Block(Shifted()), IDS)
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


def test_a_buffer_of_zeros_blocks_no_head_size() -> None:
    assert offered(prove(Joined(), X)) == {2, 5}
    assert offered(prove(Joined(persistent=True), X)) == {2, 5}
    assert offered(analyze(trace(Joined().to("meta"), (X,)))) == {2}


@pytest.mark.parametrize("make", [lambda: Joined(0.3), Written])
def test_a_buffer_that_is_not_zero_or_is_written_blocks_it(make: Callable[[], nn.Module]) -> None:
    found = analyze(trace(make().eval(), (X,)))
    assert offered(found) == {2}
    assert "summed over while not zero" in reasons(found, 5)


class OnEmbedding(Block):
    """``middle`` acts on the residual stream itself."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.middle(self.embed(ids))
        return self.head(x + self.down(self.up(x).relu()))  # type: ignore[no-any-return]


def test_layer_norm_as_an_op_has_kept_statistics_and_by_hand_has_not() -> None:
    assert offered(prove(OnEmbedding(nn.LayerNorm(HIDDEN)), IDS)) == {HIDDEN, INNER}
    assert offered(prove(OnEmbedding(nn.RMSNorm(HIDDEN)), IDS)) == {HIDDEN, INNER}
    assert offered(prove(OnEmbedding(centred), IDS)) == {INNER}


class Winner(nn.Module):
    """Returns positions: which of the channels is largest."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, INNER)

    def forward(self, ids: Tensor) -> Tensor:
        return self.up(self.embed(ids)).argmax(-1)  # type: ignore[no-any-return]


def test_positions_that_are_the_output_cannot_be_cut() -> None:
    found = analyze(trace(Winner(), (IDS,)))
    assert INNER not in offered(found)
    assert "it is the model's output" in reasons(found, INNER)


class Routed(nn.Module):
    """A router picks ``k`` experts; their outputs are weighted and summed. Experts are looked up by position."""

    def __init__(self, k: int, offset: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, OUT)
        self.router = nn.Linear(HIDDEN, 6, bias=False)
        self.experts = nn.Parameter(torch.randn(6 + offset, INNER, HIDDEN) * 0.3)
        self.out = nn.Parameter(torch.randn(6 + offset, HIDDEN, INNER) * 0.3)
        self.k, self.offset = k, offset

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        share, chosen = self.router(x).softmax(-1).topk(self.k, -1)
        chosen = chosen + self.offset if self.offset else chosen
        inner = torch.einsum("bskih,bsh->bski", self.experts[chosen], x).relu()
        y = torch.einsum("bskhi,bski,bsk->bsh", self.out[chosen], inner, share)
        return self.head(x + y)  # type: ignore[no-any-return]


def test_experts_are_one_family_of_at_least_as_many_as_are_chosen() -> None:
    found = prove(Routed(2), IDS)
    experts = next(f for f in found.families if f.size == 6)
    assert experts.minimum == 2
    assert {m.weight for m in experts.groups[0].members} == {"router.weight", "experts", "out"}
    assert offered(found) == {6, HIDDEN, INNER}


def test_experts_looked_up_by_a_computed_position_stay() -> None:
    found = prove(Routed(2, offset=1), IDS)
    assert offered(found) == {HIDDEN, INNER}
    assert "its positions are computed with" in reasons(found, 6)


def test_a_router_that_takes_all_experts_leaves_no_choice() -> None:
    assert 6 not in offered(prove(Routed(6), IDS))


class Mutated(nn.Module):
    """Writes activations into a constant: then it is none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, INNER), nn.Linear(INNER, OUT)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.up(self.embed(ids))
        buffer = torch.zeros(2, 7, INNER)
        view = buffer[:, 1:]
        view.copy_(x[:, :-1].exp())
        return self.down(x) + buffer.sum(-1, keepdim=True)  # type: ignore[no-any-return]


def test_a_constant_that_is_written_through_a_view_is_followed() -> None:
    found = prove(Mutated(), IDS)
    assert offered(found) == {HIDDEN}
    assert "summed over while not zero" in reasons(found, INNER)


class Shared(nn.Module):
    """One table of constants used by two layers: the layers are independent."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, OUT)
        self.layers = nn.ModuleList(Block(torch.relu) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x, table = self.embed(ids), torch.linspace(0.5, 1.5, INNER)
        for layer in self.layers:
            x = x + layer.down((layer.up(x) * table).relu())
        return self.head(x)  # type: ignore[no-any-return]


def test_constants_do_not_tie_the_layers_that_use_them() -> None:
    found = prove(Shared(), IDS)
    (ffn,) = (f for f in found.families if f.size == INNER)
    assert [g.layer for g in ffn.groups] == ["layers.0", "layers.1"]


class Heads(nn.Module):
    """Heads in the order [channel, head] in one weight and [head, channel] in the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(15, OUT)
        self.up = nn.Linear(HIDDEN, 15)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.up(self.embed(ids)).view(2, 7, 3, 5).mT.flatten(2))  # type: ignore[no-any-return]


def test_a_choice_varies_only_along_a_factor_that_encloses_it_everywhere() -> None:
    found = prove(Heads(), IDS)
    assert offered(found) == {HIDDEN, 3, 5}
    assert all(f.scopes == 1 for f in found.families)


class PackedHeads(nn.Module):
    """Each expert's own heads: a head's channel may vary along the expert (another dimension) and the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, OUT)
        self.up = nn.Parameter(torch.randn(4, 3 * 5, HIDDEN) * 0.3)
        self.down = nn.Parameter(torch.randn(4, HIDDEN, 3 * 5) * 0.3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = torch.einsum("ech,bsh->bsec", self.up, x).view(2, 7, 4, 3, 5)
        y = (y * y.sum(-1, keepdim=True).sigmoid()).flatten(3)
        return self.head(torch.einsum("ehc,bsec->bsh", self.down, y))  # type: ignore[no-any-return]


def test_a_choice_that_varies_along_two_dimensions() -> None:
    found = prove(PackedHeads(), IDS)
    assert {f.size: f.scopes for f in found.families} == {HIDDEN: 1, 4: 1, 3: 4, 5: 12}
    assert cut_and_compare(found, draw_plan(found, seed=3, share=0.5), (IDS,)).error <= 1e-5


def test_an_unscoped_choice_serves_every_scope() -> None:
    found = prove(PackedHeads(), IDS)
    channels = next(f for f in found.families if f.size == 5)
    keep = {g.layer: ((0, 2, 3),) for g in channels.groups}
    assert cut_and_compare(found, Plan({channels.name: FamilyPlan(3, 5, keep)}), (IDS,)).error <= 1e-5


class Remembers(nn.Module):
    """Adds a value a token to a cache, and sums over the channels of what was in it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, INNER), nn.Linear(HIDDEN, OUT)
        self.function = function

    def forward(self, ids: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids)
        cache = torch.cat((past, self.function(self.up(x))), 1)
        return self.head(x) * past.sum((1, 2), keepdim=True), cache


class Step(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.module(*inputs)  # type: ignore[no-any-return]


def test_a_cache_is_zero_only_where_all_that_is_added_to_it_is() -> None:
    inputs = IDS, torch.zeros(2, 3, INNER)
    assert offered(analyze(export_program(Step(Remembers(torch.relu)), inputs))) == {HIDDEN, INNER}
    found = analyze(export_program(Step(Remembers(torch.exp)), inputs))
    assert offered(found) == {HIDDEN}
    assert "summed over while not zero" in reasons(found, INNER)


def test_an_input_that_is_no_cache_cannot_be_cut() -> None:
    """The same program but for the cache's way out."""

    class Forgets(Remembers):
        def forward(self, ids: Tensor, past: Tensor) -> Tensor:  # type: ignore[override]
            y, cache = super().forward(ids, past)
            return y + cache.sum((1, 2))[:, None, None]

    found = analyze(trace(Forgets(torch.relu), (IDS, torch.zeros(2, 3, INNER))))
    assert offered(found) == {HIDDEN}
    assert "comes from the model's input" in reasons(found, INNER)
