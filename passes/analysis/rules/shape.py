"""Ops that factor, merge, join and cut dimensions: views, concatenation, splits, slices, repeats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import fx

from mptk.ir.axes import ONE, Axis, Term, axis, concat, product, resolve, split_product, split_sum
from mptk.ir.ops import argument, named_argument, set_argument
from passes.analysis.rules.opaque import opaque
from passes.analysis.rules.table import Dims, Value, forget, meet, normalize, rule

if TYPE_CHECKING:
    from passes.analysis.propagate import Walk
    from passes.transforms.rewrite import Resizer


def shape_argument(position: int, name: str = "size") -> Callable[[Resizer, fx.Node], None]:
    """A resize: the list of sizes at ``position`` follows the result's dimensions."""

    def resize(r: Resizer, node: fx.Node) -> None:
        sizes = list(argument(node, position, name))
        set_argument(node, position, name, [r.scaled(s, d) for s, d in zip(sizes, r.dims(node), strict=True)])

    return resize


@rule("aten.view", "aten.reshape", "aten._unsafe_view", zero="move", resize=shape_argument(1))
def view(w: Walk, node: fx.Node, x: Value, *_: Any) -> Dims:
    """y = x read in row-major order: Π x = Π y."""
    out = tuple(axis(size) for size in w.shape(node))
    w.unify(product(x.dims), product(out), node)
    return out


@rule("aten.view.dtype")
def view_dtype(w: Walk, node: fx.Node, x: Value, *_: Any) -> Any:
    """y_d = x_d, the same bits as other numbers (−0 is not 0); of another size, nothing can be followed."""
    before, after = (n.meta["val"].dtype.itemsize for n in (x.node, node))
    return x.dims if before == after else opaque(w, node, x)


@rule("aten.reshape_as", "aten.view_as", zero="move")
def view_as(w: Walk, node: fx.Node, x: Value, other: Value) -> Dims:
    """y = x in the shape of ``other``: Π x = Π y, y_d = other_d."""
    out = other.dims
    w.unify(product(x.dims), product(out), node)
    return out


@rule("aten.flatten", "aten.ravel", zero="move")
def flatten(w: Walk, node: fx.Node, x: Value, start_dim: int = 0, end_dim: int = -1) -> Dims:
    """y_d = x_start · … · x_end, the others pass."""
    first, last = normalize(start_dim, x.ndim), normalize(end_dim, x.ndim)
    return (*x.dims[:first], product(x.dims[first : last + 1]), *x.dims[last + 1 :])


def _resize_unflatten(r: Resizer, node: fx.Node) -> None:
    sizes = list(argument(node, 2, "sizes"))
    start = normalize(argument(node, 1, "dim"), len(r.dims(node)) - len(sizes) + 1)
    dims = r.dims(node)[start : start + len(sizes)]
    set_argument(node, 2, "sizes", [r.scaled(s, d) for s, d in zip(sizes, dims, strict=True)])


@rule("aten.unflatten", zero="move", resize=_resize_unflatten)
def unflatten(w: Walk, node: fx.Node, x: Value, dim: int, sizes: Sequence[int]) -> Dims:
    """x_d = y_d · y_{d+1} · …, the others pass."""
    d = normalize(dim, x.ndim)
    parts = tuple(axis(size) for size in w.shape(node)[d : d + len(sizes)])
    w.unify(x.dims[d], product(parts), node)
    return (*x.dims[:d], *parts, *x.dims[d + 1 :])


@rule("aten.expand", "aten.broadcast_to", zero="move", resize=shape_argument(1))
def expand(w: Walk, node: fx.Node, x: Value, *_: Any, **__: Any) -> Dims:
    """A dimension of 1 becomes a fresh axis, others pass."""
    out = w.shape(node)
    padded = (ONE,) * (len(out) - x.ndim) + x.dims
    return tuple(d if d.size == size else axis(size) for d, size in zip(padded, out, strict=True))


@rule("aten.expand_as", zero="move")
def expand_as(w: Walk, node: fx.Node, x: Value, other: Value) -> Dims:
    """As expand, to the axes of ``other``."""
    for d, o in zip(x.dims, other.dims[other.ndim - x.ndim :], strict=True):
        if d.size == o.size:
            w.unify(d, o, node)
    return other.dims


@rule("aten.repeat", "aten.tile", zero="move")
def repeat(w: Walk, node: fx.Node, x: Value, repeats: Sequence[int]) -> Dims:
    """y_d = fresh(repeats_d) · x_d."""
    ndim = max(len(repeats), x.ndim)
    times = (1,) * (ndim - len(repeats)) + tuple(repeats)
    padded = (ONE,) * (ndim - x.ndim) + x.dims
    return tuple(product((w.frozen(t, "repeated by a constant", node), d)) for t, d in zip(times, padded, strict=True))


