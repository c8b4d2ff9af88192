"""Regions under ``autocast`` or ``enable_grad`` are part of the graph: same numbers, same families, same places."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from made_modules import Made
from torch import Tensor, nn

from mptk import analyze, trace
from mptk.errors import AnalysisError, TraceError
from mptk.ir import SourceLocation
from mptk.testing import cut_and_compare, draw_plan, expect_error, measure_largest

X = torch.randn(2, 5, 6)
INNER = 8


class Region(nn.Module):
    """A layer under ``mode``; a router in float32 as mixtures of experts have, constants and a write in place."""

    def __init__(self, mode: Callable[[], AbstractContextManager[object]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mode = mode
        self.up, self.gate, self.down = nn.Linear(6, INNER), nn.Linear(6, INNER), nn.Linear(INNER, 11)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        with self.mode():
            gate = self.gate(x.float()) * torch.tensor([0.5])
            gate *= 2
            a, b = self.down(h * gate).split((4, 7), -1)
        return torch.cat((b, a), -1)


def off() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


class Nested:
    """Autocast on, and at once off for ``device``."""

    def __init__(self, device: str = "cpu") -> None:
        self.modes = [torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast(device, enabled=False)]

    def __enter__(self) -> None:
        for mode in self.modes:
            mode.__enter__()

    def __exit__(self, *error: object) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)


MODES = {"off": off, "gradients": torch.enable_grad, "nested": Nested}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_region_computes_what_the_module_does_and_can_be_cut(mode, dynamic):
    module = Region(mode).eval()
    program = trace(module, (X,), dynamic=dynamic)
    assert not [n for n in program.graph.graph.nodes if "higher_order" in str(n.target)]
    with torch.no_grad():
        assert measure_largest(program(X), module(X)) == 0
        assert measure_largest(program.to_exported().module()(X), module(X)) == 0
    found = analyze(program)
    assert [f.size for f in found.families] == [INNER]
    difference = cut_and_compare(found, draw_plan(found), (X,))
    assert difference.error < 1e-5 < 1e-3 < difference.moved


def test_a_regions_calls_keep_their_module_and_line():
    nodes = trace(Region(off), (X,)).graph.graph.nodes
    places = [str(SourceLocation(n)) for n in nodes if "linear" in str(n.target)]
    assert [p.rsplit(":", 1)[0] for p in places] == [
        f"aten.linear.default in {name}, test_inline.py" for name in ("up", "gate", "down")
    ]


def test_a_regions_result_may_be_the_output():
    def forward(m: Made, x: Tensor) -> Tensor:
        with off():
            return m.layer(x)

    module = Made(forward, layer=nn.Linear(6, 4))
    program = trace(module, (X,))
    assert measure_largest(program.to_exported().module()(X), module(X)) == 0
    assert analyze(program).families == ()


@pytest.mark.parametrize("mode", [lambda: torch.autocast("cpu", dtype=torch.bfloat16), lambda: Nested("cuda")])
def test_autocast_that_is_on_or_off_for_another_device_is_refused_by_name(mode):
    with expect_error(TraceError) as refused:
        trace(Region(mode), (X,))
    assert refused.value.name.startswith("aten.to.dtype in the model, test_inline.py:")


def test_control_flow_that_depends_on_values_is_refused_by_name():
    def forward(m: Made, x: Tensor) -> Tensor:
        h = m.layer(x)
        with off():
            return torch.cond(h.sum() > 0, lambda y: y + 1, lambda y: y - 1, (h,))

    module = Made(forward, layer=nn.Linear(6, 4))
    program = trace(module, (X,))
    assert measure_largest(program(X), module(X)) == 0
    with expect_error(AnalysisError) as refused:
        analyze(program)
    assert "cond" in refused.value.name
