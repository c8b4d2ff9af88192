"""Layers whose weight is computed at each call, by torch's own utilities: what is cut equals what is masked."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from made_modules import Made
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import mptk
from mptk import analyze, trace
from mptk.ir import resolve_plan
from mptk.testing import cut_and_compare, draw_plan, measure_largest

X = torch.randn(2, 5, 6)
INNER = 8


def make(wrap: Callable[[nn.Module], nn.Module], kernel: int = 0) -> Made:
    """Two layers, each wrapped."""
    layers = [nn.Linear(6, INNER), nn.Linear(INNER, 11)]
    if kernel:
        layers = [nn.Conv1d(6, INNER, kernel), nn.Conv1d(INNER, 11, 1)]
    up, down = map(wrap, layers)
    return Made(lambda m, x: m.down(m.up(x.mT if kernel else x).relu()), up=up, down=down)


def old(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def quietly(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return wrap(layer)

    return quietly


WRAPPERS = {
    "weight_norm": (parametrizations.weight_norm, [INNER]),
    "weight_norm of columns": (lambda layer: parametrizations.weight_norm(layer, dim=1), [INNER]),
    "weight_norm of all": (lambda layer: parametrizations.weight_norm(layer, dim=None), [INNER]),
    "old weight_norm": (old(weight_norm), [INNER]),
    "spectral_norm": (parametrizations.spectral_norm, [INNER]),
    "old spectral_norm": (old(spectral_norm), [INNER]),
    "orthogonal": (parametrizations.orthogonal, []),
}


@pytest.mark.parametrize("kernel", [0, 3])
@pytest.mark.parametrize(("wrap", "sizes"), WRAPPERS.values(), ids=WRAPPERS)
def test_a_computed_weight_is_cut_as_it_is_masked(wrap, sizes, kernel):
    module = make(wrap, kernel).eval()
    program = trace(module, (X,))
    with torch.no_grad():
        assert measure_largest(program(X), module(X)) < 1e-6
    found = analyze(program)
    assert [f.size for f in found.families] == sizes
    if sizes:
        difference = cut_and_compare(found, draw_plan(found), (X,))
        assert difference.moved > 1e-3
        assert difference.error < 1e-6 * max(10, difference.moved)


def test_a_cut_weight_norm_is_that_of_a_smaller_module():
    """Independent of what the masked program says: rows of v and g, columns of the next layer's v."""
    module = make(parametrizations.weight_norm).eval()
    found = analyze(trace(module, (X,)))
    plan = draw_plan(found)
    (choice,) = resolve_plan(found, plan).choices.values()
    kept = torch.from_numpy(choice.table[0]).nonzero().flatten()
    small = copy.deepcopy(module)
    g, v = small.up.parametrizations.weight.original0, small.up.parametrizations.weight.original1  # type: ignore[union-attr, attr-defined]
    g.data, v.data, small.up.bias.data = g.data[kept], v.data[kept], small.up.bias.data[kept]  # type: ignore[operator, union-attr]
    v = small.down.parametrizations.weight.original1  # type: ignore[union-attr, attr-defined]
    v.data = v.data[:, kept]
    with torch.no_grad():
        assert measure_largest(small(X), mptk.rewrite(found, plan)(X)) < 1e-6
