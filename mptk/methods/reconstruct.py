"""reconstruct: fit the kept columns of each consumer to the dense layer's outputs, by least squares.

This is layer-wise distillation in closed form. Take a layer that sums over pruned units, and its inputs x and outputs
t = W x in the dense model. The kept columns k become

    W' = argmin Σ ‖t − W' x_k‖² + λ ‖W' − W_k‖² = (Σ t x_kᵀ + λ W_k) (Σ x_k x_kᵀ + λ I)⁻¹,

λ is a share (``_compute_ridge``) of the median over channels of Σ x_k². With fewer rows than kept channels the same
W' comes from a system in the rows (Woodbury): W' = W_k + (T − W_k X_k) (X_kᵀ X_k + λ I)⁻¹ X_kᵀ.

If blocks are removed, the layer before each gap (``gaps``) also makes up for what they add to the residual stream:
t = W h + y − x.

This is the update of optimal brain surgeon (Hassibi & Stork 1992) for all removed units at once, as in ZipLM (arXiv
2302.04089) and SlimGPT (arXiv 2412.18110). ``docs/maskprune.md`` says why x comes from the dense model and not from the
pruned one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, fx

from mptk.config.settings import Settings
from mptk.cost.estimate import ModelSizes, Pass
from mptk.distributed.processes import Sharing, share_batches
from mptk.ir.families import Analysis
from mptk.ir.program import Program
from mptk.ir.resolved_plan import Cut, build_renumbering
from mptk.ir.samples import Samples
from mptk.ir.weights import Lazy, Weights
from mptk.methods.criteria.observe import OBSERVED_TOKENS, find_sites, split_batches
from mptk.methods.gaps import Gap, find_gaps
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

    def solve(name: str, fit: _Fit) -> None:
        shelf.add(name, fit.solved(dense.state[name], changed.state[name]).cpu())

    fits = {name: layer.fit(few=rows < int(layer.keep.sum())) for name, layer in layers.items()}
    _observe(analysis, layers, fits, samples, solve, progress, executor)
    return Weights(changes).with_entries(shelf.weights)


@dataclass(frozen=True)
class Products:
    """The sums that fit layers to any of some cuts: ``fitted`` solves with them.

    ``sums``: layer (``_Layer.key``) → Σ x xᵀ of its inputs in the dense model, and below it Σ (y − x) xᵀ of its gap,
    float32 [in (+ out), in]. ``counts``: layer → rows of x.
    """

    analysis: Analysis
    sites: Sequence[MaskSite]
    sums: Weights
    counts: Mapping[str, int]

    def fitted(self, cut: Cut) -> Weights:
        """The layers of a cut, fitted as in ``reconstruct_consumers``, each on demand."""
        state, layers = self.analysis.program.state, _find_layers(self.analysis, self.sites, cut)
        return Weights({a.weight: Lazy(state.like(a.weight).to("meta"), partial(self._solve_layer, a)) for a in layers})

    def _solve_layer(self, layer: _Layer) -> Tensor:
        dense, products, fit = self.analysis.program.state[layer.weight], self.sums[layer.key], layer.fit()
        fit.products, fit.count = products[:, layer.keep.to(products.device)], self.counts[layer.key]
        return fit.solved(dense, dense).cpu()


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
    share = Sharing() if any(fit.few for fit in fits.values()) else share_batches(len(given))
    own = share.own(given)
    left = {key: len(own) * len(found) for key, found in uses.items()}

    def see(key: str, x_dim: int, x: Tensor, *ends: Tensor) -> None:
        fits[key].add(x.movedim(x_dim, -1), *ends)
        left[key] -= 1
        if not left[key]:  # the layer has seen all inputs, and its stage is about to end
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
        """A name for what is observed to fit it."""
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
    found, stays = dict[str, _Layer](), build_renumbering(analysis, cut).new
    for site in sites:
        name, dim = site.weights[0] if site.weights else ("", None)
        group = analysis.variable(site.family).groups[site.layer]
        if site.where == "input" and group.axis in cut.choices and stays(name) is not None:
            assert dim is not None
            units = torch.from_numpy(cut.choices[group.axis].table).flatten()
            keep = torch.cat([units, torch.ones(1, dtype=torch.bool)])[site.index]
            found[name] = _Layer(name, found[name].keep & keep if name in found else keep, dim)
    for gap in find_gaps(analysis, cut):
        size = analysis.program.state.like(gap.weight).shape[gap.dim]
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
        """Add rows of the layer's inputs, [..., in], and of what enters and leaves its gap."""
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
            self.products = share.total(self._products)
            self.count = int(share.total(torch.tensor(float(self.count), device=self._products.device)))

    def solved(self, dense: Tensor, changed: Tensor) -> Tensor:
        """The fitted weight, in ``dense``'s layout and type. ``changed``: the weight that the ridge pulls towards."""
        device = self.rows[0].device if self.few else self._products.device
        own, old = (w.to(device).T if self.transposed else w.to(device) for w in (dense, changed))
        keep = self.keep.to(device)
        near = old[:, keep].double()
        fitted = self._solve_by_rows(own, keep, near) if self.few else self._solve_by_channels(own, keep, near)
        result = torch.zeros_like(own)
        result[:, keep] = fitted.to(own.dtype)
        return (result.T if self.transposed else result).contiguous()

    @property
    def _products(self) -> Tensor:
        assert self.products is not None, "a consumer was not reached"
        return self.products

    def _solve_by_channels(self, own: Tensor, keep: Tensor, near: Tensor) -> Tensor:
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
    """λ for inputs with these sums of squares, of which more than half may be 0."""
    share = min(RIDGE, OF_FEW * len(squares) / rows)
    return share * squares.median().clamp_min(1e-6 * squares.mean()).clamp_min(1e-12)
