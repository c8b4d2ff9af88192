"""A criterion with a measurement of its own: the peaks of activations. `mptk prune MODEL --method peak` uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from mptk.ir.families import Variable
from mptk.methods.criteria.base import Criterion, Scores, sum_uses
from mptk.methods.criteria.observe import Calibration, Site, compute_weight, watch


def measure(given: Calibration) -> dict[Site, Tensor]:
    """Each contraction with a weight that scores units → |W_ij| · max |x_j|, over all positions of the text."""
    peaks: dict[Site, Tensor] = {}

    def see(site: Site, x: Tensor) -> None:
        peak = x.abs().movedim(site.x_dim, -1).flatten(0, -2).amax(0)
        peaks[site] = peak if site not in peaks else torch.maximum(peaks[site], peak)

    share = watch(given, [((site.x,), partial(see, site)) for site in given.sites])
    found = {}
    for site, peak in peaks.items():
        weight = compute_weight(given.analysis.program, site.weight).abs()
        whole = torch.stack(share.gather(peak)).amax(0)  # of all processes of the run
        found[site] = weight * whole.view([-1 if d == site.weight_dim else 1 for d in range(weight.ndim)])
    return found


def score(importance: Mapping[Site, Tensor], variables: Sequence[Variable]) -> Scores:
    """s_u = Σ_{j in unit u} Σ_i |W_ij| · max |x_j|."""
    return sum_uses(importance, variables, lambda each: each)


PEAK = Criterion("peak", "|weight| × largest input, summed over a unit's consumers", measure, score)
