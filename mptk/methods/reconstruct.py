"""reconstruct: fit the kept columns of each consumer to the dense layer's outputs, by least squares.

This is layer-wise distillation in closed form. Take a layer that sums over pruned units, and its inputs x and outputs
t = W x in the dense model. The kept columns k become

    W' = argmin Σ ‖t − W' x_k‖² + λ ‖W' − W_k‖² = (Σ t x_kᵀ + λ W_k) (Σ x_k x_kᵀ + λ I)⁻¹,

λ is a share (``_compute_ridge``) of the median over channels of Σ x_k². With fewer rows than kept channels the same
W' comes from a system in the rows (Woodbury): W' = W_k + (T − W_k X_k) (X_kᵀ X_k + λ I)⁻¹ X_kᵀ.

If blocks are removed, the layer before each gap also makes up for what they add to the residual stream (``find_gaps``):
t = W h + y − x.

This is the update of optimal brain surgeon (Hassibi & Stork 1992) for all removed units at once, as in ZipLM (arXiv
2302.04089) and SlimGPT (arXiv 2412.18110). x comes from the dense model. The pruned model's inputs did not help: they
carry the errors of all layers before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, fx

from mptk.config import Settings
from mptk.cost.estimate import ModelSizes, Pass
from mptk.distributed.processes import Sharing, share_batches
from mptk.ir import (
    Analysis,
    Block,
    Cut,
    Lazy,
    Program,
    Samples,
    Weights,
    build_renumbering,
    get_argument,
    list_removed_blocks,
    name_base_op,
)
from mptk.methods.criteria.observe import OBSERVED_TOKENS, Site, find_sites, split_batches
from mptk.progress import Count
from mptk.staged.spool import Spool
from mptk.staged.staged import EXECUTOR, Executor
from passes.transforms.insert_masks import MaskSite

RIDGE, OF_FEW = 0.3, 3.0
"""λ as a share of the median over kept inputs of Σ x²: ``RIDGE``, or less if there are more than ten rows an input:
``OF_FEW`` times the inputs over the rows. A few inputs may be a thousand times as large as the others; a share of the
mean would leave such a layer unfitted."""


def estimate_reconstruction(settings: Settings, sizes: ModelSizes, kept: float) -> dict[str, Pass]:
    """The cost of ``reconstruct_consumers``."""
    s = settings
    return {"reconstruct": Pass(s.windows * s.length, s.length, flops=sizes.fit)} if s.reconstruct else {}


def reconstruct_consumers(
    analysis: Analysis,
    sites: Sequence[MaskSite],
    cut: Cut,
    changes: Mapping[str, Tensor],
    samples: Samples,
    progress: Count | None = None,
    executor: Executor = EXECUTOR,
) -> Weights:
    """Fit every consumer of a cut family to the dense layer's outputs, and the layer before each gap to its end.

    Args:
        analysis: of the dense model.
        sites: where the families' masks go (``find_mask_sites``).
        cut: what is removed.
        changes: the weights in which the pruned model differs from the dense one.
        samples: the model's inputs. executor: runs the dense program; values that exceed its memory go to files.

    Returns:
        ``changes`` with the fitted weights in dense shapes; their removed inputs are 0.
    """
    dense, changed = analysis.program, analysis.program.with_state(changes)
    shelf, rows = Spool(executor.borders), len(samples) * samples.positions
    layers = {layer.weight: layer for layer in _find_layers(analysis, sites, cut)}

    # The model is seen as it is without the cut, but the ridge pulls towards the weights that a method has changed.
    def solve(name: str, fit: _Fit) -> None:
        shelf.add(name, fit.solve(dense.state[name], changed.state[name]).cpu())

    # The smaller of the two systems is kept and solved: one of rows or one of kept inputs.
    fits = {name: layer.fit(few=rows < int(layer.keep.sum())) for name, layer in layers.items()}
    _observe(analysis, layers, fits, samples, solve, progress, executor)
    return Weights(changes).with_entries(shelf.weights)


@dataclass(frozen=True)
class Products:
    """The sums that fit layers to any of some cuts: ``fit_layers`` solves with them.

    ``sums``: layer (``_Layer.key``) → Σ x xᵀ of its inputs in the dense model, and below it Σ (y − x) xᵀ of its gap,
    float32 [in (+ out), in]. ``counts``: layer → rows of x.
    """

    analysis: Analysis
    sites: Sequence[MaskSite]
    sums: Weights
    counts: Mapping[str, int]

    def fit_layers(self, cut: Cut) -> Weights:
        """The layers of a cut, fitted as in ``reconstruct_consumers``, each on demand."""
        state, layers = self.analysis.program.state, _find_layers(self.analysis, self.sites, cut)
        return Weights(
            {a.weight: Lazy(state.find_like(a.weight).to("meta"), partial(self._solve_layer, a)) for a in layers}
        )

    def _solve_layer(self, layer: _Layer) -> Tensor:
        dense, products, fit = self.analysis.program.state[layer.weight], self.sums[layer.key], layer.fit()
        fit.products, fit.count = products[:, layer.keep.to(products.device)], self.counts[layer.key]
        return fit.solve(dense, dense).cpu()


def gather_products(
    analysis: Analysis,
    sites: Sequence[MaskSite],
    cuts: Sequence[Cut],
    samples: Samples,
    progress: Count | None = None,
    executor: Executor = EXECUTOR,
) -> Products:
    """Run the dense model once on ``samples`` and keep the sums that fit the layers of each of ``cuts``."""
    shelf, counts = Spool(executor.borders), dict[str, int]()
    layers = {layer.key: layer for cut in cuts for layer in _find_layers(analysis, sites, cut)}
    # The cuts keep different inputs, so the products of all inputs are kept; each fit takes its columns of them.
    fits = {key: replace(layer, keep=torch.ones_like(layer.keep)).fit() for key, layer in layers.items()}

    def keep(key: str, fit: _Fit) -> None:
        assert fit.products is not None
        counts[key] = fit.count
        shelf.add(key, fit.products)

    _observe(analysis, layers, fits, samples, keep, progress, executor)
    return Products(analysis, sites, shelf.weights, counts)


def _observe(
    analysis: Analysis,
    layers: Mapping[str, _Layer],
    fits: dict[str, _Fit],
    samples: Samples,
    done: Callable[[str, _Fit], None],
    progress: Count | None,
    executor: Executor,
) -> None:
    """Show each of ``fits`` its layer's inputs, then call ``done`` with it and drop it."""
    if not fits:
        return
    dense, sites = analysis.program, find_sites(analysis)
    uses = {
        key: [s for s in sites if name_operand_weight(dense, s.weight) == layer.weight] for key, layer in layers.items()
    }
    given = split_batches(dense, samples, OBSERVED_TOKENS)
    # Products of several processes add up; rows do not, so each process sees all rows if some fit keeps rows.
    share = Sharing() if any(fit.few for fit in fits.values()) else share_batches(len(given))
    own = share.own(given)
    left = {key: len(own) * len(found) for key, found in uses.items()}

    # A layer is solved as soon as it has seen all inputs, so the sums of only one stage's layers are in memory.
    def see(key: str, x_dim: int, x: Tensor, *ends: Tensor) -> None:
        fits[key].add(x.movedim(x_dim, -1), *ends)
        left[key] -= 1
        if not left[key]:
            fits[key].combine(share)
            done(key, fits.pop(key))

    watches = [((s.x, *layers[key].ends), partial(see, key, s.x_dim)) for key, found in uses.items() for s in found]
    executor.watch(dense, [batch.tensors for batch in own], watches, progress)


