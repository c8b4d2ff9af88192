"""Sums of products: linear layers, matrix products, attention, grouped matrix products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from torch import fx

from mptk.ir import (
    ONE,
    Axis,
    AxisFacts,
    Dims,
    Term,
    collect_axes,
    get_argument,
    make_axis,
    make_product,
    name_base_op,
    name_op,
    require_multiple,
    resolve_result_shape,
)
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.resizer import Counted, Resizer
from passes.analysis.rules.table import Result, ZeroOf, align, rule

BIAS_FIRST = ("addmm", "baddbmm", "addmv")


def zero_of_product(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """A product is zero along an axis that it keeps from an operand that is zero there. A bias must be zero, too."""
    # The operands, by op; then the dimension of each that is summed over. A linear layer's weight has rows for outputs.
    values = [a for a in node.args if isinstance(a, fx.Node)]
    bias_first = name_base_op(node.target) in BIAS_FIRST
    bias = values[0] if bias_first else get_argument(node, "bias")
    a, b = values[1:3] if bias_first else values[:2]
    by_rows = name_base_op(node.target) in ("linear", "inner") or len(resolve_result_shape(b)) == 1
    found = zero_of_kept(facts, zero, a, -1) | zero_of_kept(facts, zero, b, -1 if by_rows else -2)
    return found if bias is None else found & zero(bias)


def zero_of_kept(facts: AxisFacts, zero: ZeroOf, value: fx.Node, contracted: int) -> set[Axis]:
    """Zero if an operand is zero along a dimension that the product keeps (all but ``contracted``)."""
    dims = facts.dims(value)
    rest = [t for d, t in enumerate(dims) if d != contracted + len(dims)]
    return zero(value) & collect_axes(rest)


@rule("aten.linear", zero=zero_of_product)
def linear(ctx: RuleContext, node: fx.Node, x: Value, weight: Value, bias: Value | None = None) -> Dims:
    """y[…, o] = Σ_i x[…, i] W[o, i] + b[o]."""
    out = x.dims[:-1] if weight.ndim == 1 else (*x.dims[:-1], weight.dims[0])
    ctx.contract(node, x, x.ndim - 1, weight, weight.ndim - 1, out)
    if bias is not None:
        ctx.unify(bias.dims[0], weight.dims[0], node)
    return out


@rule("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot", "aten.vdot", zero=zero_of_product)
def matmul(ctx: RuleContext, node: fx.Node, a: Value, b: Value, **_: object) -> Dims:
    """y[…, m, n] = Σ_k a[…, m, k] b[…, k, n]; leading dimensions broadcast."""
    batch_a, batch_b = a.dims[:-2], b.dims[:-2]
    ndim = max(len(batch_a), len(batch_b))
    batch = [_join(ctx, node, x, y) for x, y in zip(_pad(batch_a, ndim), _pad(batch_b, ndim), strict=True)]
    out = (*batch, *a.dims[-2:-1], *(b.dims[-1:] if b.ndim > 1 else ()))
    ctx.contract(node, a, a.ndim - 1, b, max(b.ndim - 2, 0), out)
    # Two activations with batches: an attention written out. Roles serve only names.
    if not (ctx.is_weight(a.node) or ctx.is_weight(b.node)) and b.ndim > 2:
        ctx.note_role(a.dims[-1], "inner")
        ctx.note_role(b.dims[-1], "value")
    return out


def _pad(dims: Dims, ndim: int) -> Dims:
    return (ONE,) * (ndim - len(dims)) + dims


def _join(ctx: RuleContext, node: fx.Node, a: Term, b: Term) -> Term:
    if a.size == b.size:
        ctx.unify(a, b, node)
    return b if a.size == 1 else a


@rule("aten.addmm", "aten.baddbmm", "aten.addmv", zero=zero_of_product)
def addmm(ctx: RuleContext, node: fx.Node, bias: Value, a: Value, b: Value, **_: object) -> Dims:
    """y = bias + a b."""
    out = matmul(ctx, node, a, b)
    align(ctx, node, bias.dims, out)
    return out


@rule("aten.inner", zero=zero_of_product)
def inner(ctx: RuleContext, node: fx.Node, a: Value, b: Value) -> Dims:
    """y[…, …'] = Σ_k a[…, k] b[…', k]."""
    out = (*a.dims[:-1], *b.dims[:-1])
    ctx.contract(node, a, a.ndim - 1, b, b.ndim - 1, out)
    return out


@rule("aten.cdist")
def cdist(ctx: RuleContext, node: fx.Node, x: Value, y: Value, *_: object, **__: object) -> Dims:
    """z[…, m, n] = (Σ_k |x[…, m, k] − y[…, n, k]|^p)^(1/p); leading dimensions broadcast."""
    # A sum of |x − y|^p is not a product: a removed term vanishes only if both operands are zero there.
    ctx.unify(x.dims[-1], y.dims[-1], node)
    for value in (x, y):
        ctx.reduce(node, value.dims[-1], "sum", value.node)
    ndim = max(x.ndim, y.ndim) - 2
    pairs = zip(_pad(x.dims[:-2], ndim), _pad(y.dims[:-2], ndim), strict=True)
    out = (*(_join(ctx, node, a, b) for a, b in pairs), x.dims[-2], y.dims[-2])
    ctx.note_inner((*out, x.dims[-1]))
    return out


@rule("aten.outer", "aten.ger", zero="any")
def outer(ctx: RuleContext, node: fx.Node, a: Value, b: Value) -> Dims:
    """y[i, j] = a[i] b[j]."""
    return (a.dims[0], b.dims[0])


@rule("aten.addr", zero=lambda node, zero, facts: zero(node.args[0]) & (zero(node.args[1]) | zero(node.args[2])))
def addr(ctx: RuleContext, node: fx.Node, bias: Value, a: Value, b: Value, **_: object) -> Dims:
    """y[i, j] = bias + a[i] b[j]."""
    out = outer(ctx, node, a, b)
    align(ctx, node, bias.dims, out)
    return out


def _zero_of_addbmm(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    bias, a, b = node.args[:3]
    rows, columns = (collect_axes([d]) for d in facts.dims(node))
    return zero(bias) & (zero(a) & rows | zero(b) & columns)


@rule("aten.addbmm", zero=_zero_of_addbmm)
def addbmm(ctx: RuleContext, node: fx.Node, bias: Value, a: Value, b: Value, **_: object) -> Dims:
    """y[m, n] = bias + Σ_{t, k} a[t, m, k] b[t, k, n]."""
    # One sum over two dimensions: it is recorded for each, with the other as ``also``.
    out = (a.dims[1], b.dims[2])
    ctx.contract(node, a, 0, b, 0, out, a.dims[2:])
    ctx.contract(node, a, 2, b, 1, out, a.dims[:1])
    align(ctx, node, bias.dims, out)
    return out


def _zero_of_bilinear(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """Zero along leading dimensions if an operand is; along new channels if the weight and the bias are."""
    a, b, weight = (v for v in node.args[:3] if isinstance(v, fx.Node))
    bias = get_argument(node, "bias")
    made = zero(weight) & collect_axes([facts.dims(node)[-1]])
    found = zero_of_kept(facts, zero, a, -1) | zero_of_kept(facts, zero, b, -1) | made
    return found if bias is None else found & zero(bias)


@rule("aten.bilinear", zero=_zero_of_bilinear)
def bilinear(ctx: RuleContext, node: fx.Node, a: Value, b: Value, weight: Value, bias: Value | None = None) -> Dims:
    """y[…, o] = Σ_{i, j} a[…, i] W[o, i, j] b[…, j] + bias[o]."""
    for x, y in zip(a.dims[:-1], b.dims[:-1], strict=True):
        ctx.unify(x, y, node)
    out = (*a.dims[:-1], weight.dims[0])
    ctx.contract(node, a, a.ndim - 1, weight, 1, out, b.dims[-1:])
    ctx.contract(node, b, b.ndim - 1, weight, 2, out, a.dims[-1:])
    if bias is not None:
        ctx.unify(bias.dims[0], weight.dims[0], node)
    return out


def _zero_of_einsum(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """Zero as a product: along letters that the result keeps."""
    equation, operands = cast("tuple[str, Sequence[fx.Node]]", node.args[:2])
    sources, result = _parse_subscripts(equation)
    found: set[Axis] = set()
    for source, v in zip(sources, operands, strict=True):
        letters = zip(_expand_subscripts(source, len(resolve_result_shape(v))), facts.dims(v), strict=False)
        kept = set(_expand_subscripts(result, len(resolve_result_shape(node))))
        found |= zero(v) & {leaf for letter, t in letters if letter in kept for leaf in collect_axes([t])}
    return found


def _parse_subscripts(equation: str) -> tuple[list[str], str]:
    """The letters of operands and result. The default result is the ellipsis and all letters that occur once."""
    sources, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow:
        once = sorted(x for x in set(sources) - {",", "."} if sources.count(x) == 1)
        result = "".join(["..." if "..." in sources else "", *once])
    return sources.split(","), result


@rule("aten.einsum", zero=_zero_of_einsum)
def einsum(ctx: RuleContext, node: fx.Node, equation: str, operands: Sequence[Value], **__: object) -> Dims:
    """Each letter is an axis. The call sums over letters that are missing in the result."""
    # Every letter is one term. A dimension of 1 broadcasts against the others of its letter.
    sources, result = _parse_subscripts(equation)
    terms: dict[str, Term] = {}
    places = _list_letter_dims(sources, operands)
    for letter, value, i in places:
        terms[letter] = _join(ctx, node, terms.get(letter, ONE), value.dims[i])
    kept = _expand_subscripts(result, len(resolve_result_shape(node)))
    out = tuple(terms[letter] for letter in kept)
    # Each letter that is gone is a sum of products over it: of its first and its last operand.
    summed = {letter: term for letter, term in terms.items() if letter not in kept}
    for letter, term in summed.items():
        found = [(v, i) for name, v, i in places if name == letter and v.dims[i].size == term.size]
        ctx.contract(node, *found[0], *found[-1], out, tuple(t for t in summed.values() if t is not term))
    return out


def _list_letter_dims(sources: Sequence[str], operands: Sequence[Value]) -> list[tuple[str, Value, int]]:
    """Each letter of each operand, with the operand and the dimension that it names."""
    pairs = zip(sources, operands, strict=True)
    return [(letter, v, i) for source, v in pairs for i, letter in enumerate(_expand_subscripts(source, v.ndim))]


def _expand_subscripts(subscripts: str, ndim: int) -> list[str]:
    """Subscripts as names. An ellipsis stands for the leading dimensions, counted from the right."""
    if "..." not in subscripts:
        return list(subscripts)
    before, after = subscripts.split("...")
    hidden = ndim - len(before) - len(after)
    return [*before, *(f"…{i}" for i in reversed(range(hidden))), *after]


def _resize_attention(resizer: Resizer, node: fx.Node) -> None:
    """Keep the dense model's scale 1/√(old head size) if q and k lose channels."""
    channels = resizer.note(node, Counted)
    if channels is not None and node.kwargs.get("scale") is None and resizer.has_changed(channels.term):
        node.update_kwarg("scale", 1 / math.sqrt(channels.term.size))


