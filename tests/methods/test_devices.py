"""Training on another device than the host's, which ``second_device`` stands for: where tensors are, and what crosses.

It reaches for mptk.methods.maskprune: the second device is no device for a command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from inside import Stopped
from lab import legalise_bare
from learning_runs import LEARNING as LONG
from learning_runs import SETTINGS, TRAINING, metrics, stop_at
from second_device import DEVICE, SecondDevice, SecondTensor, live_bytes
from torch import Tensor
from toy_checkpoints import llama_config
from transformers import LlamaForCausalLM

from mptk import analyze, testing, trace
from mptk.compat.accelerate import separate_state
from mptk.config import Learning
from mptk.distributed.processes import make_replica
from mptk.io import models
from mptk.ir import make_token_samples
from mptk.methods.maskprune.learner import Learner, collect_changed_weights, start_training
from mptk.methods.maskprune.solver import Solver
from mptk.progress import Progress, show_nothing
from mptk.protocols import Analysed, Chosen, Prepared, RunFolder, SampleSets
from mptk.tasks import CAUSAL_LM
from mptk.testing import save_word_model
from passes.targets.stock.config import StockConfig

TEXT = make_token_samples(testing.draw_tokens(8, 32))
LEARNING = replace(LONG, steps=4, training=replace(TRAINING, save_every=3))
ADAPTED = 7
"""Layers with an adapter: those of one block."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    model = LlamaForCausalLM(llama_config(num_hidden_layers=1))
    loaded = models.load(save_word_model(model, tmp_path_factory.mktemp("llama")))
    asked = replace(SETTINGS, keep=("hidden",), compute_dtype="float32")
    return legalise_bare(Analysed(loaded, CAUSAL_LM, analyze(trace(loaded.model, dynamic=True))), asked)


class Second(Accelerator):
    device = DEVICE


@dataclass(frozen=True)
class Run:
    """What the phases gave: masks' choice, recovery's weights, and each step's metrics."""

    chosen: Chosen
    trained: Mapping[str, Tensor]
    rows: Sequence[Mapping[str, float]]


def make_learner(
    prepared: Prepared, work: RunFolder, learning: Learning, device: torch.device, progress: Progress = show_nothing
) -> Learner:
    accelerator = start_training(learning, work)
    if device == DEVICE:
        accelerator.__class__ = Second
    return Learner(accelerator, prepared, TEXT, learning, work, progress)


def train(prepared: Prepared, folder: Path, device: torch.device = DEVICE, progress: Progress = show_nothing) -> Run:
    """Both phases, or what of them ``folder`` does not hold. Recovery is of the whole model."""
    work = RunFolder(folder, {}, resume=True)
    with separate_state():
        learner = make_learner(prepared, work, LEARNING, device, progress)
        chosen = learner.learn(SampleSets(TEXT, TEXT, TEXT, ""))
        recovered = learner.recover(make_replica(prepared.loaded.model), LEARNING.steps - 1, TEXT[:2])
    return Run(chosen, recovered.weights, metrics(work.path))


@pytest.fixture(scope="module")
def host(prepared, tmp_path_factory):
    return train(prepared, tmp_path_factory.mktemp("host") / "out", device=torch.device("cpu"))


@pytest.fixture
def second():
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # else ``Module.to`` replaces the parameters
    with SecondDevice() as device:
        yield device
    torch.__future__.set_swap_module_params_on_conversion(swaps)


def require_same(one: Run, other: Run) -> None:
    assert other.chosen.plan.families == one.chosen.plan.families
    for a, b in zip(one.rows, other.rows, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    for a, b in ((one.chosen.changes, other.chosen.changes), (one.trained, other.trained)):
        assert a.keys() == b.keys()
        for name, weight in a.items():
            assert type(b[name]) is not SecondTensor
            assert torch.allclose(b[name], weight, rtol=1e-4, atol=1e-5), name


def test_a_run_gives_what_it_gives_host_and_only_text_crosses_in_a_step(prepared, host, tmp_path, second):
    crossed, before = [], 0

    def note(stage: str, done: int, total: int, figures: str = "") -> None:
        nonlocal before
        # Each third step, and the last one, writes a checkpoint, and the first one places the teacher.
        if stage in ("masks", "recovery") and 1 < done < total and done % LEARNING.training.save_every:
            crossed.append(set(second.crossed[before:]))
        before = len(second.crossed)

    require_same(host, train(prepared, tmp_path / "out", progress=note))
    assert crossed == [{("to the second device", (2, 32))}] * 5


def test_a_run_goes_on_on_another_device(prepared, host, tmp_path, second):
    with pytest.raises(Stopped):
        train(prepared, tmp_path / "out", progress=stop_at("masks", 3))
    require_same(host, train(prepared, tmp_path / "out", device=torch.device("cpu")))


def test_cached_targets_go_to_the_device_and_changed_weights_leave_it_one_by_one(prepared, host, tmp_path, second):
    cached, work = replace(LEARNING, teacher="cached"), RunFolder(tmp_path / "out", {}, resume=True)
    with separate_state():
        learner = make_learner(prepared, work, cached, DEVICE)
        student, masks, _, loop = learner.begin()
        loop.run()
        live = [live_bytes()]
        for _, weight in collect_changed_weights(student, masks, prepared.analysis.program.state):
            live.append(live_bytes())
            del weight
    assert metrics(work.path)[0]["loss"] == pytest.approx(host.rows[0]["loss"], rel=1e-2)
    assert len(live) == 1 + ADAPTED
    assert max(live) - live[0] <= 3 * 80 * 48 * 4  # the weight, its sum and what the next one needs


def test_a_replica_is_adapted_and_moved_alone_and_copies_no_weight():
    model = LlamaForCausalLM(llama_config())
    weights, ids = dict(model.named_parameters()), torch.arange(12)[None]
    expected = model(ids).logits
    copy = make_replica(model)
    assert torch.equal(copy(ids).logits, expected)
    assert all(p.data_ptr() == weights[name].data_ptr() for name, p in copy.named_parameters())
    copy.requires_grad_(False).half()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(model(ids).logits, expected)
    hollow = make_replica(model, False)
    assert {name: p.shape for name, p in hollow.named_parameters()} == {name: p.shape for name, p in weights.items()}
    assert all(p.data_ptr() != weights[name].data_ptr() for name, p in hollow.named_parameters())


def test_a_devices_tensors_meet_no_others():
    solver = Solver({"ffn": (2, 1, 5)}, lambda _: 1.0, 0.5, 10)
    with SecondDevice() as second:
        there = torch.ones(3, 5, device=DEVICE)
        assert isinstance(there, SecondTensor)
        with pytest.raises(AssertionError):
            there * solver.get_mask("ffn", 0)
        assert second.crossed == []
        assert there.cpu().tolist() == [[1.0] * 5] * 3
        assert second.crossed == [("to the host", (3, 5))]


def test_a_cut_model_shares_the_weights_that_it_is_given_if_it_may_and_ties_them():
    config = llama_config(tie_word_embeddings=True)
    given = {name: torch.randn_like(t) for name, t in LlamaForCausalLM(config).state_dict().items()}
    given["lm_head.weight"] = given["model.embed_tokens.weight"]
    stock = StockConfig(LlamaForCausalLM, config, {})
    for shared in (True, False):
        model = stock.build(given, shared=shared)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert all(torch.equal(t, given[name]) for name, t in model.state_dict().items())
        assert all((t.data_ptr() == given[name].data_ptr()) == shared for name, t in model.state_dict().items())
    assert stock.build({}).state_dict().keys() == given.keys()
