"""Staged execution on another device than the one that was traced on: the same numbers, and nothing goes back unasked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from second_device import DEVICE, SecondDevice, SecondTensor
from test_staged import built
from torch import Tensor

from mptk import analyze, testing, trace
from mptk.compat.torch import FakeTensorMode
from mptk.ir.resolved_plan import resolve_plan
from mptk.ir.samples import make_token_samples
from mptk.methods.criteria import score_units
from mptk.methods.distil import Schedule, distil_blocks
from mptk.methods.reconstruct import list_consumers, reconstruct_consumers
from mptk.staged.staged import Executor
from mptk.testing import draw_plan
from passes.transforms.insert_masks import find_mask_sites
from passes.transforms.masked_reference import mask
from passes.transforms.rewrite import rewrite_program

THERE = Executor(stage=12_000, device=DEVICE)


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["decoder", "sliding windows", "mixture", "encoder and decoder", "images"])
@torch.no_grad()
def test_dense_masked_and_cut_programs_run_there(name: str) -> None:
    program, inputs = built(name)
    analysis = analyze(program)
    plan = draw_plan(analysis)
    programs = [program, mask(analysis, resolve_plan(analysis, plan)), rewrite_program(analysis, plan)]
    with SecondDevice() as mode:
        found = list(THERE.run_programs(programs, inputs))
    assert all(isinstance(result, SecondTensor) for result in found)
    assert not [shape for where, shape in mode.crossed if where == "to the host" and shape]
    for result, expected in zip(found, [run(*given) for given in inputs for run in programs], strict=True):
        torch.testing.assert_close(result.held, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["wanda", "flap", "taylor"])
@pytest.mark.parametrize("model", ["decoder", "mixture"])
def test_scores_are_made_there(name: str, model: str) -> None:
    analysis, windows = analyze(built(model)[0]), testing.draw_tokens(5, 9)
    families = ["q_heads"]
    expected = score_units(analysis, name, windows, families=families)
    with SecondDevice():
        found = score_units(analysis, name, windows, families=families, executor=THERE)
    close(found, expected)


@torch.no_grad()
def test_consumers_are_fitted_and_blocks_are_distilled_there() -> None:
    model, windows = testing.make_decoder("llama"), testing.draw_tokens(20, 9)
    analysis = analyze(trace(model, dynamic=True))
    cut, sites = resolve_plan(analysis, draw_plan(analysis, ["ffn"])), find_mask_sites(analysis, model, ["ffn"])
    expected = dict(reconstruct_consumers(analysis, sites, cut, {}, make_token_samples(windows)))
    with SecondDevice():
        fitted = reconstruct_consumers(analysis, sites, cut, {}, make_token_samples(windows), executor=THERE)
        found = {name: fitted[name].to("cpu") for name in fitted}
    close(found, expected)
    arguments = (analysis, cut, list_consumers(sites), expected, make_token_samples(windows))
    here = distil_blocks(*arguments, Schedule(epochs=1, rate=1e-3))
    with SecondDevice():
        there = distil_blocks(*arguments, Schedule(epochs=1, rate=1e-3), executor=THERE)
    torch.testing.assert_close(torch.tensor(there.errors), torch.tensor(here.errors), rtol=1e-4, atol=0)
    assert not [name for name, weight in there.weights.items() if isinstance(weight, SecondTensor)]


@pytest.mark.parametrize("name", ["decoder", "mixture", "images"])
def test_a_program_runs_on_a_gpu_that_does_not_exist(name: str) -> None:
    """On fake CUDA tensors, which refuse to meet tensors of the CPU."""
    program, inputs = built(name)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        fake = replace(
            program, state=program.state.with_entries({n: mode.from_tensor(t) for n, t in program.state.items()})
        )
        batches = [tuple(mode.from_tensor(t) for t in given) for given in inputs]
        found = list(replace(THERE, device=torch.device("cuda", 0)).run_programs([fake], batches))
    assert all(result.device.type == "cuda" for result in found)
    assert [result.shape for result in found] == [program(*given).shape for given in inputs]
