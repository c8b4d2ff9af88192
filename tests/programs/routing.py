"""Routing: positions of the largest scores, taken apart and used in the ways that mixtures of experts have."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .catalogue import Maker, step

EXPERTS, CHOSEN, OUT = 5, 2, 9

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda s: s.softmax(-1),
    "sigmoid": lambda s: s.sigmoid(),
    "plain": lambda s: s,
}

APART: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "unbind": lambda i: list(i.unbind(-1)),
    "chunk": lambda i: [part.squeeze(-1) for part in i.chunk(CHOSEN, -1)],
    "split": lambda i: [part.squeeze(-1) for part in i.split(1, -1)],
    "index": lambda i: [i[..., j] for j in range(CHOSEN)],
    "select": lambda i: [i.select(-1, j) for j in range(CHOSEN)],
    "slice": lambda i: [i[..., j : j + 1].squeeze(-1) for j in range(CHOSEN)],
    "transposed": lambda i: list(i.permute(2, 0, 1).unbind(0)),
}


def _of_table(x: Tensor, table: Tensor, j: Tensor, way: str) -> Tensor:
    """x times the matrix of expert j of each token: [B, T, OUT]."""
    experts = table.shape[0]
    ways: dict[str, Callable[[], Tensor]] = {
        "index": lambda: torch.einsum("btd,btdo->bto", x, table[j]),
        "index_select": lambda: torch.einsum("nd,ndo->no", x.flatten(0, 1), table.index_select(0, j.flatten())),
        "embedding": lambda: torch.einsum(
            "btd,btdo->bto", x, F.embedding(j, table.flatten(1)).unflatten(-1, table.shape[1:])
        ),
        "one_hot": lambda: torch.einsum("btd,edo,bte->bto", x, table, F.one_hot(j, experts).to(x.dtype)),
        "gather": lambda: _gathered(torch.einsum("btd,edo->bteo", x, table), j),
        "compare": lambda: sum((j == e).to(x.dtype)[..., None] * (x @ table[e]) for e in range(experts)),
        "compare range": lambda: _compared(x, table, j),
        "where": lambda: sum(torch.where((j == e)[..., None], x @ table[e], 0.0) for e in range(experts)),
    }
    return ways[way]().view(*x.shape[:2], -1)


def _gathered(results: Tensor, j: Tensor) -> Tensor:
    return results.gather(2, j[..., None, None].expand(-1, -1, 1, results.shape[-1])).squeeze(2)


def _compared(x: Tensor, table: Tensor, j: Tensor) -> Tensor:
    hit = j[..., None] == torch.arange(table.shape[0], device=x.device)
    return torch.einsum("bteo,bte->bto", torch.einsum("btd,edo->bteo", x, table), hit.to(x.dtype))


WAYS = ("index", "index_select", "embedding", "one_hot", "gather", "compare", "compare range", "where")


@step("routing", scores=tuple(SCORES), apart=tuple(APART), way=WAYS, renormalise=(False, True))
def experts(m: Maker, x: Tensor, *, scores: str, apart: str, way: str, renormalise: bool) -> Tensor:
    """The two best experts of each token, one after the other."""
    values, indices = SCORES[scores](m.linear(x, EXPERTS)).topk(CHOSEN, -1)
    if renormalise:
        values = values.softmax(-1)
    table = m.weight(EXPERTS, x.shape[-1], OUT)
    parts = APART[apart](indices)
    return sum(values[..., k : k + 1] * _of_table(x, table, j, way) for k, j in enumerate(parts))


@step("routing", scores=tuple(SCORES), form=("scatter", "scatter zeros", "one_hot", "all", "threshold"))
def dense_experts(m: Maker, x: Tensor, *, scores: str, form: str) -> Tensor:
    """All experts work, and a weight of each token and expert says what counts."""
    s = SCORES[scores](m.linear(x, EXPERTS))
    values, indices = s.topk(CHOSEN, -1)
    forms: dict[str, Callable[[], Tensor]] = {
        "scatter": lambda: torch.zeros_like(s).scatter(-1, indices, values),
        "scatter zeros": lambda: s.new_zeros(s.shape).scatter_(-1, indices, 1.0) * s,
        "one_hot": lambda: (F.one_hot(indices, EXPERTS).to(s.dtype) * values[..., None]).sum(-2),
        "all": lambda: s,
        "threshold": lambda: s * (s >= values[..., -1:]).to(s.dtype),
    }
    table = m.weight(EXPERTS, x.shape[-1], OUT)
    return torch.einsum("bte,btd,edo->bto", forms[form](), x, table)


@step("routing", way=WAYS, best=("argmax", "max", "argsort", "topk", "argmin"))
def best_expert(m: Maker, x: Tensor, *, way: str, best: str) -> Tensor:
    s = m.linear(x, EXPERTS)
    ways: dict[str, Callable[[], Tensor]] = {
        "argmax": lambda: s.argmax(-1),
        "argmin": lambda: s.argmin(-1),
        "max": lambda: s.max(-1).indices,
        "argsort": lambda: s.argsort(-1, descending=True)[..., 0],
        "topk": lambda: s.topk(1, -1)[1].squeeze(-1),
    }
    return _of_table(x, m.weight(EXPERTS, x.shape[-1], OUT), ways[best](), way)


@step("routing", form=("embedding", "index", "one_hot", "number", "bias"))
def codebook(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """The nearest code of a table, by its scores; ``number`` computes with the position itself."""
    codes = m.weight(8, x.shape[-1])
    i = (x @ codes.t() + m.weight(8)).argmax(-1)
    forms: dict[str, Callable[[], Tensor]] = {
        "embedding": lambda: F.embedding(i, codes),
        "index": lambda: codes[i],
        "one_hot": lambda: F.one_hot(i, 8).to(x.dtype) @ codes,
        "number": lambda: x * (i.to(x.dtype) * 0.1)[..., None],
        "bias": lambda: x + m.weight(8)[i][..., None],
    }
    return forms[form]()


@step("routing", form=("values", "channel", "mask", "gather", "sorted"))
def top_channels(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """The largest channels of each token; a bias sees to it that no two are equal, which is the largest is then plain."""
    x = x + m.weight(x.shape[-1])
    if form == "sorted":
        return x.sort(-1).values
    values, indices = x.topk(3, -1)
    forms: dict[str, Callable[[], Tensor]] = {
        "values": lambda: values,
        "channel": lambda: F.embedding(indices[..., 0], m.weight(x.shape[-1], 6)),
        "mask": lambda: x * (x >= values[..., -1:]),
        "gather": lambda: m.linear(x, x.shape[-1]).gather(-1, indices),
    }
    return forms[form]()


@step("routing", form=("first", "last", "range"))
def picked_tokens(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """Tokens or channels at positions that are a constant."""
    wanted: Iterator[int] = iter({"first": (0, 0, 1), "last": (4, -1, 2), "range": (0, 1, 2)}[form])
    chosen = x[:, list(wanted)]
    return x + chosen.mean(1, keepdim=True)


@step("routing", form=("list", "index_select", "negative"))
def picked_channels(m: Maker, x: Tensor, *, form: str) -> Tensor:
    if form == "index_select":
        return x.index_select(-1, torch.tensor([2, 0, 3], device=x.device))
    return x[..., [0, 3, 1]] if form == "list" else x[..., [-1, 0]]
