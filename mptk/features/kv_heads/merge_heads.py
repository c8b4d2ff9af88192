"""merge_heads: give several KV heads the same keys and values, in closed form. All query heads stay.

What follows a merge is exact: heads with equal weights are one head. The merge itself is the best of its rank. The keys
of m heads become one head's, k', and each head's own are read from it, k_g ≈ u_g k'. The queries take u_g in:
q·(u_g k') = (u_gᵀ q)·k'. The values become v' with v_g ≈ B_g v', and the layer after them takes B_g in. k', u, v' and B
are the first principal components of what the heads give on calibration data, weighted by the queries (for keys) and by
the layer after them (for values).

Rotary embeddings turn pairs of channels by an angle, which is a product of complex numbers, e^{iθ} (x₁ + i x₂). They
commute only with complex factors, so u has one for each pair of channels; without them it is a matrix. GQA (arXiv
2305.13245) merges heads by their mean, the case u = 1, B = 1. It is for layers that let no factors through: they have
a norm between projections and products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from mptk.errors import AnalysisError, BudgetError
from mptk.features.kv_heads.shared_heads import SharedHeads
from mptk.ir import Axis, Edit, Member, find_unit_positions, list_axes

How = Literal["fit", "mean", "turn", "keep"]
"""``fit``: by principal components. ``mean``: without factors. ``keep``: not at all. ``turn``: not merged, but turned
at random and back. If that changes the logits, factors do not pass through this layer, and only ``mean`` is right."""
METRIC_RIDGE = 1e-6
"""Share of the mean that is added to a metric, so that it has an inverse."""
ProductsOf = Callable[[str], Tensor]
"""Weight → Σ x xᵀ of its inputs x, float64 [in + 1, in + 1]; the last of x is 1."""


def merge_kv_heads(
    layer: SharedHeads, state: Mapping[str, Tensor], count: int, products: ProductsOf | None, keys: How, values: How
) -> dict[str, Tensor]:
    """The layer's weights in their own shapes, with ``count`` different heads of keys and of values.

    Each run of KV heads side by side becomes one. ``products``: only ``fit`` needs them.

    Raises:
        MptkError: channels of the keys are turned in more than pairs.
    """
    size = layer.groups.size
    parts = [Projection.read(m, state) for m in (layer.queries, layer.keys, layer.values, layer.outputs)]
    query, key, value, output = parts
    runs = torch.arange(size).reshape(count, -1)
    _merge_keys(layer, query, key, runs, products, keys)
    _merge_values(layer, value, output, runs, products, values)
    return {name: tensor for part in parts for name, tensor in part.to_weights().items()}


def find_first_heads(layer: SharedHeads, count: int) -> dict[str, tuple[int, Tensor]]:
    """Weight of keys or values → its dimension of heads, and the positions there of one head of each run.

    Raises:
        MptkError: ``count`` does not divide the number of KV heads.
    """
    size = layer.groups.size
    fitting = [n for n in range(1, size) if size % n == 0]
    if count not in fitting:
        remedy = f"give one of {', '.join(map(str, fitting))}" if fitting else "there is nothing to merge"
        raise BudgetError(
            f"{layer.layer} has {size} KV heads, which cannot become {count}; {remedy}",
            name="kv_heads",
            nearest=fitting,
        )
    # Every step-th head is the first of its run.
    step = size // count
    return {
        m.weight: (
            m.dim,
            torch.from_numpy(find_unit_positions(m.term, layer.groups)[0, ::step].flatten()).sort().values,
        )
        for m in (*layer.keys, *layer.values)
    }


def repeat_first_heads(layer: SharedHeads, count: int) -> dict[str, Edit]:
    """Weight of keys or values → what gives each of its heads the numbers of the first head of its run."""
    step = layer.groups.size // count
    found = dict[str, Edit]()
    for m in (*layer.keys, *layer.values):
        heads = torch.from_numpy(find_unit_positions(m.term, layer.groups)[0])  # [heads, channels of each]
        source = heads[::step].repeat_interleave(step, 0)
        found[m.weight] = partial(_move_slices, dim=m.dim, to=heads.flatten(), source=source.flatten())
    return found


def _move_slices(tensor: Tensor, dim: int, to: Tensor, source: Tensor) -> Tensor:
    """The tensor with the slices at ``source`` in the places ``to``."""
    there = tensor.device
    return tensor.index_copy(dim, to.to(there), tensor.index_select(dim, source.to(there)))


@dataclass
class Projection:
    """A layer's weight and bias as one matrix, float64 [heads' channels, others], which is changed in place."""

    members: Sequence[Member]
    likes: Mapping[str, Tensor]
    matrix: Tensor

    @staticmethod
    def read(members: Sequence[Member], state: Mapping[str, Tensor]) -> Projection:
        # The bias is one more column, last, whose input is 1. So it is merged with the weight.
        likes = {m.weight: state[m.weight] for m in members}
        columns = [likes[m.weight].double().movedim(m.dim, 0).flatten(1) for m in members if m.role != "other"]
        columns += [likes[m.weight].double()[:, None] for m in members if m.role == "other"]
        return Projection(members, likes, torch.cat(columns, 1))

    @property
    def weight(self) -> Member:
        return next(m for m in self.members if m.role != "other")

    def to_weights(self) -> dict[str, Tensor]:
        """Each weight with the matrix's numbers."""
        found, bias = {}, len(self.members) > 1
        for m in self.members:
            like = self.likes[m.weight]
            part = self.matrix[:, -1] if m.role == "other" else self.matrix[:, : -1 if bias else None]
            shape = like.movedim(m.dim, 0).shape
            found[m.weight] = part.reshape(shape).movedim(0, m.dim).to(like).contiguous()
        return found

    def find_channels(self, axis: Axis, scope: Sequence[Axis]) -> Tensor:
        """The rows of each head's units: [heads, units, rows of a unit]."""
        return torch.from_numpy(find_unit_positions(self.weight.term, axis, scope))

    def compute_products(self, given: ProductsOf | None) -> Tensor:
        """Σ x xᵀ of what the matrix is multiplied with: [columns, columns]; of unit inputs if none are given."""
        if given is None:
            return torch.eye(self.matrix.shape[1], dtype=self.matrix.dtype)
        found = given(self.weight.weight)
        return found[: self.matrix.shape[1], : self.matrix.shape[1]].to(self.matrix)


