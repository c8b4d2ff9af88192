"""Ops that factor, merge, join and cut dimensions: views, concatenation, splits, slices, repeats."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from mptk.ir import (
    ONE,
    Axis,
    AxisFacts,
    Dims,
    Results,
    SourceLocation,
    Term,
    concat,
    get_argument,
    make_axis,
    make_product,
    resolve,
    resolve_result_shape,
    resolve_shape,
    set_argument,
    split_product,
    split_sum,
)
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.opaque import opaque
from passes.analysis.rules.resizer import Repeated, Resizer, Segments, shape_argument
from passes.analysis.rules.table import Result, ZeroOf, freeze_positions, normalize, record_meeting, rule


@rule("aten.reshape", zero="keep", positions="carry", resize=shape_argument("shape"))
@rule("aten.view", "aten._unsafe_view", zero="keep", positions="carry", resize=shape_argument())
def view(ctx: RuleContext, node: fx.Node, x: Value, *_: object) -> Dims:
    """y = x read in row-major order: Π x = Π y."""
    # Nothing is decided here: to make both products equal, ``unify`` splits and merges axes as far as it must.
    out = tuple(make_axis(size) for size in resolve_result_shape(node))
    ctx.unify(make_product(x.dims), make_product(out), node)
    return out


@rule("aten.view.dtype")
def view_dtype(ctx: RuleContext, node: fx.Node, x: Value, *_: object) -> Results:
    """y_d = x_d, the same bits as other numbers (−0 is not 0). If the sizes differ, the op is opaque."""
    before, after = (n.meta["val"].dtype.itemsize for n in (x.node, node))
    return x.dims if before == after else opaque(ctx, node, x)


@rule("aten.reshape_as", "aten.view_as", zero="keep", positions="carry")
def view_as(ctx: RuleContext, node: fx.Node, x: Value, other: Value) -> Dims:
    """y = x in the shape of ``other``: Π x = Π y, y_d = other_d."""
    out = other.dims
    ctx.unify(make_product(x.dims), make_product(out), node)
    return out


@rule("aten.flatten", "aten.ravel", zero="keep", positions="carry")
def flatten(ctx: RuleContext, node: fx.Node, x: Value, start_dim: int = 0, end_dim: int = -1) -> Dims:
    """y_d = x_start · … · x_end, the others pass."""
    first, last = normalize(start_dim, x.ndim), normalize(end_dim, x.ndim)
    return (*x.dims[:first], make_product(x.dims[first : last + 1]), *x.dims[last + 1 :])


def _resize_unflatten(resizer: Resizer, node: fx.Node) -> None:
    sizes = list(get_argument(node, "sizes"))
    start = normalize(get_argument(node, "dim"), len(resizer.dims(node)) - len(sizes) + 1)
    dims = resizer.dims(node)[start : start + len(sizes)]
    set_argument(node, "sizes", [resizer.scale_argument(s, d) for s, d in zip(sizes, dims, strict=True)])


@rule("aten.unflatten", zero="keep", positions="carry", resize=_resize_unflatten)
def unflatten(ctx: RuleContext, node: fx.Node, x: Value, dim: int, sizes: Sequence[int]) -> Dims:
    """x_d = y_d · y_{d+1} · …, the others pass."""
    d = normalize(dim, x.ndim)
    parts = tuple(make_axis(size) for size in resolve_result_shape(node)[d : d + len(sizes)])
    ctx.unify(x.dims[d], make_product(parts), node)
    return (*x.dims[:d], *parts, *x.dims[d + 1 :])


@rule("aten.expand", "aten.broadcast_to", zero="keep", positions="carry", resize=shape_argument())
def expand(ctx: RuleContext, node: fx.Node, x: Value, *_: object, **__: object) -> Dims:
    """A dimension of 1 becomes a fresh axis, others pass."""
    # The fresh axis may be cut: its positions are all the same.
    out = resolve_result_shape(node)
    padded = (ONE,) * (len(out) - x.ndim) + x.dims
    return tuple(d if d.size == size else make_axis(size) for d, size in zip(padded, out, strict=True))


@rule("aten.expand_as", zero="keep", positions="carry")
def expand_as(ctx: RuleContext, node: fx.Node, x: Value, other: Value) -> Dims:
    """Like expand, to the axes of ``other``."""
    for d, o in zip(x.dims, other.dims[other.ndim - x.ndim :], strict=True):
        if d.size == o.size:
            ctx.unify(d, o, node)
    return other.dims


@rule("aten.repeat", "aten.tile", zero="keep", positions="carry")
def repeat(ctx: RuleContext, node: fx.Node, x: Value, repeats: Sequence[int]) -> Dims:
    """y_d = fresh(repeats_d) · x_d."""
    # The repeats could be cut, too, but the rule has no ``resize`` that would change their numbers.
    ndim = max(len(repeats), x.ndim)
    times = (1,) * (ndim - len(repeats)) + tuple(repeats)
    padded = (ONE,) * (ndim - x.ndim) + x.dims
    return tuple(
        make_product((ctx.make_frozen(t, "repeated by a constant", node), d))
        for t, d in zip(times, padded, strict=True)
    )


def _resize_interleave(resizer: Resizer, node: fx.Node) -> None:
    repeated = resizer.note(node, Repeated)
    assert repeated is not None
    set_argument(node, "repeats", resizer.size(repeated.times))
    if node.kwargs.get("output_size") is not None:
        node.update_kwarg("output_size", resizer.size(resizer.dims(node)[repeated.dim]))


@rule("aten.repeat_interleave.self_int", zero="keep", positions="carry", resize=_resize_interleave)
def repeat_interleave(
    ctx: RuleContext, node: fx.Node, x: Value, repeats: int, dim: int | None = None, **_: object
) -> Result:
    """y_d = x_d · fresh(repeats)."""
    dims = (make_product(x.dims),) if dim is None else x.dims
    d = 0 if dim is None else normalize(dim, x.ndim)
    times = make_axis(repeats)
    return Result((*dims[:d], make_product((dims[d], times)), *dims[d + 1 :]), Repeated(d, times))


@rule("aten.repeat_interleave.self_Tensor", zero="keep", positions="carry")
def repeat_each(ctx: RuleContext, node: fx.Node, x: Value, repeats: Value, dim: int | None = None, **_: object) -> Dims:
    """y_d = each position of x_d, repeated ``repeats`` times, which pins d. Without d, x is flattened first."""
    d = None if dim is None else normalize(dim, x.ndim)
    for t in (*(x.dims if d is None else x.dims[d : d + 1]), *repeats.dims):
        ctx.freeze(t, "repeated by computed numbers", node)
    freeze_positions(ctx, node, repeats)
    record_meeting(ctx, x.dims, range(x.ndim) if d is None else [d])
    made = [ctx.make_frozen(size, "repeated by computed numbers", node) for size in resolve_result_shape(node)]
    return tuple(made) if d is None else (*x.dims[:d], made[d], *x.dims[d + 1 :])


@rule("aten.cat", "aten.concat", "aten.concatenate", zero="join")
def cat(ctx: RuleContext, node: fx.Node, tensors: Sequence[Value], dim: int = 0) -> Dims:
    """y_d = Σ x_d over the operands; other dimensions are equal."""
    present = [t for t in tensors if t.shape != (0,)]  # torch.cat skips empty vectors, whatever the other shapes
    first = present[0]
    d = normalize(dim, first.ndim)
    for t in present[1:]:
        for i in range(first.ndim):
            if i != d:
                ctx.unify(first.dims[i], t.dims[i], node)
    return (*first.dims[:d], concat(t.dims[d] for t in present), *first.dims[d + 1 :])


@rule("aten.stack", zero="join")
def stack(ctx: RuleContext, node: fx.Node, tensors: Sequence[Value], dim: int = 0) -> Dims:
    """The operands' dimensions are equal; the new one counts them and cannot be cut."""
    first = tensors[0]
    for t in tensors[1:]:
        for a, b in zip(first.dims, t.dims, strict=True):
            ctx.unify(a, b, node)
    d = normalize(dim, first.ndim + 1)
    return (*first.dims[:d], concat([ONE] * len(tensors)), *first.dims[d:])


