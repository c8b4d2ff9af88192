"""Sums of products: linear layers, matrix products, attention, grouped matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import fx

from mptk.ir.axes import ONE, Axis, Term, axis, product, require_multiple
from mptk.ir.ops import argument, named_argument, op_name
from passes.analysis.rules.table import Dims, Value, align, rule

if TYPE_CHECKING:
    from passes.analysis.propagate import Walk
    from passes.transforms.rewrite import Resizer

ZeroOf = Callable[[Any], set[Axis]]


def zero_of_product(node: fx.Node, zero: ZeroOf, w: Walk) -> set[Axis]:
    """A product is zero along an axis that it keeps from an operand which is zero there; a bias must be zero too."""
    values = [a for a in node.args if isinstance(a, fx.Node)]
    bias = {"bias last": values[-1], "bias first": values[0]}.get(str(w.notes.get(node)))
    a, b = values[1:3] if bias is values[0] else values[:2]
    by_rows = op_name(node).startswith(("aten.linear", "aten.inner")) or _ndim(w, b) == 1
    found = zero_of_kept(w, zero, a, -1) | zero_of_kept(w, zero, b, -1 if by_rows else -2)
    return found if bias is None else found & zero(bias)


def _ndim(w: Walk, value: fx.Node) -> int:
    return len(w.shape(value))


def zero_of_kept(w: Walk, zero: ZeroOf, value: fx.Node, contracted: int) -> set[Axis]:
    """Where an operand is zero along the dimensions that the product keeps (all but ``contracted``)."""
    dims = w.dims.get(value, ())
    rest = [t for d, t in enumerate(dims) if d != contracted + len(dims)]
    return zero(value) & {leaf for t in rest for leaf in w.leaves_of(t)}


@rule("aten.linear", zero=zero_of_product)
def linear(w: Walk, node: fx.Node, x: Value, weight: Value, bias: Value | None = None) -> Dims:
    """y[…, o] = Σ_i x[…, i] W[o, i] + b[o]."""
    out = x.dims[:-1] if weight.ndim == 1 else (*x.dims[:-1], weight.dims[0])
    w.contract(node, x, x.ndim - 1, weight, weight.ndim - 1, out)
    if bias is not None:
        w.notes[node] = "bias last"
        w.unify(bias.dims[0], weight.dims[0], node)
    return out


@rule("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot", "aten.vdot", zero=zero_of_product)
def matmul(w: Walk, node: fx.Node, a: Value, b: Value, **_: Any) -> Dims:
    """y[…, m, n] = Σ_k a[…, m, k] b[…, k, n]; leading dimensions broadcast."""
    batch_a, batch_b = a.dims[:-2], b.dims[:-2]
    ndim = max(len(batch_a), len(batch_b))
    batch = [_join(w, node, x, y) for x, y in zip(_pad(batch_a, ndim), _pad(batch_b, ndim), strict=True)]
    out = (*batch, *a.dims[-2:-1], *(b.dims[-1:] if b.ndim > 1 else ()))
    w.contract(node, a, a.ndim - 1, b, max(b.ndim - 2, 0), out)
    if not (w.is_weight(a.node) or w.is_weight(b.node)) and b.ndim > 2:
        w.role(a.dims[-1], "inner")
        w.role(b.dims[-1], "value")
    return out


def _pad(dims: Dims, ndim: int) -> Dims:
    return (ONE,) * (ndim - len(dims)) + dims


def _join(w: Walk, node: fx.Node, a: Term, b: Term) -> Term:
    if a.size == b.size:
        w.unify(a, b, node)
    return b if a.size == 1 else a


@rule("aten.addmm", "aten.baddbmm", "aten.addmv", zero=zero_of_product)
def addmm(w: Walk, node: fx.Node, bias: Value, a: Value, b: Value, **_: Any) -> Dims:
    """y = bias + a b."""
    out = matmul(w, node, a, b)
    align(w, node, bias.dims, out)
    w.notes[node] = "bias first"
    return out


@rule("aten.inner", zero=zero_of_product)
def inner(w: Walk, node: fx.Node, a: Value, b: Value) -> Dims:
    """y[…, …'] = Σ_k a[…, k] b[…', k]."""
    out = (*a.dims[:-1], *b.dims[:-1])
    w.contract(node, a, a.ndim - 1, b, b.ndim - 1, out)
    return out


@rule("aten.outer", "aten.ger", zero="any")
def outer(w: Walk, node: fx.Node, a: Value, b: Value) -> Dims:
    """y[i, j] = a[i] b[j]."""
    return (a.dims[0], b.dims[0])


@rule("aten.addr", zero=lambda node, zero, w: zero(node.args[0]) & (zero(node.args[1]) | zero(node.args[2])))
def addr(w: Walk, node: fx.Node, bias: Value, a: Value, b: Value, **_: Any) -> Dims:
    """y[i, j] = bias + a[i] b[j]."""
    out = outer(w, node, a, b)
    align(w, node, bias.dims, out)
    return out


def _zero_of_addbmm(node: fx.Node, zero: ZeroOf, w: Walk) -> set[Axis]:
    bias, a, b = node.args[:3]
    rows, columns = (w.leaves_of(d) for d in w.dims[node])
    return zero(bias) & (zero(a) & rows | zero(b) & columns)


@rule("aten.addbmm", zero=_zero_of_addbmm)
def addbmm(w: Walk, node: fx.Node, bias: Value, a: Value, b: Value, **_: Any) -> Dims:
    """y[m, n] = bias + Σ_{t, k} a[t, m, k] b[t, k, n]."""
    out = (a.dims[1], b.dims[2])
    w.contract(node, a, 0, b, 0, out, a.dims[2:])
    w.contract(node, a, 2, b, 1, out, a.dims[:1])
    align(w, node, bias.dims, out)
    return out


def _zero_of_bilinear(node: fx.Node, zero: ZeroOf, w: Walk) -> set[Axis]:
    """Along leading dimensions where an operand is, along the channels made where the weight and the bias are."""
    a, b, weight = (v for v in node.args[:3] if isinstance(v, fx.Node))
    bias = argument(node, 3, "bias")
    made = zero(weight) & w.leaves_of(w.dims[node][-1])
    found = zero_of_kept(w, zero, a, -1) | zero_of_kept(w, zero, b, -1) | made
    return found if bias is None else found & zero(bias)


@rule("aten.bilinear", zero=_zero_of_bilinear)
def bilinear(w: Walk, node: fx.Node, a: Value, b: Value, weight: Value, bias: Value | None = None) -> Dims:
    """y[…, o] = Σ_{i, j} a[…, i] W[o, i, j] b[…, j] + bias[o]."""
    for x, y in zip(a.dims[:-1], b.dims[:-1], strict=True):
        w.unify(x, y, node)
    out = (*a.dims[:-1], weight.dims[0])
    w.contract(node, a, a.ndim - 1, weight, 1, out, b.dims[-1:])
    w.contract(node, b, b.ndim - 1, weight, 2, out, a.dims[-1:])
    if bias is not None:
        w.unify(bias.dims[0], weight.dims[0], node)
    return out


def _zero_of_einsum(node: fx.Node, zero: ZeroOf, w: Walk) -> set[Axis]:
    """As a product's; the letters that the result keeps."""
    equation, operands = cast("tuple[str, Sequence[fx.Node]]", node.args[:2])
    sources, result = _subscripts(equation)
    found: set[Axis] = set()
    for source, v in zip(sources, operands, strict=True):
        letters = zip(_letters(source, _ndim(w, v)), w.dims.get(v, ()), strict=False)
        kept = set(_letters(result, _ndim(w, node)))
        found |= zero(v) & {leaf for letter, t in letters if letter in kept for leaf in w.leaves_of(t)}
    return found


