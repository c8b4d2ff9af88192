"""Staged execution: the same numbers as the whole program at once, with one stage's weights in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from second_device import DEVICE, SecondDevice, SecondTensor
from staged_programs import FILES, MODELS, SMALL, built
from torch import Tensor, nn

import mptk
from mptk import Settings, analyze, testing, trace
from mptk.compat.torch import FakeTensorMode
from mptk.errors import InputError, MachineError
from mptk.ir import Lazy, Program, Weights, make_token_samples, resolve_plan
from mptk.methods.criteria import score_units
from mptk.methods.criteria.observe import Calibration, measure_activations, sum_gradients
from mptk.methods.distil import Schedule, distil_blocks
from mptk.methods.reconstruct import list_consumers, reconstruct_consumers
from mptk.protocols import build_executor, find_device
from mptk.staged import spool
from mptk.staged.partition import Flow, partition
from mptk.staged.staged import EXECUTOR, Executor
from mptk.tasks import CAUSAL_LM
from mptk.testing import draw_plan, expect_error
from passes.transforms.insert_masks import find_mask_sites
from passes.transforms.masked_reference import mask
from passes.transforms.rewrite import rewrite_program


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_stages_give_the_numbers_of_the_whole_program(name):
    program, inputs = built(name)
    assert len(partition(Flow(program), SMALL.stage).ends) >= 2
    expected = [program(*given) for given in inputs]
    for executor in (SMALL, Executor(stage=0), EXECUTOR):
        assert all(map(torch.equal, executor.run_programs([program], inputs), expected))
    for found, one in zip(FILES.run_programs([program], inputs), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-6, atol=1e-6 * float(one.abs().max()))


def cut_apart(name: str) -> tuple[list[Program], list[tuple[Tensor, ...]], list[Tensor]]:
    """The program masked, as it is, and cut; inputs of it, and what each gives for each of them."""
    program, inputs = built(name)
    analysis = analyze(program)
    plan = draw_plan(analysis)
    programs = [mask(analysis, resolve_plan(analysis, plan)), program, rewrite_program(analysis, plan)]
    return programs, inputs, [run(*given) for given in inputs for run in programs]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_dense_masked_and_cut_programs_run_side_by_side(name):
    programs, inputs, expected = cut_apart(name)
    found = list(SMALL.run_programs(programs, inputs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))
    assert not torch.allclose(found[0], found[1], rtol=1e-2)


def counted(program: Program) -> tuple[Program, list[int], list[int]]:
    """The program with weights that are copies made when asked for: bytes alive after each, and all that were made."""
    alive: dict[int, int] = {}
    history: list[int] = []
    made: list[int] = []

    def make(tensor: Tensor) -> Tensor:
        copy = tensor.detach().clone()
        alive[id(copy)] = copy.nbytes
        weakref.finalize(copy, alive.pop, id(copy))
        history.append(sum(alive.values()))
        made.append(copy.nbytes)
        return copy

    state = {n: Lazy(t.to("meta"), lambda t=t: make(t)) for n, t in program.state.items()}
    return program.with_state(state), history, made


@torch.no_grad()
def test_one_stage_of_weights_is_in_memory_and_each_is_made_once():
    program, inputs = built("decoder")
    lazy, history, made = counted(program)
    largest = max(t.nbytes for t in program.state.values())
    for executor in (Executor(stage=40_000), Executor(stage=largest)):
        history.clear()
        list(executor.run_programs([lazy], inputs))
        assert max(history) <= max(executor.stage, largest)
    made.clear()
    list(EXECUTOR.run_programs([lazy], inputs))
    assert sum(made) <= sum(program.state[name].nbytes for name in set(program.weights.values()))


def test_borders_are_where_the_residual_stream_alone_is_alive_and_what_fits_into_memory_has_none():
    program, _ = built("decoder")
    flow = Flow(program)
    layer = sum(t.nbytes for n, t in program.state.items() if "layers.0" in n)
    ends = partition(flow, layer).ends
    alive = dict(zip((node.name for node in flow.calls), flow.count_live_bytes(), strict=True))
    assert len(ends) == testing.decoders.LAYER_COUNT
    assert all(alive[name] < 1.3 * min(alive[other] for other in ends) < 0.7 * max(alive.values()) for name in ends)
    whole = sum(flow.weight_bytes.values())
    assert partition(flow, whole - 1).ends != ()
    assert partition(flow, whole).ends == ()


@pytest.mark.parametrize("name", ["wanda", "flap", "taylor", "magnitude"])
@pytest.mark.parametrize("model", ["decoder", "learned positions", "mixture"])
def test_scores_are_those_of_the_whole_program(name, model):
    analysis = analyze(built(model)[0])
    windows = testing.draw_tokens(60, 9)  # two batches with gradients
    families = [f.name for f in analysis.families if f.name in ("ffn", "heads", "q_heads", "kv_groups")]
    whole = score_units(analysis, name, windows, families=families)
    staged = score_units(analysis, name, windows, families=families, executor=SMALL)
    for family, expected in whole.items():
        if name == "taylor":
            torch.testing.assert_close(staged[family], expected, rtol=1e-6, atol=0)
        else:
            assert torch.equal(staged[family], expected), family


def test_a_tied_weight_has_the_gradients_of_all_its_uses():
    model = testing.make_decoder("llama", tie_word_embeddings=True)
    program, windows = trace(model, dynamic=True), testing.draw_tokens(4, 9)
    (name,) = (n for n in program.state if n in ("lm_head.weight", "model.embed_tokens.weight"))
    given = Calibration(analyze(program), (), make_token_samples(windows), executor=SMALL)
    found = sum_gradients(given, lambda loss: loss / CAUSAL_LM.count_predictions(given.samples), [name])[0][name]
    loss = model(windows, labels=windows, use_cache=False).loss
    (expected,) = torch.autograd.grad(loss, [model.lm_head.weight])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_nothing_after_the_last_watched_value_is_computed():
    program, inputs = built("decoder")
    lazy, _, made = counted(program)
    analysis = replace(analyze(program), program=lazy)
    heads = analysis.variable("q_heads.0")
    assert measure_activations(Calibration(analysis, [heads], make_token_samples(inputs[0][0])))
    assert 0 < sum(made) < 0.5 * sum(t.nbytes for t in program.state.values())


class Writes(nn.Module):
    """Writes through a view of what an earlier layer made, and reads the whole after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(7, 10), nn.Linear(10, 10), nn.Linear(10, 11)

    def forward(self, x: Tensor) -> Tensor:
        held = self.first(x)
        part = held[:, :4]
        more = self.second(held).relu()
        part.copy_(more[:, :4])
        return self.last(held + more)