def _merge_keys(
    layer: SharedHeads, query: Projection, key: Projection, runs: Tensor, products: ProductsOf | None, how: How
) -> None:
    if how == "keep":
        return
    # A rotary embedding ties the two halves of a head, so an axis of pairs has two rows in each unit. Channels that it
    # leaves out are an axis of their own.
    axes = list(dict.fromkeys(leaf for leaf in list_axes(key.weight.term) if leaf is not layer.groups))
    each = layer.heads.size if layer.heads is not None else 1
    for axis in axes:
        rows, asked = key.find_channels(axis, (layer.groups,)), query.find_channels(axis, layer.scope)
        asked = asked.reshape(layer.groups.size, each, *asked.shape[1:])
        if rows.shape[-1] > 2:
            raise AnalysisError(
                f"{layer.layer}: keys are turned in more than pairs, so their heads cannot be merged", name=layer.layer
            )
        if how == "mean":
            for run in runs:
                key.matrix[rows[run]] = key.matrix[rows[run]].mean(0, keepdim=True)
        elif rows.shape[-1] == 1 and len(axes) == 1:  # no rotation at all: any matrix passes
            _merge_spaces(
                key,
                rows[..., 0],
                query,
                asked[..., 0],
                runs,
                key.compute_products(products),
                query.compute_products(products),
                how,
            )
        else:
            _merge_pairs(
                key, rows, query, asked, runs, key.compute_products(products), query.compute_products(products), how
            )


