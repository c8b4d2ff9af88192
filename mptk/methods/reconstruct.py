"""reconstruct: fit the kept columns of each consumer to the dense layer's outputs, by least squares.

This is layer-wise distillation in closed form. Take a layer that sums over pruned units, and its inputs x and outputs
t = W x in the dense model. The kept columns k become

    W' = argmin Σ ‖t − W' x_k‖² + λ ‖W' − W_k‖² = (Σ t x_kᵀ + λ W_k) (Σ x_k x_kᵀ + λ I)⁻¹,

λ is a share (``RIDGE``) of the mean over channels of Σ x_k². With fewer rows than kept channels the same W'
comes from a system in the rows (Woodbury): W' = W_k + (T − W_k X_k) (X_kᵀ X_k + λ I)⁻¹ X_kᵀ.

This is the update of optimal brain surgeon (Hassibi & Stork 1992) for all removed units at once, as in ZipLM (arXiv
2302.04089) and SlimGPT (arXiv 2412.18110). ``docs/maskprune.md`` says why x comes from the dense model and not from the
pruned one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, fx

from mptk.config.settings import Settings
from mptk.cost.estimate import Pass, Sizes
from mptk.distributed.sharing import Sharing, sharing
from mptk.ir.families import Analysis
from mptk.ir.program import Program
from mptk.ir.resolved_plan import Cut
from mptk.ir.samples import Samples
from mptk.ir.weights import Lazy, Weights
from mptk.methods.criteria.observe import OBSERVED_TOKENS, batches, find_sites
from mptk.progress import Count
from mptk.staged.spool import Spool
from mptk.staged.staged import EXECUTOR, Executor
from passes.transforms.insert_masks import MaskSite

RIDGE = 0.01


def work(settings: Settings, sizes: Sizes, kept: float) -> dict[str, Pass]:
    """The cost of ``reconstruct_consumers``."""
    s = settings
    return {"reconstruct": Pass(s.samples * s.length, s.length, flops=sizes.fit)} if s.reconstruct else {}


def reconstruct_consumers(
    analysis: Analysis,
    sites: Sequence[MaskSite],
    kept: Mapping[str, Tensor],
    changes: Mapping[str, Tensor],
    samples: Samples,
    progress: Count | None = None,
    executor: Executor = EXECUTOR,
) -> Weights:
    """Fit every consumer of a cut family to the dense layer's outputs.

    Args:
        analysis: of the dense model.
        sites: where the families' masks go (``find_mask_sites``).
        kept: family → kept units (``kept_units``).
        changes: the weights in which the pruned model differs from the dense one.
        samples: the model's inputs. executor: runs the dense program; values that exceed its memory go to files.

    Returns:
        ``changes`` with the fitted weights in dense shapes; their removed inputs are 0.
    """
    dense, changed = analysis.program, analysis.program.with_state(changes)
    shelf = Spool(executor.borders)
    fits = {
        name: _Fit(keep, transposed=dim == 0, few=len(samples) * samples.positions < int(keep.sum()))
        for name, keep, dim in _kept_inputs(sites, kept)
    }
    found: dict[str, Tensor] = {}

    def solve(name: str, fit: _Fit) -> None:
        found[name] = dense.state.like(name)
        shelf.add(name, fit.solved(dense.state[name], changed.state[name]))

    _observe(analysis, fits, samples, solve, progress, executor)
    return Weights(changes).updated(shelf.weights(found))


@dataclass(frozen=True)
class Products:
    """Σ x xᵀ of each consumer's inputs in the dense model; ``fitted`` solves with it for any choice of units.

    ``sums``: weight → float32 [in, in]. ``counts``: weight → rows of x.
    """

    program: Program
    sites: Sequence[MaskSite]
    sums: Weights
    counts: Mapping[str, int]

    def fitted(self, kept: Mapping[str, Tensor]) -> Weights:
        """The consumers of the families in ``kept``, fitted as in ``reconstruct_consumers``, each on demand.

        ``kept``: family → kept units (``kept_units``).
        """
        sites, state = [site for site in self.sites if site.family in kept], self.program.state
        return Weights(
            {
                name: Lazy(state.like(name).to("meta"), partial(self._solved, name, keep, dim))
                for name, keep, dim in _kept_inputs(sites, kept)
                if name in self.sums
            }
        )

    def _solved(self, name: str, keep: Tensor, dim: int) -> Tensor:
        dense, products = self.program.state[name], self.sums[name]
        fit = _Fit(keep, dim == 0, few=False, products=products[:, keep.to(products.device)], count=self.counts[name])
        return fit.solved(dense, dense).cpu()


def emptied(program: Program, sites: Sequence[MaskSite], kept: Mapping[str, Tensor]) -> Weights:
    """The consumers of the families in ``kept`` with zeros for removed units, each on demand."""
    state, own = program.state, [site for site in sites if site.family in kept]

    def made(name: str, keep: Tensor, dim: int) -> Tensor:
        return state[name] * (keep if dim else keep[:, None])

    return Weights(
        {n: Lazy(state.like(n).to("meta"), partial(made, n, keep, dim)) for n, keep, dim in _kept_inputs(own, kept)}
    )


def gather_products(
    analysis: Analysis,
    sites: Sequence[MaskSite],
    samples: Samples,
    progress: Count | None = None,
    executor: Executor = EXECUTOR,
) -> Products:
    """Run the dense model once on ``samples`` and keep the sums that fit the consumers of ``sites`` to any cut."""
    state, shelf = analysis.program.state, Spool(executor.borders)
    fits, counts, likes = dict[str, _Fit](), dict[str, int](), dict[str, Tensor]()
    for name, dim in (site.weights[0] for site in sites if site.where == "input"):
        assert dim is not None
        fits[name] = _Fit(torch.ones(state.like(name).shape[dim], dtype=torch.bool), transposed=False, few=False)

    def keep(name: str, fit: _Fit) -> None:
        assert fit.products is not None
        counts[name], likes[name] = fit.count, fit.products.to("meta")
        shelf.add(name, fit.products)

    _observe(analysis, fits, samples, keep, progress, executor)
    return Products(analysis.program, sites, shelf.weights(likes), counts)


def _observe(
    analysis: Analysis,
    fits: dict[str, _Fit],
    samples: Samples,
    done: Callable[[str, _Fit], None],
    progress: Count | None,
    executor: Executor,
) -> None:
    """Show each of ``fits`` its layer's inputs, then call ``done`` with it and drop it."""
    dense = analysis.program
    layers = [(site, name) for site in find_sites(analysis) if (name := stored(dense, site.weight)) in fits]
    given = batches(dense, samples, OBSERVED_TOKENS)
    share = Sharing() if any(fit.few for fit in fits.values()) else sharing(len(given))
    own = share.own(given)
    left = {name: len(own) * sum(other == name for _, other in layers) for name in fits}

    def see(name: str, x_dim: int, x: Tensor) -> None:
        fits[name].add(x.movedim(x_dim, -1))
        left[name] -= 1
        if not left[name]:  # the layer has seen all inputs, and its stage is about to end
            fits[name].combine(share)
            done(name, fits.pop(name))

    watches = [((site.x,), partial(see, name, site.x_dim)) for site, name in layers]
    executor.watch(dense, [batch.tensors for batch in own], watches, progress)


