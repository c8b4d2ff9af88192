"""Muon for the matrices of a model, AdamW for its other parameters."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest
import torch
from inside import Stopped
from learning_runs import ENVIRONMENT, LEARNING, SETTINGS, TRAINING, metrics, require_same_bits, shard, stop_at
from torch import nn

import mptk
from mptk import testing
from mptk.config import Training
from mptk.methods.maskprune import train
from mptk.methods.maskprune.train import Muon, find_matrices, make_optimizer

TRAINED = replace(LEARNING, steps=6, rank=0, training=replace(TRAINING, lr=1e-4, optimizer="muon"))
MUON = replace(SETTINGS, method="wanda", eval_windows=1, learning=TRAINED)
MUON_COMMAND = [
    *("prune", "--method", "wanda", "--sparsity", "0.35", "--samples", "8", "--length", "32", "--align", "8"),
    *("--eval-windows", "1", "--no-onnx", "--steps", "6", "--rank", "0", "--batch", "4", "--micro", "2"),
    *("--save-every", "2", "--optimizer", "muon", "--lr", "1e-4"),
]
"""The same, for the command line."""
TABLES = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "wpe.weight")


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)])
def test_an_orthogonal_matrix_keeps_the_directions_and_makes_all_about_as_large(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    seen = left.T @ train.make_orthogonal(matrix) @ right.T
    assert (seen.diagonal() - 0.95).abs().max() < 0.35
    assert (seen - seen.diagonal().diag()).abs().max() < 0.02


def test_its_steps_are_those_of_torch():
    start = torch.linspace(-1, 1, 24).reshape(4, 6)
    own, other = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    both = Muon([own], [], 0.1), torch.optim.Muon([other], 0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        own.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        other.grad = own.grad.clone()
        for each in both:
            each.step()
    assert (own - other).abs().max() < 0.003
    assert (own - start).abs().max() > 0.03


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_the_graph_of_a_model_has_the_matrices_of_the_model_and_no_table_is_one(architecture):
    model = testing.make_decoder(architecture)
    flat = {name for name, p in model.named_parameters() if p.ndim == 2}
    tables = {name for name in flat if name.endswith(TABLES)}
    assert len(tables) == 2
    graph = mptk.analyze(model, testing.draw_tokens()).program.module()
    for each in (model, graph):
        chosen = {id(p) for p in find_matrices(each)}
        assert {name for name, p in each.named_parameters() if id(p) in chosen} == flat - tables


def test_the_rest_is_trained_by_adamw_and_each_has_its_rate():
    model, twin = testing.make_decoder("llama"), testing.make_decoder("llama")
    model.model.norm.weight.requires_grad_(False)
    muon = make_optimizer(model, Training(lr=1e-3, optimizer="muon"))
    assert [group["peak"] for group in muon.param_groups] == [train.MUON_RATE * 1e-3, 1e-3]
    taken = [p for group in muon.param_groups for p in group["params"]]
    assert {id(p) for p in taken} == {id(p) for p in model.parameters() if p.requires_grad}
    both = muon, make_optimizer(twin, Training(lr=1e-3))
    for each, optimizer in zip((model, twin), both, strict=True):
        each(testing.draw_tokens()).logits.square().mean().backward()
        optimizer.step()
    rest = {id(p) for p in muon.param_groups[1]["params"]}
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6) == (id(one) in rest), name


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    """An unbroken run."""
    out = tmp_path_factory.mktemp("muon") / "out"
    mptk.prune(llama, out, MUON)
    return out


def test_a_run_stopped_in_recovery_ends_with_the_same_bits(llama, whole, tmp_path):
    broken = tmp_path / "broken"
    with pytest.raises(Stopped):
        mptk.prune(llama, broken, MUON, progress=stop_at("recovery", 3))
    assert metrics(tmp_path / "broken.run")[-1]["phase"] == "recovery"
    mptk.prune(llama, broken, replace(MUON, resume=True))
    require_same_bits(whole, broken)
    first, *_, last = mptk.Report.read(whole).recovery["losses"].values()
    assert last < first


def test_a_graph_is_trained_too(llama, tmp_path):
    report = mptk.prune(llama, tmp_path / "out", replace(MUON, target="graph")).report
    first, *_, last = report.recovery["losses"].values()
    assert last < first
    assert all(stage["ok"] for stage in report.proof)


def test_processes_with_shards_train_alike(llama, whole, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(shard(llama, out, MUON_COMMAND), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["loss"] for row in metrics(out)] == pytest.approx([row["loss"] for row in metrics(whole)], rel=1e-3)


def test_adapters_are_trained_by_adamw():
    learning = replace(LEARNING, rank=None, training=Training(optimizer="muon"))
    assert learning.of_masks(0.2).training.optimizer == "adamw"
    assert learning.of_recovery(frozen=True, size=0.2).training.optimizer == "adamw"
    assert learning.of_recovery(frozen=False, size=0.2).training.optimizer == "muon"
    counts = [train.count_product_tokens(each, hidden=100) for each in (learning, replace(learning, rank=4))]
    assert counts[0] > counts[1] == 0