def cut_term(ctx: RuleContext, node: fx.Node, term: Term, sizes: Sequence[int]) -> list[Term]:
    """Cut ``term`` into segments of ``sizes``. If a border is inside a unit, freeze it and return fresh segments."""
    parts: list[Term] = []
    rest = term
    for size in sizes:
        pair = split_sum(rest, size)
        if pair is None:
            ctx.freeze(term, "a slice cuts inside its units", node)
            return [ctx.make_frozen(s, "a slice of an axis that it cuts inside units", node) for s in sizes]
        parts.append(pair[0])
        rest = pair[1]
    return parts


def _resize_split(resizer: Resizer, node: fx.Node) -> None:
    """Every split becomes split_with_sizes with the segments' new sizes."""
    segments = resizer.note(node, Segments)
    if segments is not None and any(map(resizer.has_changed, segments.parts)):
        sizes = list(map(resizer.size, segments.parts))
        resizer.replace(node, "aten.split_with_sizes.default", (node.args[0], sizes, segments.dim))


@rule(
    "aten.split",
    "aten.split_with_sizes",
    "aten.chunk",
    "aten.tensor_split",
    zero="keep",
    positions="carry",
    resize=_resize_split,
)
def split(ctx: RuleContext, node: fx.Node, x: Value, _: object, dim: int = 0) -> Result:
    """x_d = Σ y_d over the results."""
    d = normalize(dim, x.ndim)
    parts = cut_term(ctx, node, x.dims[d], [resolve_shape(t)[d] for t in node.meta["val"]])
    return Result([(*x.dims[:d], part, *x.dims[d + 1 :]) for part in parts], Segments(d, tuple(parts)))