def consumers(sites: Sequence[MaskSite]) -> set[str]:
    """The names of the weights that sum over the units of these sites' families."""
    return {site.weights[0][0] for site in sites if site.where == "input"}


def _kept_inputs(sites: Sequence[MaskSite], kept: Mapping[str, Tensor]) -> list[tuple[str, Tensor, int]]:
    """Each consumer: weight name, kept inputs (boolean [in]), and their dimension in the weight."""
    found: dict[str, tuple[Tensor, int]] = {}
    for site in sites:
        if site.where == "input":
            flat = torch.cat([kept[site.family][site.layer].flatten(), torch.ones(1, dtype=torch.bool)])
            (name, dim), *_ = site.weights
            assert dim is not None
            before, _ = found.get(name, (torch.tensor(True), dim))
            found[name] = (before & flat[site.index], dim)
    return [(name, keep, dim) for name, (keep, dim) in found.items()]


def stored(program: Program, node: fx.Node) -> str:
    """The name of the weight behind a contraction's operand."""
    while node.op != "placeholder":
        node = node.all_input_nodes[0]
    return program.weights[node.name]


@dataclass
class _Fit:
    """The inputs of one layer: their rows, if there are fewer rows than kept channels, or their products.

    ``keep``: kept inputs, boolean [in]. ``transposed``: the weight is [in, out].
    """

    keep: Tensor
    transposed: bool
    few: bool
    rows: list[Tensor] = field(default_factory=list)
    products: Tensor | None = None
    count: int = 0

    def add(self, x: Tensor) -> None:
        """Add rows of the layer's inputs, [..., in]."""
        x = x.flatten(0, -2).float()
        self.count += len(x)
        if self.few:
            self.rows.append(x)
        else:
            found = x.T @ x[:, self.keep.to(x.device)]
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
        fitted = self._by_rows(own, keep, near) if self.few else self._by_channels(own, keep, near)
        result = torch.zeros_like(own)
        result[:, keep] = fitted.to(own.dtype)
        return (result.T if self.transposed else result).contiguous()

    @property
    def _products(self) -> Tensor:
        assert self.products is not None, "a consumer was not reached"
        return self.products

    def _by_channels(self, own: Tensor, keep: Tensor, near: Tensor) -> Tensor:
        cross = (own.float() @ self._products).double() / self.count
        gram = self._products[keep].double() / self.count
        ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-12)
        gram.diagonal().add_(ridge)
        solved: Tensor = torch.linalg.solve(gram, (cross + ridge * near).T).T
        return solved

    def _by_rows(self, own: Tensor, keep: Tensor, near: Tensor) -> Tensor:
        x = torch.cat(self.rows)
        small = x[:, keep].double()
        missed = (x @ own.float().T).double() - small @ near.T
        ridge = RIDGE * (small.square().sum() / small.shape[1]).clamp_min(1e-12 * self.count)
        outer = small @ small.T
        outer.diagonal().add_(ridge)
        correction: Tensor = torch.linalg.solve(outer, missed)
        return near + correction.T @ small


def kept_units(analysis: Analysis, cut: Cut, families: Sequence[str]) -> dict[str, Tensor]:
    """The units that a plan keeps: family → boolean [layers, scopes, size]."""
    return {
        name: torch.stack([torch.from_numpy(cut.choices[group.axis].table) for group in analysis.family(name).groups])
        for name in families
    }
