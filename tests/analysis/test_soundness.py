"""Programs at which a rule once gave a wrong cut or an exception of its own: each is cut right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_modules import Made
from small_modules import HIDDEN, INNER, OUT, WIDTH, Small, X, offered, prove
from torch import Tensor, nn

from mptk import analyze, rewrite, trace
from mptk.testing import cut_and_compare, draw_plan

# ---- bodies after ten units ----


def route(take: Callable[[Tensor], list[Tensor]]) -> Callable[..., Tensor]:
    """The two best experts of 10, each looked up in ``table`` by one piece of the positions."""

    def body(h: Tensor, table: Tensor) -> Tensor:
        w, i = h.softmax(-1).topk(2)
        return sum(w[..., k : k + 1] * table[j.reshape(2, 5)] for k, j in enumerate(take(i)))  # type: ignore[return-value]

    return body


def pieces_in_one_hot(h: Tensor, table: Tensor) -> Tensor:
    w, i = h.softmax(-1).topk(2)
    return sum(w[..., k : k + 1] * (F.one_hot(j, INNER).float() @ table) for k, j in enumerate(i.unbind(-1)))  # type: ignore[misc,return-value]


def largest_of_negatives(h: Tensor, table: Tensor) -> Tensor:
    """Sought among kept units, whatever their sign."""
    w, i = (h - 50).topk(2)
    return (w.exp()[..., None] * 1e20 * table[i]).sum(-2)


def compare_positions(h: Tensor, table: Tensor) -> Tensor:
    i = h.topk(2)[1].unbind(-1)[0]
    return sum((i == e).float()[..., None] * table[e] for e in range(INNER))  # type: ignore[misc,return-value]


def sort_positions(h: Tensor, table: Tensor) -> Tensor:
    """Sorted, they are positions still, and their order is none."""
    best, order = h.flatten(0, 1).argmax(-1).sort()
    return table[best] + order[:, None]


def earlier_view(h: Tensor, w: Tensor) -> Tensor:
    v = h.view(2, 5, 2, 5)
    h.add_(1.0)
    return v.flatten(2).mean(-1, keepdim=True) @ w


def chunk_then_base(h: Tensor, w: Tensor) -> Tensor:
    a, _ = h.chunk(2, -1)
    a.add_(1.0)
    return h.mean(-1, keepdim=True) @ w


def chunk_then_sibling(h: Tensor, w: Tensor) -> Tensor:
    a, b = h.unflatten(-1, (2, 5)).unbind(2)
    h.mul_(2.0)
    h.add_(1.0)
    return (a.sum(-1, keepdim=True) + b.sum(-1, keepdim=True)) @ w


def written_half(h: Tensor, w: Tensor) -> Tensor:
    a, b = h.chunk(2, -1)
    a.add_(1.0)
    return (a.sum(-1, keepdim=True) + b.sum(-1, keepdim=True)) @ w


def constant_in_pieces(h: Tensor, w: Tensor) -> Tensor:
    a, b = torch.zeros(2, 5, INNER).chunk(2, -1)
    a.copy_(h[..., :5])
    b.add_(h[..., 5:])
    return torch.cat((a, b), -1).sum(-1, keepdim=True) @ w


def constant_view_before(h: Tensor, w: Tensor) -> Tensor:
    base = torch.zeros(2, 5, INNER)
    before = base.view(10, INNER)
    base.copy_(h)
    return before.sum(-1, keepdim=True) @ w


def one_hot_of_its_own(h: Tensor, w: Tensor) -> Tensor:
    """Positions along their own axis: no zero there."""
    best = (h[..., None] * h[..., None, :]).argmax(-1)
    return F.one_hot(best, INNER).float().sum(-1).sum(-1, keepdim=True) @ w


def read_at_its_own(h: Tensor, w: Tensor) -> Tensor:
    best = (h[..., None] * h[..., None, :]).argmax(-1)
    return h.gather(-1, best).sum(-1, keepdim=True) @ w


def compute_kernel(h: Tensor, w: Tensor, o: Tensor) -> Tensor:
    h = h.mT
    h = h + F.conv1d(h, w + 1)
    return h.mean(1)[..., None] @ o


def compute_depthwise_kernel(h: Tensor, w: Tensor, o: Tensor) -> Tensor:
    h = F.conv1d(h.mT, w + 1, groups=INNER)
    return h.sum(1)[..., None] @ o


def batch_statistics(h: Tensor, w: Tensor, b: Tensor, o: Tensor) -> Tensor:
    """Over all dimensions but tokens, which are the norm's channels here; with a weight and a bias, or none."""
    plain = F.batch_norm(h, None, None, training=True)
    return (F.batch_norm(h, None, None, w, b, training=True) + plain) @ o