@torch.no_grad()
def test_a_write_through_a_view_stays_in_the_stage_of_what_it_changes():
    program, x = trace(Writes().eval(), (torch.randn(3, 7),)), torch.randn(3, 7)
    assert Flow(program).uncut
    (found,) = Executor(stage=0, borders=0).run_programs([program], [(x,)])
    torch.testing.assert_close(found, program(x))


def test_results_can_be_kept_in_files_and_come_back():
    kept, tensors = spool.Spool(bound=100, smallest=0), {"a": torch.randn(20), "b": torch.randn(30), "size": 7}
    kept.put("here", tensors)
    folder = kept._staging.folder
    assert len(list(folder.iterdir())) == 1
    back = kept.take("here")
    assert (back["size"], back["b"].tolist()) == (7, tensors["b"].tolist())
    assert not list(folder.iterdir())


def test_weights_are_changed_when_they_are_asked_for():
    asked: list[str] = []
    like = torch.empty(3, 4, dtype=torch.float16, device="meta")
    weights = Weights({"w": Lazy(like, lambda: asked.append("w") or torch.ones(3, 4, dtype=torch.float16))})
    cut = weights.with_edits({"w": lambda t: t[:2].float()})
    like = cut.find_like("w")
    assert (like.shape, like.dtype, asked) == ((2, 4), torch.float32, [])
    assert torch.equal(cut["w"], torch.ones(2, 4))
    assert asked == ["w"]


def test_the_memory_bound_divides_into_what_stays_stages_and_borders():
    resident, executor = build_executor(Settings(memory=8_000_000))
    assert resident.bound + executor.stage + executor.borders < 8_000_000
    assert executor.device.type == "cpu" or torch.accelerator.is_available()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_there_is_refused(name):
    with expect_error(MachineError, name="device"):
        find_device(name)


def test_a_word_that_is_no_device_is_refused():
    with expect_error(InputError, name="device") as refused:
        find_device("gpu")
    assert "auto" in refused.value.nearest


@pytest.mark.parametrize("method", ["wanda", "maskprune"])
def test_what_needs_the_whole_model_is_refused(laboratory, tmp_path, method):
    """A one-shot method has to write its own text, and the other one trains."""
    with expect_error(MachineError, name="memory"):
        mptk.prune(str(laboratory.open_model()), tmp_path / "out", Settings(memory=100_000, method=method))
    assert not (tmp_path / "out").exists()


# ---- another device than the one that was traced on ----

THERE = Executor(stage=12_000, device=DEVICE)