@rule("aten.scaled_dot_product_attention", zero=lambda node, zero, facts: zero(node.args[2]), resize=_resize_attention)
def attention(
    ctx: RuleContext, node: fx.Node, q: Value, k: Value, v: Value, mask: Value | None = None, *_: object, **__: object
) -> Result:
    """scores[…, s, t] = Σ_d q[…, s, d] k[…, t, d]; y[…, s, e] = Σ_t softmax(scores + mask)[…, s, t] v[…, t, e]."""
    heads = _tie_heads(ctx, node, q, k, v)
    _pin_positions(ctx, node, q, k)
    scores = (*heads, q.dims[-2], k.dims[-2])
    ctx.note_inner(scores)
    if mask is not None:
        align(ctx, node, mask.dims, scores)
    ctx.contract(node, q, q.ndim - 1, k, k.ndim - 1, scores)
    return Result((*heads, q.dims[-2], v.dims[-1]), Counted(q.dims[-1]))


def _pin_positions(ctx: RuleContext, node: fx.Node, q: Value, k: Value) -> None:
    """Pin keys' positions, since the softmax runs over them, and queries' positions if the mask is causal."""
    ctx.freeze(k.dims[-2], "attended positions", node)
    if get_argument(node, "is_causal", False):
        ctx.freeze(q.dims[-2], "compared by position", node)