TABLE, LAST = {"table": (INNER, OUT)}, {"w": (1, OUT)}
BODIES: list[tuple[Callable[..., Tensor], dict[str, tuple[int, ...]], list[int]]] = [
    (route(lambda i: list(i.unbind(-1))), TABLE, [INNER]),
    (route(lambda i: list(i.chunk(2, -1))), TABLE, [INNER]),
    (route(lambda i: list(i.split(1, -1))), TABLE, [INNER]),
    (route(lambda i: [i[..., 0], i[..., 1]]), TABLE, [INNER]),
    (route(lambda i: list(i.unsqueeze(0).unbind(0)[0].unbind(-1))), TABLE, [INNER]),
    (pieces_in_one_hot, TABLE, [INNER]),
    (largest_of_negatives, TABLE, [INNER]),
    (compare_positions, TABLE, []),
    (sort_positions, TABLE, [INNER]),
    # A write in place is seen by every view. Of halves, the one that was not written to can still be cut.
    (earlier_view, LAST, []),
    (chunk_then_base, LAST, [5]),
    (chunk_then_sibling, LAST, []),
    (written_half, LAST, [5]),
    # A constant that is written to is none.
    (constant_in_pieces, LAST, [5, 5]),
    (constant_view_before, LAST, [INNER]),
    (one_hot_of_its_own, LAST, []),
    (read_at_its_own, LAST, []),
    # A computed kernel leaves no zeros, unless it is depthwise.
    (compute_kernel, {"w": (INNER, INNER, 1), "o": (1, OUT)}, []),
    (compute_depthwise_kernel, {"w": (INNER, 1, 1), "o": (1, OUT)}, [INNER]),
    (batch_statistics, {"w": (5,), "b": (5,), "o": (INNER, OUT)}, [INNER]),
]


@pytest.mark.parametrize(("body", "shapes", "sizes"), BODIES, ids=lambda each: getattr(each, "__name__", ""))
def test_units_are_offered_only_if_their_cut_is_exact(body, shapes, sizes):
    assert offered(prove(Small(body, **shapes))) == sizes


def test_a_saved_buffer_is_cut_like_a_weight():
    """Through two operators it scales the units."""

    def forward(m: Made, x: Tensor) -> Tensor:
        return (m.up(x) * m.scale.exp().square()) @ m.last

    last = nn.Parameter(torch.randn(INNER, OUT))
    analysis = prove(Made(forward, up=nn.Linear(WIDTH, INNER), scale=torch.rand(INNER), last=last))
    small = rewrite(analysis, draw_plan(analysis)).state_dict()
    assert offered(analysis) == [INNER]
    assert small["last"].shape == (6, OUT)
    assert small["scale"].shape == (6,)


# ---- attention ----

attend = F.scaled_dot_product_attention


@pytest.mark.parametrize(("causal", "sizes"), [(False, [6, 8, 9]), (True, [6, 8])])
def test_learned_queries_can_be_cut_but_not_under_a_causal_mask(causal, sizes):
    """9 learned queries attend to the text."""

    def forward(m: Made, x: Tensor) -> Tensor:
        q = m.queries.expand(2, 1, 9, 6)
        return m.head(attend(q, m.key(x)[:, None], m.value(x)[:, None], is_causal=causal).flatten(1))

    parts = {"key": nn.Linear(WIDTH, 6), "value": nn.Linear(WIDTH, 8), "head": nn.Linear(9 * 8, OUT)}
    assert offered(prove(Made(forward, queries=nn.Parameter(torch.randn(9, 6)), **parts))) == sizes