def close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["decoder", "sliding windows", "mixture", "encoder and decoder", "images"])
@torch.no_grad()
def test_dense_masked_and_cut_programs_run_there(name):
    programs, inputs, expected = cut_apart(name)
    with SecondDevice() as mode:
        found = list(THERE.run_programs(programs, inputs))
    assert all(isinstance(result, SecondTensor) for result in found)
    assert not [shape for where, shape in mode.crossed if where == "to the host" and shape]
    for result, other in zip(found, expected, strict=True):
        torch.testing.assert_close(result.held, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("name", ["wanda", "flap", "taylor"])
@pytest.mark.parametrize("model", ["decoder", "mixture"])
def test_scores_are_made_there(name, model):
    analysis, windows = analyze(built(model)[0]), testing.draw_tokens(5, 9)
    expected = score_units(analysis, name, windows, families=["q_heads"])
    with SecondDevice():
        found = score_units(analysis, name, windows, families=["q_heads"], executor=THERE)
    close(found, expected)


@torch.no_grad()
def test_consumers_are_fitted_and_blocks_are_distilled_there():
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
def test_a_program_runs_on_a_gpu_that_does_not_exist(name):
    """On fake CUDA tensors, which refuse to meet tensors of the CPU."""
    program, inputs = built(name)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        weights = {name: mode.from_tensor(weight) for name, weight in program.state.items()}
        fake = replace(program, state=program.state.with_entries(weights))
        batches = [tuple(mode.from_tensor(t) for t in given) for given in inputs]
        found = list(replace(THERE, device=torch.device("cuda", 0)).run_programs([fake], batches))
    assert all(result.device.type == "cuda" for result in found)
    assert [result.shape for result in found] == [program(*given).shape for given in inputs]


# ---- bfloat16: near to float32, and nothing that is summed is in it ----

BF16 = Executor(compute=torch.bfloat16)
STAGED = replace(SMALL, compute=torch.bfloat16)
ATEN = torch.ops.aten


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixture"])
@pytest.mark.parametrize("executor", [BF16, STAGED])
@torch.no_grad()
def test_results_are_near_to_those_of_float32_and_in_float32(name, executor):
    program, inputs = built(name)
    for found, given in zip(executor.run_programs([program], inputs), inputs, strict=True):
        expected = program(*given)
        assert found.dtype == torch.float32
        assert 1e-4 < float((found - expected).norm() / expected.norm()) < 0.03


@torch.no_grad()
def test_experts_run_in_it():
    """A router may choose others for a few tokens, so most tokens are looked at."""
    program, inputs = built("mixture")
    found, expected = next(BF16.run_programs([program], inputs)), program(*inputs[0])
    assert float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median()) < 0.03


@torch.no_grad()
def test_products_are_narrow_and_rotary_angles_are_not():
    program, inputs = built("decoder")
    types: dict[Any, set[torch.dtype]] = {}

    def see(target: object, x: Tensor) -> None:
        types.setdefault(target, set()).add(x.dtype)

    linear, attend, cos = ATEN.linear.default, ATEN.scaled_dot_product_attention.default, ATEN.cos.default
    nodes = [node for node in program.graph.graph.nodes if node.target in (linear, attend, cos)]
    STAGED.watch(program, inputs, [((n,), lambda x, target=n.target: see(target, x)) for n in nodes])
    assert types == {linear: {torch.bfloat16}, attend: {torch.bfloat16}, cos: {torch.float32}}


class After(torch.nn.Module):
    """A product, and what comes after it."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.body = torch.nn.Linear(8, 8), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.up(x))


@pytest.mark.parametrize(
    "body",
    [
        lambda h: torch.fft.fft(h).real,  # FNet
        lambda h: h.masked_fill(h > 0, torch.finfo(torch.float32).min).softmax(-1),  # DeBERTa
    ],
)
@torch.no_grad()
def test_what_half_precision_cannot_do_stays_in_float32(body):
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    program = trace(After(body).eval(), [x])
    found = next(BF16.run_programs([program], [(x,)]))
    torch.testing.assert_close(found, program(x), rtol=0.1, atol=0.02)


@pytest.mark.parametrize("name", ["decoder", "sliding windows"])
def test_gradients_are_summed_in_float32(name):
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
def test_scores_are_near(criterion):
    analysis, windows = analyze(built("decoder")[0]), testing.draw_tokens(12, 16)
    exact, found = (
        score_units(analysis, criterion, windows, families=["ffn"], executor=e)["ffn"] for e in (SMALL, STAGED)
    )
    torch.testing.assert_close(found, exact, rtol=0.15, atol=0.02 * float(exact.max()))
    assert not torch.equal(found, exact)
