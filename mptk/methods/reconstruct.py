"""reconstruct: fit the kept columns of each consumer to the dense layer's outputs, by least squares.

This is layer-wise distillation in closed form. Take a layer that sums over pruned units, and its inputs x and outputs t
in the dense model. The kept columns k become

    W' = argmin Σ ‖t − W' x_k‖² + λ ‖W' − W‖² = (Σ t x_kᵀ + λ W) (Σ x_k x_kᵀ + λ I)⁻¹,

λ is a share (``RIDGE``) of the mean of x². This is the update of optimal brain surgeon (Hassibi & Stork 1992) for all
removed units at once, as in ZipLM (arXiv 2302.04089) and SlimGPT (arXiv 2412.18110). ``docs/maskprune.md`` says why x
comes from the dense model and not from the pruned one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mptk.ir.families import Analysis
from mptk.ir.resolved_plan import Cut
from mptk.progress import Count
from passes.transforms.insert_masks import InsertedMasks, MaskSite

RIDGE = 0.01
TOKENS = 2048
"""Tokens in a forward pass."""


@torch.no_grad()
def reconstruct(
    model: nn.Module,
    kept: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    windows: Tensor,
    progress: Count = lambda done, total: None,
) -> dict[str, Tensor]:
    """New weights for the layers that sum over pruned units.

    Args:
        model: the dense model.
        kept: weight name of a linear layer → which inputs it keeps, boolean [in].
        state: the weights in which the pruned model differs from the dense one, removed units at 0.
        windows: token ids, int64 [n, length].

    Returns:
        ``state`` with the weights of ``kept`` replaced; their removed inputs are 0.
    """
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in kept}
    sums = {name: _Sums(layers[name], keep) for name, keep in kept.items()}
    batches = windows.split(max(1, TOKENS // windows.shape[1]))
    with _hooked(layers, lambda name, x, out: sums[name].add(x, out)):
        for done, batch in enumerate(batches, 1):
            model(batch, use_cache=False)
            progress(done, len(batches))
    weights = dict(model.named_parameters())
    return {**state, **{name: found.solve(state.get(name, weights[name])) for name, found in sums.items()}}


class _Sums:
    """Σ x xᵀ over kept inputs and Σ t xᵀ of one layer."""

    def __init__(self, layer: nn.Module, keep: Tensor) -> None:
        self.layer, self.index = layer, keep.nonzero().flatten()
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0
        self.rows = 0

    def add(self, x: Tensor, out: Tensor) -> None:
        bias = getattr(self.layer, "bias", None)
        x, t = x.flatten(0, -2)[:, self.index], (out if bias is None else out - bias).flatten(0, -2)
        self.gram = self.gram + x.T @ x
        self.cross = self.cross + t.T @ x
        self.rows += len(x)

    def solve(self, weight: Tensor) -> Tensor:
        """The fitted weight, in the layout of ``weight``: [out, in], or [in, out] for Conv1D."""
        transposed = isinstance(self.layer, Conv1D)
        old = (weight.T if transposed else weight)[:, self.index].double()
        assert isinstance(self.gram, Tensor)
        assert isinstance(self.cross, Tensor)
        gram, cross = self.gram.double() / self.rows, self.cross.double() / self.rows
        ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-12)
        left = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        solved = torch.linalg.solve(left, (cross + ridge * old).T).T.to(weight.dtype)
        result = torch.zeros_like(weight.T if transposed else weight)
        result[:, self.index] = solved
        return result.T.contiguous() if transposed else result


@contextlib.contextmanager
def _hooked(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, out: see(name, args[0], out)

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def kept_units(analysis: Analysis, cut: Cut, families: Sequence[str]) -> dict[str, Tensor]:
    """What a plan keeps: family → boolean [layers, scopes, size]."""
    return {
        name: torch.stack([torch.from_numpy(cut.choices[group.axis].table) for group in analysis.family(name).groups])
        for name in families
    }


def removed_at_zero(model: nn.Module, sites: Sequence[MaskSite], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that a plan's masks multiply, with the removed units at 0."""
    values = {family: table.float() for family, table in kept.items()}
    masks = InsertedMasks(model, sites, lambda family, layer: values[family][layer])
    masks.remove()
    weights = dict(model.named_parameters())
    return {name: masks.fold(name, weights[name]) for name in masks.weights}


def reconstruct_consumers(
    model: nn.Module,
    sites: Sequence[MaskSite],
    kept: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    windows: Tensor,
    progress: Count,
) -> dict[str, Tensor]:
    """``state`` with every consumer of a cut family fitted to the dense layer's outputs (``reconstruct``).

    Args:
        sites: where the families' masks go (``find_mask_sites``).
        kept: family → kept units (``kept_units``).
    """
    inputs: dict[str, Tensor] = {}
    for site in sites:
        if site.where == "input":
            flat = torch.cat([kept[site.family][site.layer].flatten(), torch.ones(1, dtype=torch.bool)])
            name = site.weights[0][0]
            inputs[name] = inputs.get(name, torch.tensor(True)) & flat[site.index]
    return reconstruct(model, inputs, state, windows, progress)