@rule("aten.unbind", zero="keep", positions="carry")
def unbind(ctx: RuleContext, node: fx.Node, x: Value, dim: int = 0) -> list[Dims]:
    """x_d = 1 + 1 + …; the results have the other dimensions."""
    d = normalize(dim, x.ndim)
    # Positions are segments of one element, which have no axis: the number of results is fixed.
    cut_term(ctx, node, x.dims[d], [1] * x.dims[d].size)
    return [(*x.dims[:d], *x.dims[d + 1 :])] * x.dims[d].size


def _resize_slice(resizer: Resizer, node: fx.Node) -> None:
    # The dense arguments may be negative, missing or beyond the end, so all are written anew.
    segments = resizer.note(node, Segments)
    if segments is not None and any(map(resizer.has_changed, segments.parts)):
        start, length = map(resizer.size, segments.parts[:2])
        node.args = (node.args[0], segments.dim, start, start + length)


@rule("aten.slice", zero="keep", positions="carry", resize=_resize_slice)
def slice_(
    ctx: RuleContext, node: fx.Node, x: Value, dim: int = 0, start: int | None = None, _: object = None, step: int = 1
) -> Dims | Result:
    """x_d = before + y_d + after. With a step k: x_d = y_d · fresh(k), which cannot be cut."""
    # A slice of everything, then every k-th position, then a range, whose end is clear from the result's size.
    d, size = normalize(dim, x.ndim), resolve_result_shape(node)[normalize(dim, x.ndim)]
    if size == x.dims[d].size:
        return x.dims
    if step != 1:
        return (*x.dims[:d], _slice_strided(ctx, node, x.dims[d], size, step), *x.dims[d + 1 :])
    begin = min(max(normalize(start or 0, x.dims[d].size), 0), x.dims[d].size)
    return _slice_between(ctx, node, x, d, begin, size)