def _merge_pairs(
    key: Projection,
    rows: Tensor,
    query: Projection,
    asked: Tensor,
    runs: Tensor,
    seen: Tensor,
    wanted: Tensor,
    how: How,
) -> None:
    """Keys and queries as complex numbers, a pair of channels each; a single channel is a real one."""
    # G: KV heads, each: query heads of one, U: units (pairs), D: columns, m: heads of a run.
    # ``energy``: how strongly the queries ask for each unit, √Σ|q|², which weighs the keys' errors.
    k, q = _make_complex(key.matrix, rows), _make_complex(query.matrix, asked)  # [G, U, D], [G, each, U, D]
    energy = torch.einsum("ghud,de,ghue->gu", q, wanted.to(q), q.conj()).real.clamp_min(0).sqrt()
    energy = energy + METRIC_RIDGE * energy.mean() + 1e-30  # 1e-30: if all queries are 0
    factors = torch.ones_like(energy, dtype=k.dtype)
    # Random angles from 0 to 6, which is nearly a whole turn; for single channels random signs.
    if how == "turn":
        angles = torch.rand(energy.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 6
        factors = torch.polar(torch.ones_like(angles), angles) if rows.shape[-1] == 2 else (angles - 3).sign().to(k)
        k = k * factors[..., None]
        factors = factors.conj()
    # The first principal component of a run's weighted keys, for each unit: ``shared`` is k', ``own`` each head's u.
    for run in runs if how == "fit" else ():
        weighted = energy[run][..., None] * k[run]  # [m, U, D]
        moments = torch.einsum("gud,de,hue->ugh", weighted, seen.to(k), weighted.conj())
        first = torch.linalg.eigh(moments).eigenvectors[..., -1].T  # [m, U]
        shared = (first.conj()[..., None] * weighted).sum(0)
        own = first / energy[run]
        # Only the product u · k' is determined. Factors of mean size 1 keep both weights in their usual range.
        size = own.abs().mean(0)
        k[run], factors[run] = shared * size[:, None], own / size
    _write(key.matrix, rows, k)
    _write(query.matrix, asked, q * factors.conj()[:, None, :, None])


def _make_complex(matrix: Tensor, rows: Tensor) -> Tensor:
    """[..., units, rows of a unit] → [..., units, columns], complex."""
    found = matrix[rows]
    return torch.complex(
        found[..., 0, :], found[..., 1, :] if rows.shape[-1] == 2 else torch.zeros_like(found[..., 0, :])
    )


def _write(matrix: Tensor, rows: Tensor, values: Tensor) -> None:
    matrix[rows[..., 0]] = values.real
    if rows.shape[-1] == 2:
        matrix[rows[..., 1]] = values.imag


def _merge_values(
    layer: SharedHeads, value: Projection, output: Projection, runs: Tensor, products: ProductsOf | None, how: How
) -> None:
    if how == "keep":
        return
    (axis,) = set(list_axes(value.weight.term)) - {layer.groups}
    rows, used = value.find_channels(axis, (layer.groups,))[..., 0], output.find_channels(axis, layer.scope)[..., 0]
    if how == "mean":
        for run in runs:
            value.matrix[rows[run]] = value.matrix[rows[run]].mean(0, keepdim=True)
        return
    used = used.reshape(layer.groups.size, -1, used.shape[-1])
    _merge_spaces(
        value,
        rows,
        output,
        used,
        runs,
        value.compute_products(products),
        torch.eye(output.matrix.shape[1]).double(),
        how,
    )


def _merge_spaces(
    made: Projection, rows: Tensor, read: Projection, used: Tensor, runs: Tensor, seen: Tensor, wanted: Tensor, how: How
) -> None:
    """Channels that ``made`` gives and ``read`` sums over, with no more than matrices between.

    Args:
        rows: of ``made``, [G, d]. ``used``: rows of ``read``, [G, query heads of each, d].
        seen: Σ x xᵀ of the inputs of ``made``. ``wanted``: the same for ``read``.
    """
    if how == "turn":
        generator = torch.Generator().manual_seed(0)
        for g in range(len(rows)):
            noise = torch.randn(rows.shape[1], rows.shape[1], generator=generator, dtype=torch.float64)
            turn = torch.linalg.qr(noise).Q
            made.matrix[rows[g]] = turn @ made.matrix[rows[g]]
            read.matrix[used[g]] = turn @ read.matrix[used[g]]
        return
    # Errors of v are measured by what the readers make of them: with the metric M = Σ w wᵀ, whose root weighs v. The
    # first d components of a run's weighted channels are V', and B = M^(−1/2) · components.
    for run in runs:
        v, w = made.matrix[rows[run]], read.matrix[used[run]]  # [m, d, in], [m, each, d, out]
        metric = torch.einsum("mhdo,op,mhep->mde", w, wanted, w)
        metric = metric + (METRIC_RIDGE * metric.diagonal(dim1=1, dim2=2).mean() + 1e-30) * torch.eye(v.shape[1]).to(v)
        values, vectors = torch.linalg.eigh(metric)
        root = (vectors * values.sqrt()[:, None]) @ vectors.mT  # [m, d, d]
        back = (vectors / values.sqrt()[:, None]) @ vectors.mT
        weighted = (root @ v).flatten(0, 1)
        first = torch.linalg.eigh(weighted @ seen @ weighted.T).eigenvectors[:, -v.shape[1] :]  # [m d, d]
        own = back @ first.unflatten(0, v.shape[:2])  # B: [m, d, d]
        # As above, B of mean size 1: an orthogonal matrix has a square sum of d.
        size = own.square().sum((1, 2)).mean().sqrt() / v.shape[1] ** 0.5
        made.matrix[rows[run]] = ((first.T @ weighted) * size).expand_as(v)
        read.matrix[used[run]] = (own / size).mT[:, None] @ w
