"""A run that computes in bfloat16 on request: near to float32, and nothing that is proven runs that way."""

from __future__ import annotations

import platform
from dataclasses import replace

import pytest
import torch

from mptk import Plan, Report, Settings, prune
from mptk.compat.accelerate import separate_state
from mptk.config import Learning
from mptk.distributed.processes import make_accelerator, prepare_training
from mptk.errors import ModelError
from mptk.ir import Samples
from mptk.methods.maskprune.train import run_module
from mptk.run.minutes import fill_in
from mptk.tasks.module import Module
from mptk.testing import expect_error


def share_kept(one: Plan, other: Plan) -> float:
    """The least share of a layer's units that both plans keep."""
    return min(
        len(set(a) & set(b)) / len(a)
        for name, family in one.families.items()
        for layer, rows in family.keep.items()
        for a, b in zip(rows, other.families[name].keep[layer], strict=True)
    )


def test_a_run_keeps_nearly_the_same_units_and_is_proven(laboratory, tmp_path):
    exact = laboratory.prune("decoder", tmp_path / "exact", reconstruct=True)
    plan, report = Plan.load(exact / "plan.json"), Report.read(exact)
    how = {"compute_dtype": "bfloat16", "families": tuple(plan.families), "widths": dict(plan.widths)}
    out = laboratory.prune("decoder", tmp_path / "out", reconstruct=True, **how)
    found = Report.read(out)
    assert share_kept(plan, Plan.load(out / "plan.json")) >= 0.9
    assert found.weights_sha256 != report.weights_sha256  # what was fitted
    assert found.quality["dense"] == report.quality["dense"]
    assert all(row["ok"] and row["tolerance"] <= 1e-4 for row in found.proof)


def test_training_takes_the_type_too_unless_a_precision_is_given():
    settings = Settings(compute_dtype="bfloat16", learning=Learning(steps=4))
    assert fill_in(settings).learning.precision == "bf16"
    assert fill_in(replace(settings, learning=Learning(precision="fp16"))).learning.precision == "fp16"
    assert fill_in(replace(settings, compute_dtype="float32")).learning.precision == "no"


def test_a_module_that_is_trained_gives_what_it_computed():
    """accelerate would make its logits float32, and their gradient bfloat16 again."""
    with separate_state("cpu"):
        net = torch.nn.Linear(4, 4)
        trained, _ = prepare_training(make_accelerator("bf16"), net, torch.optim.SGD(net.parameters()))
        output = trained(torch.ones(2, 4))
        assert output.dtype == torch.bfloat16
        output.sum().backward()
    assert net.weight.grad.dtype == torch.float32


class Deberta(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = x @ x.T
        return scores.masked_fill(scores > 0, torch.finfo(x.dtype).min)


def test_code_that_does_not_run_in_half_precision_is_named():
    x = Samples({"x": torch.ones(2, 2)})
    task = Module(x)
    assert run_module(task, Deberta(), x)[0].shape == (2, 2)
    with torch.autocast("cpu", torch.bfloat16), expect_error(ModelError, name="Deberta"):
        run_module(task, Deberta(), x)


FREED = """
from resource import RUSAGE_SELF, getrusage
import torch
from mptk.compat.glibc import retain_memory

def count_faults():
    torch.ones(1 << 24)
    before = getrusage(RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(1 << 24)
    return getrusage(RUSAGE_SELF).ru_minflt - before

with retain_memory():
    print(count_faults())
print(count_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_freed_memory_is_used_again(fresh):
    """Memory that comes from the system has a page fault for each 4 KB, or for each 2 MB. A tensor has 64 MB."""
    done = fresh.run(FREED)
    assert done.code == 0, done.err
    inside, afterwards = map(int, done.out.split())
    assert inside < 32 < afterwards


class Float(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


def test_a_pruned_module_runs_in_an_autocast():
    """The trace notes the type that a conversion starts from, which an autocast changes."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 12), Float(), torch.nn.Linear(12, 4))
    x = torch.randn(3, 8)
    small = prune(net, example_inputs=x, method="magnitude", sparsity=0.25, align=1, progress=None).model
    with torch.autocast("cpu", torch.bfloat16):
        assert small(x).shape == (3, 4)