def _slice_between(ctx: RuleContext, node: fx.Node, x: Value, d: int, begin: int, size: int) -> Result:
    """x_d = before + y_d + after."""
    parts = cut_term(ctx, node, x.dims[d], [begin, size, x.dims[d].size - begin - size])
    return Result((*x.dims[:d], parts[1], *x.dims[d + 1 :]), Segments(d, tuple(parts)))


def _slice_strided(ctx: RuleContext, node: fx.Node, term: Term, size: int, step: int) -> Term:
    # The positions are k interleaved sequences, like the even and odd channels of a rotary embedding.
    parts = split_product(term, step, last=True, where=SourceLocation(node)) if term.size == size * step else None
    if parts is None:
        ctx.freeze(term, f"sliced with step {step}", node)
        return ctx.make_frozen(size, f"sliced with step {step}", node)
    ctx.freeze(parts[1], f"enumerated by slices with step {step}", node)
    return parts[0]


def _resize_narrow(resizer: Resizer, node: fx.Node) -> None:
    segments = resizer.note(node, Segments)
    if segments is not None and any(map(resizer.has_changed, segments.parts)):
        node.args = (*node.args[:2], *map(resizer.size, segments.parts[:2]))


@rule("aten.narrow", zero="keep", positions="carry", resize=_resize_narrow)
def narrow(ctx: RuleContext, node: fx.Node, x: Value, dim: int, start: int, length: int) -> Result:
    """x_d = before + y_d + after."""
    d = normalize(dim, x.ndim)
    return _slice_between(ctx, node, x, d, normalize(start, x.dims[d].size), length)


def _resize_select(resizer: Resizer, node: fx.Node) -> None:
    segments = resizer.note(node, Segments)
    if segments is not None and any(map(resizer.has_changed, segments.parts)):
        set_argument(node, "index", resizer.size(segments.parts[0]))


@rule("aten.select", zero="keep", positions="carry", resize=_resize_select)
def select(ctx: RuleContext, node: fx.Node, x: Value, dim: int, index: int) -> Result:
    """x_d = before + 1 + after; the result has the other dimensions."""
    d = normalize(dim, x.ndim)
    position = normalize(index, x.dims[d].size)
    parts = cut_term(ctx, node, x.dims[d], [position, 1, x.dims[d].size - position - 1])
    return Result((*x.dims[:d], *x.dims[d + 1 :]), Segments(d, tuple(parts)))


def _zero_of_padding(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """Padding with another number than 0 leaves no zeros; padding with 0 or the operand's values keeps them."""
    keeps = get_argument(node, "mode", "constant") != "constant" or not get_argument(node, "value")
    return zero(node.args[0]) if keeps else set()


@rule("aten.pad", "aten.constant_pad_nd", zero=_zero_of_padding)
def pad(ctx: RuleContext, node: fx.Node, x: Value, pads: Sequence[int], *_: object, **__: object) -> Dims:
    """y_d = fresh + x_d + fresh. The padding cannot be cut; negative padding slices."""
    # ``pads`` has a pair for each dimension, the last dimension first.
    out = list(x.dims)
    if get_argument(node, "mode", "constant") != "constant":
        for term in out[x.ndim - len(pads) // 2 :]:
            ctx.freeze(term, "padded with its own values", node)
    for i in range(len(pads) // 2):
        d = x.ndim - 1 - i
        out[d] = _pad_term(ctx, node, out[d], int(pads[2 * i]), int(pads[2 * i + 1]))
    return tuple(resolve(d) for d in out)


def _pad_term(ctx: RuleContext, node: fx.Node, term: Term, left: int, right: int) -> Term:
    """fresh(left) + term + fresh(right). A negative number crops that side."""
    # Padding counts positions from the ends, which a cut of a cropped dimension would move.
    if min(left, right) < 0:
        ctx.freeze(term, "cropped by negative padding", node)
        before, after = max(-left, 0), max(-right, 0)
        term = cut_term(ctx, node, term, [before, term.size - before - after, after])[1]
    sides = [ctx.make_frozen(max(n, 0), "padding", node) for n in (left, right)]
    return concat((sides[0], term, sides[1]))