def _resize_interleave(r: Resizer, node: fx.Node) -> None:
    times, d = r.note(node)
    set_argument(node, 1, "repeats", r.size(times))
    if node.kwargs.get("output_size") is not None:
        node.update_kwarg("output_size", r.size(r.dims(node)[d]))


@rule("aten.repeat_interleave.self_int", zero="move", resize=_resize_interleave)
def repeat_interleave(w: Walk, node: fx.Node, x: Value, repeats: int, dim: int | None = None, **_: Any) -> Dims:
    """y_d = x_d · fresh(repeats)."""
    dims = (product(x.dims),) if dim is None else x.dims
    d = 0 if dim is None else normalize(dim, x.ndim)
    times = axis(repeats)
    w.notes[node] = (times, d)
    return (*dims[:d], product((dims[d], times)), *dims[d + 1 :])


@rule("aten.repeat_interleave.self_Tensor", zero="move")
def repeat_each(w: Walk, node: fx.Node, x: Value, repeats: Value, dim: int | None = None, **_: Any) -> Dims:
    """y_d = each position of x_d as often as ``repeats`` says, which pins d; without d x is flattened before."""
    d = None if dim is None else normalize(dim, x.ndim)
    for t in (*(x.dims if d is None else x.dims[d : d + 1]), *repeats.dims):
        w.freeze(t, "repeated by computed numbers", node)
    forget(w, node, repeats)
    meet(w, x.dims, range(x.ndim) if d is None else [d])
    made = [w.frozen(size, "repeated by computed numbers", node) for size in w.shape(node)]
    return tuple(made) if d is None else (*x.dims[:d], made[d], *x.dims[d + 1 :])


@rule("aten.cat", "aten.concat", "aten.concatenate", zero="join")
def cat(w: Walk, node: fx.Node, tensors: Sequence[Value], dim: int = 0) -> Dims:
    """y_d = Σ x_d over the operands, other dimensions are equal."""
    present = [t for t in tensors if t.shape != (0,)]
    first = present[0]
    d = normalize(dim, first.ndim)
    for t in present[1:]:
        for i in range(first.ndim):
            if i != d:
                w.unify(first.dims[i], t.dims[i], node)
    return (*first.dims[:d], concat(t.dims[d] for t in present), *first.dims[d + 1 :])


@rule("aten.stack", zero="join")
def stack(w: Walk, node: fx.Node, tensors: Sequence[Value], dim: int = 0) -> Dims:
    """The operands' dimensions are equal; the new one counts them and cannot be cut."""
    first = tensors[0]
    for t in tensors[1:]:
        for a, b in zip(first.dims, t.dims, strict=True):
            w.unify(a, b, node)
    d = normalize(dim, first.ndim + 1)
    return (*first.dims[:d], concat([ONE] * len(tensors)), *first.dims[d:])


def _cut(w: Walk, node: fx.Node, term: Term, sizes: Sequence[int]) -> list[Term]:
    """Cut ``term`` in segments of ``sizes``; where a cut falls inside a unit, freeze it and return fresh segments."""
    parts: list[Term] = []
    rest = term
    for size in sizes:
        pair = split_sum(rest, size)
        if pair is None:
            w.freeze(term, "a slice cuts inside its units", node)
            return [w.frozen(s, "a slice of an axis that it cuts inside units", node) for s in sizes]
        parts.append(pair[0])
        rest = pair[1]
    return parts


def _split(w: Walk, node: fx.Node, x: Value, sizes: Sequence[int], dim: int) -> list[Dims]:
    d = normalize(dim, x.ndim)
    return [(*x.dims[:d], part, *x.dims[d + 1 :]) for part in _cut(w, node, x.dims[d], sizes)]


def _resize_split(r: Resizer, node: fx.Node) -> None:
    """Any split becomes split_with_sizes over the segments' new sizes."""
    d, parts = r.note(node)
    if any(r.changed(dims[d]) for dims in parts):
        r.replace(node, "aten.split_with_sizes.default", (node.args[0], [r.size(dims[d]) for dims in parts], d))


@rule(
    "aten.split",
    "aten.split_with_sizes",
    "aten.chunk",
    "aten.tensor_split",
    zero="move",
    resize=_resize_split,
)
def split(w: Walk, node: fx.Node, x: Value, _: Any, dim: int = 0) -> list[Dims]:
    """x_d = Σ y_d over the results."""
    d = normalize(dim, x.ndim)
    sizes = [int(w.sizes(t)[d]) for t in node.meta["val"]]
    parts = _split(w, node, x, sizes, d)
    w.notes[node] = (d, parts)
    return parts


@rule("aten.unbind", zero="move")
def unbind(w: Walk, node: fx.Node, x: Value, dim: int = 0) -> list[Dims]:
    """x_d = 1 + 1 + …; the results have the other dimensions."""
    d = normalize(dim, x.ndim)
    _cut(w, node, x.dims[d], [1] * x.dims[d].size)
    return [(*x.dims[:d], *x.dims[d + 1 :])] * x.dims[d].size


