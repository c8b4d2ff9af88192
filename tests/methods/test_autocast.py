"""Programs run in bfloat16 on request: near to float32, and nothing that is summed, solved or proven runs that way.

It reaches for mptk.staged and mptk.methods.criteria: what is summed in which type is no result of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inside import Inside
from test_staged import MODELS, SMALL, built
from torch import Tensor
from toy_checkpoints import SETTINGS, llama_config
from transformers import LlamaForCausalLM

from mptk import Plan, Settings, analyze, prune, testing, trace, verify
from mptk.config.learning import Learning, Training
from mptk.ir.samples import make_token_samples
from mptk.methods.criteria import score_units
from mptk.methods.criteria.observe import Calibration, sum_gradients
from mptk.progress import Progress
from mptk.run.minutes import fill_in
from mptk.staged.staged import Executor
from mptk.testing import save_word_model

BF16 = Executor(compute=torch.bfloat16)
STAGED = replace(SMALL, compute=torch.bfloat16)
ATEN = torch.ops.aten


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixture"])
@pytest.mark.parametrize("executor", [BF16, STAGED])
@torch.no_grad()
def test_results_are_near_to_those_of_float32_and_in_float32(name: str, executor: Executor) -> None:
    program, inputs = built(name)
    for found, given in zip(executor.run_programs([program], inputs), inputs, strict=True):
        expected = program(*given)
        assert found.dtype == torch.float32
        assert 1e-4 < float((found - expected).norm() / expected.norm()) < 0.03


@torch.no_grad()
def test_experts_run_in_it() -> None:
    """A router may choose others for a few tokens, so most tokens are looked at."""
    program, inputs = built("mixture")
    found, expected = next(BF16.run_programs([program], inputs)), program(*inputs[0])
    assert float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median()) < 0.03


@torch.no_grad()
def test_products_are_narrow_and_rotary_angles_are_not() -> None:
    program, inputs = built("decoder")
    types: dict[Any, set[torch.dtype]] = {}

    def see(target: object, x: Tensor) -> None:
        types.setdefault(target, set()).add(x.dtype)

    watches = [
        ((node,), lambda x, target=node.target: see(target, x))
        for node in program.graph.graph.nodes
        if node.target in (ATEN.linear.default, ATEN.scaled_dot_product_attention.default, ATEN.cos.default)
    ]
    STAGED.watch(program, inputs, watches)
    assert types == {
        ATEN.linear.default: {torch.bfloat16},
        ATEN.scaled_dot_product_attention.default: {torch.bfloat16},
        ATEN.cos.default: {torch.float32},
    }


@pytest.mark.parametrize("name", ["decoder", "sliding windows"])
def test_gradients_are_summed_in_float32(name: str) -> None:
    program, windows = built(name)[0], testing.draw_tokens(80, 9)  # two batches
    names = [n for n in program.parameters if "proj" in n]
    assert names
    given = Calibration(analyze(program), (), make_token_samples(windows))
    exact, found = (
        sum_gradients(replace(given, executor=each), lambda loss: loss / windows.numel(), names)[0]
        for each in (SMALL, STAGED)
    )
    for weight in names:
        assert found[weight].dtype == torch.float32
        assert torch.cosine_similarity(found[weight].flatten(), exact[weight].flatten(), dim=0) > 0.99
    assert any(not torch.equal(found[n], found[n].bfloat16().float()) for n in names)


@pytest.mark.parametrize("criterion", ["wanda", "flap", "taylor"])
def test_scores_are_near(criterion: str) -> None:
    analysis, windows = analyze(trace(testing.make_decoder("llama"), dynamic=True)), testing.draw_tokens(12, 16)
    exact, found = (
        score_units(analysis, criterion, windows, families=["ffn"], executor=e)["ffn"] for e in (SMALL, STAGED)
    )
    torch.testing.assert_close(found, exact, rtol=0.15, atol=0.02 * float(exact.max()))
    assert not torch.equal(found, exact)


class Ran(list[tuple[str, torch.dtype]]):
    """(stage of the run, type of the executor) of each run of programs."""

    stage = ""

    def progress(self) -> Progress:
        def say(stage: str, *_: object) -> None:
            self.stage = stage

        return say


@pytest.fixture
def ran(inside: Inside) -> Ran:
    found = Ran()
    for name in ("run_programs", "watch", "compute_gradients"):

        def spied(own: Any, self: Executor, *args: Any, **options: Any) -> Any:
            found.append((found.stage, self.compute))
            return own(self, *args, **options)

        inside.around(f"mptk.staged.staged.Executor.{name}", spied)
    return found


def share_kept(one: Plan, other: Plan) -> float:
    """The least share of a layer's units that both plans keep."""
    shares: list[float] = []
    for name, family in one.families.items():
        for layer, rows in family.keep.items():
            pairs: Sequence[tuple[Any, Any]] = list(zip(rows, other.families[name].keep[layer], strict=True))
            shares += [len(set(a) & set(b)) / len(a) for a, b in pairs]
    return min(shares)