def test_constants_given_by_name_lose_heads_too():
    """A constant mask with a row for each head, given by name, and so an added constant."""
    slopes = torch.tensor([0.5, 0.1, 2.0])

    def forward(m: Made, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).view(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
        bias = torch.arange(5.0) * slopes[:, None, None]
        y = torch.add(input=attend(q, k, v, attn_mask=bias), other=bias[:, :, :1])
        return m.head(y.transpose(1, 2).flatten(2))

    assert 3 in offered(prove(Made(forward, qkv=nn.Linear(WIDTH, 3 * 3 * 8), head=nn.Linear(3 * 8, OUT))))


def test_the_models_input_can_be_the_query():
    def forward(m: Made, x: Tensor) -> Tensor:
        return m.head(attend(x[:, None], m.key(x)[:, None], m.value(x)[:, None])[:, 0])

    parts = {"key": nn.Linear(WIDTH, WIDTH), "value": nn.Linear(WIDTH, 8), "head": nn.Linear(8, OUT)}
    assert offered(prove(Made(forward, **parts))) == [8]


def test_positions_of_tokens_are_no_family():
    """Token and position embeddings, attention by hand, the last token's output."""

    def forward(m: Made, ids: Tensor) -> Tensor:
        x = m.tokens(ids) + m.positions[: ids.shape[1]]
        scores = m.q(x) @ m.k(x).mT
        return m.head((x + m.out(scores.softmax(-1) @ m.v(x)))[:, -1])

    parts = {"tokens": nn.Embedding(13, HIDDEN), "positions": nn.Parameter(torch.randn(9, HIDDEN))}
    parts |= {name: nn.Linear(HIDDEN, 10) for name in "qkv"}
    parts |= {"out": nn.Linear(10, HIDDEN), "head": nn.Linear(HIDDEN, OUT)}
    assert offered(prove(Made(forward, **parts), torch.arange(10).reshape(2, 5))) == [10, 10, HIDDEN]


def test_rows_of_removed_channels_are_not_masked_whole():
    """Channels of a head attend to its channels (XCiT): one axis is both dimensions of the scores."""

    def forward(m: Made, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).view(2, 5, 3, 2, 6).permute(2, 0, 3, 4, 1).unbind(0)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        return m.out((scores.softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2))

    assert offered(prove(Made(forward, qkv=nn.Linear(WIDTH, 3 * 2 * 6), out=nn.Linear(2 * 6, OUT)))) == [2, 6]


def test_a_softmax_is_zero_along_one_of_two_dimensions_of_an_axis():
    """Heads attend to heads, and their results are summed: a removed head asks, too."""

    def forward(m: Made, x: Tensor) -> Tensor:
        y = m.up(x).unflatten(-1, (3, 4))
        return m.out(((y @ y.mT).softmax(-1) @ y).sum((2, 3))[..., None])

    assert offered(prove(Made(forward, up=nn.Linear(WIDTH, 3 * 4), out=nn.Linear(1, OUT)))) == [4]


# ---- outputs ----


WRAPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda y, h: (y, h),
    "nested tuple": lambda y, h: ((y, h),),
    "dict": lambda y, h: {"y": y, "h": h},
    "list in a dict": lambda y, h: {"y": [y], "rest": (h,)},
}


@pytest.mark.parametrize("name", WRAPS)
def test_every_output_is_the_callers(name):
    def forward(m: Made, x: Tensor) -> Any:
        h = m.up(x)
        return WRAPS[name](m.head(h), h)

    analysis = prove(Made(forward, up=nn.Linear(WIDTH, INNER), head=nn.Linear(INNER, OUT)))
    assert offered(analysis) == []
    assert "it is the model's output" in str(analysis.blocked)
    assert [tuple(t.shape) for t in analysis.program(X)] == [(2, 5, OUT), (2, 5, INNER)]


# ---- other layouts ----


def test_weights_of_heads_are_cut_in_heads_and_channels_at_once():
    """Three heads with a weight each, twice."""

    def forward(m: Made, x: Tensor) -> Tensor:
        h = torch.einsum("bthd,hde->bthe", m.up(x).view(2, 5, 3, 8), m.first)
        return m.head(torch.einsum("bthd,hde->bthe", h.relu(), m.second).flatten(2))

    first, second = nn.Parameter(torch.randn(3, 8, 5)), nn.Parameter(torch.randn(3, 5, 6))
    made = Made(forward, up=nn.Linear(WIDTH, 3 * 8), first=first, second=second, head=nn.Linear(3 * 6, OUT))
    assert offered(prove(made)) == [3, 5, 6, 8]


def test_a_dimension_that_is_cut_to_one_is_not_squeezed_away():
    def body(h: Tensor, w: Tensor) -> Tensor:
        return (h.unsqueeze(1).squeeze() * w).sum(-1)

    analysis = analyze(trace(Small(body, w=(INNER,)), (X,)))
    assert cut_and_compare(analysis, draw_plan(analysis, share=0.1), (X,)).error <= 1e-5


def test_a_variance_keeps_more_positions_than_its_correction():
    def body(h: Tensor, w: Tensor) -> Tensor:
        return h.var(-1, keepdim=True) @ w

    (family,) = prove(Small(body, w=(1, OUT))).families
    assert family.minimum == 2