def list_consumers(sites: Sequence[MaskSite]) -> set[str]:
    """The names of the weights that sum over the units of these sites' families."""
    return {site.weights[0][0] for site in sites if site.where == "input"}


@dataclass(frozen=True)
class _Layer:
    """A layer to fit: its weight, its kept inputs (boolean [in]), their dimension in the weight, the gap behind it."""

    weight: str
    keep: Tensor
    dim: int
    gap: Gap | None = None

    @property
    def key(self) -> str:
        """The key of the sums that this fit needs: with another gap behind it a layer needs other sums."""
        return self.weight if self.gap is None else f"{self.weight} {self.gap.y.name}"

    @property
    def ends(self) -> tuple[fx.Node, ...]:
        """The values that are observed beside its inputs."""
        return () if self.gap is None else (self.gap.x, self.gap.y)

    def fit(self, few: bool = False) -> _Fit:
        """A fit that has seen nothing yet. ``few``: whether there are fewer rows than kept inputs."""
        return _Fit(self.keep, self.dim == 0, few)


def _find_layers(analysis: Analysis, sites: Sequence[MaskSite], cut: Cut) -> list[_Layer]:
    """The consumers of the units that a cut removes, and the layers before its gaps."""
    found, stays = dict[str, _Layer](), build_renumbering(analysis, cut).find_new
    for site in sites:
        name, dim = site.weights[0] if site.weights else ("", None)
        group = analysis.variable(site.family).groups[site.layer]
        # Only inputs are fitted, and only of layers that stay: a removed block's weights have no new name.
        if site.where == "input" and group.axis in cut.choices and stays(name) is not None:
            assert dim is not None
            units = torch.from_numpy(cut.choices[group.axis].table).flatten()
            # The index is −1 at inputs of no unit: it takes the appended entry, so they stay.
            keep = torch.cat([units, torch.ones(1, dtype=torch.bool)])[site.index]
            # Two families may share a consumer: an input must stay in both.
            found[name] = _Layer(name, found[name].keep & keep if name in found else keep, dim)
    for gap in find_gaps(analysis, cut):
        size = analysis.program.state.find_like(gap.weight).shape[gap.dim]
        layer = found.get(gap.weight, _Layer(gap.weight, torch.ones(size, dtype=torch.bool), gap.dim))
        found[gap.weight] = replace(layer, gap=gap)
    return list(found.values())