def _subscripts(equation: str) -> tuple[list[str], str]:
    """The operands' letters and the result's: if it is not given, the ellipsis and the letters that occur once."""
    sources, arrow, result = equation.replace(" ", "").partition("->")
    if not arrow:
        once = sorted(x for x in set(sources) - {",", "."} if sources.count(x) == 1)
        result = "".join(["..." if "..." in sources else "", *once])
    return sources.split(","), result


@rule("aten.einsum", zero=_zero_of_einsum)
def einsum(w: Walk, node: fx.Node, equation: str, operands: Sequence[Value], **__: Any) -> Dims:
    """One axis a letter; a letter that the result lacks is summed over."""
    sources, result = _subscripts(equation)
    terms: dict[str, Term] = {}
    places = _places(sources, operands)
    for letter, value, i in places:
        terms[letter] = _join(w, node, terms.get(letter, ONE), value.dims[i])
    kept = _letters(result, len(w.shape(node)))
    out = tuple(terms[letter] for letter in kept)
    summed = {letter: term for letter, term in terms.items() if letter not in kept}
    for letter, term in summed.items():
        found = [(v, i) for name, v, i in places if name == letter and v.dims[i].size == term.size]
        w.contract(node, *found[0], *found[-1], out, tuple(t for t in summed.values() if t is not term))
    return out