def _tie_heads(ctx: RuleContext, node: fx.Node, q: Value, k: Value, v: Value) -> Dims:
    """k = v except channels; q heads = k heads (with enable_gqa: k heads · fresh); sizes of 1 broadcast."""
    ctx.unify(k.dims[-2], v.dims[-2], node)
    ndim = max(q.ndim, k.ndim, v.ndim) - 2
    heads = list(_pad(q.dims[:-2], ndim))
    for dims in (k.dims[:-2], v.dims[:-2]):
        for i, d in enumerate(_pad(dims, ndim)):
            if 1 < d.size < heads[i].size:  # each KV head serves several query heads
                ctx.unify(heads[i], make_product((d, make_axis(heads[i].size // d.size))), node)
            else:
                heads[i] = _join(ctx, node, heads[i], d)
    # The first of several leading dimensions is the batch.
    for h in heads[1:] if len(heads) > 1 else heads:
        ctx.note_role(h, "head")
    ctx.note_role(q.dims[-1], "inner")
    ctx.note_role(v.dims[-1], "value")
    return tuple(heads)


ROW_BYTES = 16
"""torch's grouped product needs rows that are multiples of 16 bytes."""


@rule("aten._grouped_mm", "transformers.grouped_mm_fallback", zero=zero_of_product)
def grouped_mm(
    ctx: RuleContext, node: fx.Node, x: Value, weight: Value, offs: Value | None = None, *_: object, **__: object
) -> Dims:
    """y[t, n] = Σ_k x[t, k] W[e(t), k, n]: rows are sorted by expert; ``offs``: end of each expert's rows."""
    out = (*x.dims[:-1], weight.dims[2])
    ctx.contract(node, x, x.ndim - 1, weight, 1, out)
    if offs is not None:
        ctx.unify(offs.dims[0], weight.dims[0], node)
    if name_op(node).startswith("aten._grouped_mm"):  # transformers' fallback takes any width
        for term in (x.dims[-1], weight.dims[2]):
            require_multiple(term, ROW_BYTES // x.node.meta["val"].dtype.itemsize)
    ctx.route(x.dims[0], weight.dims[0])
    ctx.note_role(weight.dims[0], "expert")
    return out