def name_operand_weight(program: Program, node: fx.Node) -> str:
    """The name of the weight behind a contraction's operand."""
    while node.op != "placeholder":
        node = node.all_input_nodes[0]
    return program.weights[node.name]


@dataclass
class _Fit:
    """The inputs x of one layer: their rows, if there are fewer rows than kept channels, or their products with x_k.

    If the layer is before a gap, what the gap adds stands behind x in rows, and below it in products.
    ``keep``: kept inputs, boolean [in]. ``transposed``: the weight is [in, out].
    """

    keep: Tensor
    transposed: bool
    few: bool
    rows: list[Tensor] = field(default_factory=list)
    products: Tensor | None = None
    count: int = 0

    def add(self, x: Tensor, before: Tensor | None = None, after: Tensor | None = None) -> None:
        """Add rows of the layer's inputs, [..., in], and of what enters and leaves its gap, [..., out]."""
        x = x.flatten(0, -2).float()
        if before is not None and after is not None:
            x = torch.cat([x, (after.float() - before.float()).flatten(0, -2)], 1)
        self.count += len(x)
        if self.few:
            self.rows.append(x)
        else:
            found = x.T @ x[:, : len(self.keep)][:, self.keep.to(x.device)]
            self.products = found if self.products is None else self.products + found

    def combine(self, share: Sharing) -> None:
        """Add the rows of other processes."""
        if share.count > 1:
            self.products = share.sum_all(self._products)
            self.count = int(share.sum_all(torch.tensor(float(self.count), device=self._products.device)))

    def solve(self, dense: Tensor, changed: Tensor) -> Tensor:
        """The fitted weight, in ``dense``'s layout and type. ``changed``: the weight that the ridge pulls towards."""
        device = self.rows[0].device if self.few else self._products.device
        own, old = (w.to(device).T if self.transposed else w.to(device) for w in (dense, changed))
        keep = self.keep.to(device)
        near = old[:, keep].double()  # the system is ill-conditioned in float32: inputs differ by orders of magnitude
        fitted = self._solve_by_rows(own, keep, near) if self.few else self._solve_by_channels(own, keep, near)
        result = torch.zeros_like(own)
        result[:, keep] = fitted.to(own.dtype)
        return (result.T if self.transposed else result).contiguous()

    @property
    def _products(self) -> Tensor:
        assert self.products is not None, "a consumer was not reached"
        return self.products

    def _solve_by_channels(self, own: Tensor, keep: Tensor, near: Tensor) -> Tensor:
        """(Σ t x_kᵀ + λ W_k) (Σ x_k x_kᵀ + λ I)⁻¹, both factors divided by the number of rows."""
        products, added = self._products[: len(keep)], self._products[len(keep) :]
        cross = (own.float() @ products).double() / self.count
        if len(added):
            cross += added.double() / self.count
        gram = products[keep].double() / self.count
        ridge = _compute_ridge(gram.diagonal(), self.count)
        gram.diagonal().add_(ridge)
        solved: Tensor = torch.linalg.solve(gram, (cross + ridge * near).T).T
        return solved

    def _solve_by_rows(self, own: Tensor, keep: Tensor, near: Tensor) -> Tensor:
        """W_k + (T − W_k X_k) (X_kᵀ X_k + λ I)⁻¹ X_kᵀ."""
        rows = torch.cat(self.rows)
        x, added = rows[:, : len(keep)], rows[:, len(keep) :]
        small = x[:, keep].double()
        missed = (x @ own.float().T).double() - small @ near.T
        if added.shape[1]:
            missed += added
        ridge = _compute_ridge(small.square().sum(0), self.count)
        outer = small @ small.T
        outer.diagonal().add_(ridge)
        correction: Tensor = torch.linalg.solve(outer, missed)
        return near + correction.T @ small