def _resize_slice(r: Resizer, node: fx.Node) -> None:
    if r.note(node) is None:
        return
    dim, parts = r.note(node)
    if any(map(r.changed, parts)):
        start, length = r.size(parts[0]), r.size(parts[1])
        node.args = (node.args[0], dim, start, start + length)


@rule("aten.slice", zero="move", resize=_resize_slice)
def slice_(w: Walk, node: fx.Node, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Dims:
    """x_d = before + y_d + after. With a step k: x_d = y_d · fresh(k), which cannot be cut."""
    d, size = normalize(dim, x.ndim), w.shape(node)[normalize(dim, x.ndim)]
    w.notes[node] = None
    if size == x.dims[d].size:
        return x.dims
    begin = min(max(normalize(start or 0, x.dims[d].size), 0), x.dims[d].size)
    if step == 1:
        parts = _cut(w, node, x.dims[d], [begin, size, x.dims[d].size - begin - size])
        w.notes[node] = (d, parts)
        part = parts[1]
    else:
        part = _strided(w, node, x.dims[d], size, step)
    return (*x.dims[:d], part, *x.dims[d + 1 :])


def _strided(w: Walk, node: fx.Node, term: Term, size: int, step: int) -> Term:
    parts = split_product(term, step, last=True, where=w.where(node)) if term.size == size * step else None
    if parts is None:
        w.freeze(term, f"sliced with step {step}", node)
        return w.frozen(size, f"sliced with step {step}", node)
    w.freeze(parts[1], f"enumerated by slices with step {step}", node)
    return parts[0]


@rule("aten.narrow", zero="move", resize=lambda r, node: _resize_narrow(r, node))
def narrow(w: Walk, node: fx.Node, x: Value, dim: int, start: int, length: int) -> Dims:
    """x_d = before + y_d + after."""
    d = normalize(dim, x.ndim)
    first = normalize(start, x.dims[d].size)
    w.notes[node] = _cut(w, node, x.dims[d], [first, length, x.dims[d].size - first - length])
    return (*x.dims[:d], w.notes[node][1], *x.dims[d + 1 :])


def _resize_narrow(r: Resizer, node: fx.Node) -> None:
    if any(map(r.changed, r.note(node))):
        node.args = (*node.args[:2], *map(r.size, r.note(node)[:2]))


def _resize_select(r: Resizer, node: fx.Node) -> None:
    if any(map(r.changed, r.note(node))):
        set_argument(node, 2, "index", r.size(r.note(node)[0]))


@rule("aten.select", zero="move", resize=_resize_select)
def select(w: Walk, node: fx.Node, x: Value, dim: int, index: int) -> Dims:
    """x_d = before + 1 + after; the result has the other dimensions."""
    d = normalize(dim, x.ndim)
    position = normalize(index, x.dims[d].size)
    w.notes[node] = _cut(w, node, x.dims[d], [position, 1, x.dims[d].size - position - 1])
    return (*x.dims[:d], *x.dims[d + 1 :])


def _zero_of_padding(node: fx.Node, zero: Callable[[Any], set[Axis]], w: Walk) -> set[Axis]:
    """Padding with another number than 0 leaves no zeros beside it; padding with the operand's values does."""
    keeps = named_argument(node, "mode", "constant") != "constant" or not named_argument(node, "value")
    return zero(node.args[0]) if keeps else set()


@rule("aten.pad", "aten.constant_pad_nd", zero=_zero_of_padding)
def pad(w: Walk, node: fx.Node, x: Value, pads: Sequence[int], *_: Any, **__: Any) -> Dims:
    """y_d = fresh + x_d + fresh, the padding cannot be cut; negative padding slices."""
    out = list(x.dims)
    if named_argument(node, "mode", "constant") != "constant":
        for term in out[x.ndim - len(pads) // 2 :]:
            w.freeze(term, "padded with its own values", node)
    for i in range(len(pads) // 2):
        d = x.ndim - 1 - i
        out[d] = _padded(w, node, out[d], int(pads[2 * i]), int(pads[2 * i + 1]))
    return tuple(resolve(d) for d in out)


def _padded(w: Walk, node: fx.Node, term: Term, left: int, right: int) -> Term:
    """fresh(left) + term + fresh(right); a negative number crops that side."""
    if min(left, right) < 0:
        w.freeze(term, "cropped by negative padding", node)
        before, after = max(-left, 0), max(-right, 0)
        term = _cut(w, node, term, [before, term.size - before - after, after])[1]
    sides = [w.frozen(max(n, 0), "padding", node) for n in (left, right)]
    return concat((sides[0], term, sides[1]))