def _places(sources: Sequence[str], operands: Sequence[Value]) -> list[tuple[str, Value, int]]:
    """Each letter with the operand and the dimension that it names there."""
    pairs = zip(sources, operands, strict=True)
    return [(letter, v, i) for source, v in pairs for i, letter in enumerate(_letters(source, v.ndim))]


def _letters(subscripts: str, ndim: int) -> list[str]:
    """Subscripts as names; an ellipsis stands for the leading dimensions, counted from the right."""
    if "..." not in subscripts:
        return list(subscripts)
    before, after = subscripts.split("...")
    hidden = ndim - len(before) - len(after)
    return [*before, *(f"…{i}" for i in reversed(range(hidden))), *after]


def _zero_of_attention(node: fx.Node, zero: ZeroOf, w: Walk) -> set[Axis]:
    """The result is zero where the values are (heads and value channels)."""
    return zero(node.args[2])


def _resize_attention(r: Resizer, node: fx.Node) -> None:
    """The scale is that of the dense model: 1/√(old head size) stays when q and k lose channels."""
    if node.kwargs.get("scale") is None and r.changed(r.note(node)):
        node.update_kwarg("scale", 1 / math.sqrt(r.note(node).size))


@rule("aten.scaled_dot_product_attention", zero=_zero_of_attention, resize=_resize_attention)
def attention(
    w: Walk, node: fx.Node, q: Value, k: Value, v: Value, mask: Value | None = None, *_: Any, **__: Any
) -> Dims:
    """scores[…, s, t] = Σ_d q[…, s, d] k[…, t, d]; y[…, s, e] = Σ_t softmax(scores + mask)[…, s, t] v[…, t, e]."""
    heads = _tie_heads(w, node, q, k, v)
    _pin_positions(w, node, q, k)
    scores = (*heads, q.dims[-2], k.dims[-2])
    w.hidden.append(scores)
    if mask is not None:
        align(w, node, mask.dims, scores)
    w.contract(node, q, q.ndim - 1, k, k.ndim - 1, scores)
    return (*heads, q.dims[-2], v.dims[-1])


def _pin_positions(w: Walk, node: fx.Node, q: Value, k: Value) -> None:
    """Keys' positions are normalised over; a causal mask counts both. Notes the channels, for the scale."""
    w.notes[node] = q.dims[-1]
    w.freeze(k.dims[-2], "attended positions", node)
    if named_argument(node, "is_causal", False):
        w.freeze(q.dims[-2], "compared by position", node)


def _tie_heads(w: Walk, node: fx.Node, q: Value, k: Value, v: Value) -> Dims:
    """k = v but for channels; q heads = k heads (with enable_gqa: k heads · fresh); sizes of 1 broadcast."""
    w.unify(k.dims[-2], v.dims[-2], node)
    ndim = max(q.ndim, k.ndim, v.ndim) - 2
    heads = list(_pad(q.dims[:-2], ndim))
    for dims in (k.dims[:-2], v.dims[:-2]):
        for i, d in enumerate(_pad(dims, ndim)):
            if 1 < d.size < heads[i].size:
                w.unify(heads[i], product((d, axis(heads[i].size // d.size))), node)
            else:
                heads[i] = _join(w, node, heads[i], d)
    for h in heads[1:] if len(heads) > 1 else heads:
        w.role(h, "head")
    w.role(q.dims[-1], "inner")
    w.role(v.dims[-1], "value")
    return tuple(heads)


ROW_BYTES = 16
"""torch's grouped product takes rows of whole multiples of 16 bytes."""


@rule("aten._grouped_mm", "transformers.grouped_mm_fallback", zero=zero_of_product)
def grouped_mm(w: Walk, node: fx.Node, x: Value, weight: Value, offs: Value | None = None, *_: Any, **__: Any) -> Dims:
    """y[t, n] = Σ_k x[t, k] W[e(t), k, n]: rows are sorted by expert, ``offs`` holds where each expert's rows end."""
    out = (*x.dims[:-1], weight.dims[2])
    w.contract(node, x, x.ndim - 1, weight, 1, out)
    if offs is not None:
        w.unify(offs.dims[0], weight.dims[0], node)
    if op_name(node).startswith("aten._grouped_mm"):
        for term in (x.dims[-1], weight.dims[2]):
            require_multiple(term, ROW_BYTES // x.node.meta["val"].dtype.itemsize)
    w.routed.append((x.dims[0], weight.dims[0]))
    w.role(weight.dims[0], "expert")
    return out