def _compute_ridge(squares: Tensor, rows: int) -> Tensor:
    """λ for inputs with these sums of squares."""
    share = min(RIDGE, OF_FEW * len(squares) / rows)
    # More than half of the inputs may always be 0, or all: the system must not become singular.
    return share * squares.median().clamp_min(1e-6 * squares.mean()).clamp_min(1e-12)


# ---- gaps ----
#
# Without a gap's blocks its input x takes the place of its result y. If x = W h + the rest, then a W' with
# W' h = W h + y − x gives y without the blocks. (ReplaceMe, Shopkhoev et al. 2025, arXiv 2505.02819, fits a square
# matrix and merges it into W.)
#
# W h must reach x only by additions, and x must reach only the gap: then nothing else changes. So a gap has no such
# layer
# 1. at the start of a model, where x is an embedding;
# 2. behind a norm of the layer's result (BERT, Gemma);
# 3. behind a mixture of experts, whose weight has a matrix for each expert.

_PASSED = frozenset({"clone", "contiguous", "dropout", "view", "reshape", "_unsafe_view", "to", "_to_copy"})
"""Calls that change no number, so a summand may go through them. (In evaluation mode dropout changes none, too.)"""
_TURNED = frozenset({"t", "transpose", "permute", "numpy_T"})
"""Calls between a matrix and a product, after which its summed dimension is the other one."""


@dataclass(frozen=True)
class Gap:
    """A run of removed blocks from ``x`` to ``y``, and the layer before it.

    ``weight``: its name; ``dim``: the dimension that it sums over; ``h``: its inputs, along their last dimension.
    """

    x: fx.Node
    y: fx.Node
    weight: str
    dim: int
    h: fx.Node


def find_gaps(analysis: Analysis, cut: Cut) -> list[Gap]:
    """The gaps of a cut that a layer can make up for, in the graph's order."""
    sites = {site.node: site for site in find_sites(analysis)}
    found = []
    for run in _split_runs(list_removed_blocks(analysis, cut)):
        x, y = run[0].input, run[-1].output
        if {node for block in run for node in block.nodes}.issuperset(x.users):
            # Nodes compare by their place in the graph. Of several layers the last one is fitted.
            before = sorted((sites[node] for node in _find_summands(x) if node in sites), key=lambda site: site.node)
            matrices = [(matrix, site.x) for site in before if (matrix := _own_matrix(analysis, site)) is not None]
            found += [Gap(x, y, weight, dim, h) for (weight, dim), h in matrices[-1:]]
    return found


def _own_matrix(analysis: Analysis, site: Site) -> tuple[str, int] | None:
    """The name and the summed dimension of a layer's weight; None unless it is one matrix that only this layer uses."""
    program, node, dim = analysis.program, site.weight, site.weight_dim
    while len(node.users) == 1 and name_base_op(node.target) in _TURNED:
        node, dim = node.all_input_nodes[0], 1 - dim
    name = program.weights.get(node.name)
    plain = site.x_dim == site.x.meta["val"].ndim - 1 and site.ends is None and not site.shared
    if name is None or not plain or len(node.users) > 1 or name in program.aliases.values():
        return None
    return (name, dim) if program.state.find_like(name).ndim == 2 else None


def _split_runs(blocks: list[Block]) -> Iterator[list[Block]]:
    """Blocks that follow each other."""
    run: list[Block] = []
    for block in blocks:
        if run and block.input is not run[-1].output:
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def _find_summands(x: fx.Node) -> Iterator[fx.Node]:
    """``x`` and the values that reach only it, by additions and by calls that keep every number."""
    waiting, like = [x], x.meta["val"]
    while waiting:
        node = waiting.pop()
        yield node
        name = name_base_op(node.target) if node.op == "call_function" else ""
        if name in _PASSED or (name == "add" and get_argument(node, "alpha", 1) == 1):
            given = [source for source in node.all_input_nodes if len(source.users) == 1]
            waiting += [source for source in given if _has_same_rows(source.meta["val"], like)]


def _has_same_rows(one: object, other: Tensor) -> bool:
    """Whether two values have the same number of rows of the same length."""
    if not isinstance(one, Tensor) or not one.ndim:
        return False
    # Sizes may be open. As text they compare without a new condition on the trace.
    return one.shape[-1] == other.shape[-1] and str(one.numel()) == str(other.numel())