def test_a_run_keeps_nearly_the_same_units_and_its_folder_passes_the_same_proof(tmp_path: Path, ran: Ran) -> None:
    dense = save_word_model(LlamaForCausalLM(llama_config()), tmp_path / "dense")
    settings = replace(SETTINGS, families=("ffn",), onnx=False, reconstruct=True)
    prune(dense, tmp_path / "float32", settings)
    assert {dtype for _, dtype in ran} == {torch.float32}
    ran.clear()
    report = prune(
        dense, tmp_path / "bf16", replace(settings, compute_dtype="bfloat16"), progress=ran.progress()
    ).report
    assert report is not None
    plans = [Plan.load(tmp_path / name / "plan.json") for name in ("float32", "bf16")]
    assert share_kept(*plans) >= 0.9
    chosen = {"score (wanda)", "choose widths", "reconstruct"}
    assert {dtype for stage, dtype in ran if stage in chosen} == {torch.bfloat16}
    assert {dtype for stage, dtype in ran if stage not in chosen} == {torch.float32}
    assert {stage for stage, _ in ran} >= {"score (wanda)", "reconstruct", "prove", "measure"}
    ran.clear()
    assert all(d.ok and d.tolerance <= 1e-4 for d in verify(tmp_path / "bf16"))
    assert {dtype for _, dtype in ran} == {torch.float32}


def test_training_takes_the_type_too_unless_a_precision_is_given() -> None:
    settings = Settings(compute_dtype="bfloat16", learning=Learning(steps=4))
    assert fill_in(settings).learning.precision == "bf16"
    assert fill_in(replace(settings, learning=Learning(precision="fp16"))).learning.precision == "fp16"
    assert fill_in(replace(settings, compute_dtype="float32")).learning.precision == "no"


def test_the_dense_model_teaches_in_the_type_too(tmp_path: Path, inside: Inside) -> None:
    gave: list[torch.dtype] = []
    proven: list[torch.dtype] = []

    def seen(real: Callable[..., Any], *given: Any, **more: Any) -> Any:
        output, states = real(*given, **more)
        gave.append(output.dtype)
        return output, states

    def own(real: Callable[..., Any], output: torch.Tensor) -> Any:
        proven.append(output.dtype)
        return real(output)

    inside.around("mptk.methods.maskprune.learner.run_module", seen)
    inside.around("mptk.methods.maskprune.learner.move_to_host", own)
    dense = save_word_model(LlamaForCausalLM(llama_config()), tmp_path / "dense")
    learning = Learning(steps=1, training=Training(batch=2, micro=2))
    settings = replace(SETTINGS, families=("ffn",), onnx=False, learning=learning)
    for compute in ("float32", "bfloat16"):
        prune(dense, None, replace(settings, compute_dtype=compute))
    assert set(gave[: len(gave) // 2]) == {torch.float32}
    assert set(gave[len(gave) // 2 :]) == {torch.bfloat16}
    assert set(proven) == {torch.float32}


def test_a_pruned_module_runs_in_an_autocast() -> None:
    """The trace notes the type that a conversion starts from, which an autocast changes."""
    net = torch.nn.Sequential(torch.nn.Linear(8, 12), Float(), torch.nn.Linear(12, 4))
    x = torch.randn(3, 8)
    small = prune(net, example_inputs=x, method="magnitude", sparsity=0.25, align=1, progress=None).model
    with torch.autocast("cpu", torch.bfloat16):
        assert small(x).shape == (3, 4)


class Float(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()
