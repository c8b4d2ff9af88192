"""Staged execution: the same numbers as the whole program at once, with one stage's weights in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from inside import Inside
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

import mptk
from mptk import MptkError, Settings, analyze, testing, trace
from mptk.ir.program import Program
from mptk.ir.resolved_plan import resolve_plan
from mptk.ir.samples import make_token_samples
from mptk.ir.weights import Lazy, Weights
from mptk.methods.criteria import score_units
from mptk.methods.criteria.observe import Calibration, measure_activations, sum_gradients
from mptk.protocols.execution import build_executor, find_device
from mptk.staged import spool
from mptk.staged.partition import Flow, partition
from mptk.staged.staged import EXECUTOR, Executor
from mptk.tasks import CAUSAL_LM
from mptk.testing import draw_plan
from passes.transforms.masked_reference import mask
from passes.transforms.rewrite import rewrite_program

SMALL = Executor(stage=12_000)
"""Stages of less than a layer."""
FILES = Executor(stage=12_000, borders=0)
"""The same, with all that crosses a border in files, where it may lie at another address."""


class Net(nn.Module):
    """Convolutions over channels of sizes that all differ, with a norm of its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 20, 3, padding=1), nn.GroupNorm(4, 20), nn.ReLU(), nn.Conv2d(20, 28, 3), nn.ReLU()
        )
        self.head = nn.Linear(28, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))


def decoder(name: str) -> tuple[Program, list[tuple[Tensor, ...]]]:
    batches = [(testing.draw_tokens(2, 7),), (testing.draw_tokens(1, 9),), (testing.draw_tokens(3, 5),)]
    return trace(testing.make_decoder(name), dynamic=True), batches


def t5(kind: type) -> tuple[Program, list[tuple[Tensor, ...]]]:
    sizes = {"d_model": 48, "d_kv": 10, "d_ff": 80, "num_layers": 2, "num_heads": 3, "vocab_size": 97}
    torch.manual_seed(0)
    model = kind(T5Config(**sizes, decoder_start_token_id=0)).eval()
    ids = testing.draw_tokens(2, 7)
    inputs = (ids,) if kind is T5EncoderModel else (ids, torch.ones_like(ids), testing.draw_tokens(2, 5))
    return trace(model, inputs), [inputs, tuple(t.flip(0) for t in inputs)]


def image() -> tuple[Program, list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    return trace(Net().eval(), (torch.randn(2, 3, 8, 8),)), [(torch.randn(2, 3, 8, 8),) for _ in range(3)]


MODELS: dict[str, Callable[[], tuple[Program, list[tuple[Tensor, ...]]]]] = {
    "decoder": lambda: decoder("llama"),
    "learned positions": lambda: decoder("gpt2"),
    "sliding windows": lambda: decoder("gemma3"),
    "mixture": lambda: decoder("mixtral"),
    "encoder": lambda: t5(T5EncoderModel),
    "encoder and decoder": lambda: t5(T5ForConditionalGeneration),
    "images": image,
}


@cache
def built(name: str) -> tuple[Program, list[tuple[Tensor, ...]]]:
    return MODELS[name]()


@pytest.fixture(autouse=True)
def _all_to_files(inside: Inside) -> None:
    inside.bound("mptk.staged.spool.SMALLEST_FILE", 0)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_stages_give_the_numbers_of_the_whole_program(name: str) -> None:
    program, inputs = built(name)
    assert len(partition(Flow(program), SMALL.stage).ends) >= 2
    expected = [program(*given) for given in inputs]
    for executor in (SMALL, Executor(stage=0), EXECUTOR):
        assert all(map(torch.equal, executor.run_programs([program], inputs), expected))
    for found, one in zip(FILES.run_programs([program], inputs), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-6, atol=1e-6 * float(one.abs().max()))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_dense_masked_and_cut_programs_run_side_by_side(name: str) -> None:
    program, inputs = built(name)
    analysis = analyze(program)
    plan = draw_plan(analysis)
    masked, cut = mask(analysis, resolve_plan(analysis, plan)), rewrite_program(analysis, plan)
    found = list(SMALL.run_programs([masked, program, cut], inputs))
    expected = [run(*given) for given in inputs for run in (masked, program, cut)]
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
def test_one_stage_of_weights_is_in_memory_and_each_is_made_once() -> None:
    program, inputs = built("decoder")
    lazy, history, made = counted(program)
    largest = max(t.nbytes for t in program.state.values())
    for executor in (Executor(stage=40_000), Executor(stage=largest)):
        history.clear()
        list(executor.run_programs([lazy], inputs))
        assert max(history) <= max(executor.stage, largest)
    made.clear()
    list(EXECUTOR.run_programs([lazy], inputs))
    used = {program.weights[n] for n in program.weights}
    assert sum(made) <= sum(program.state[name].nbytes for name in used)


def test_borders_are_where_the_residual_stream_alone_is_alive() -> None:
    program, _ = built("decoder")
    flow = Flow(program)
    layer = sum(t.nbytes for n, t in program.state.items() if "layers.0" in n)
    ends = partition(flow, layer).ends
    alive = dict(zip((node.name for node in flow.calls), flow.count_live_bytes(), strict=True))
    assert len(ends) == testing.decoders.LAYER_COUNT
    assert all(alive[name] < 1.3 * min(alive[other] for other in ends) < 0.7 * max(alive.values()) for name in ends)


def test_what_fits_into_memory_is_one_stage_without_a_search(inside: Inside) -> None:
    """The search takes time with the square of the number of calls."""
    flow = Flow(built("decoder")[0])
    whole = sum(flow.weight_bytes.values())
    assert partition(flow, whole - 1).ends != ()
    inside.forbid("mptk.staged.partition._list_ends")
    assert partition(flow, whole).ends == ()


@pytest.mark.parametrize("name", ["wanda", "flap", "taylor", "magnitude"])
@pytest.mark.parametrize("model", ["decoder", "learned positions", "mixture"])
def test_scores_are_those_of_the_whole_program(name: str, model: str, inside: Inside) -> None:
    analysis = analyze(built(model)[0])
    windows = testing.draw_tokens(5, 9)
    inside.bound("mptk.methods.criteria.observe.OBSERVED_TOKENS", 18)
    inside.bound("mptk.methods.criteria.observe.GRADIENT_TOKENS", 18)
    families = [f.name for f in analysis.families if f.name in ("ffn", "heads", "q_heads", "kv_groups")]
    whole = score_units(analysis, name, windows, families=families)
    staged = score_units(analysis, name, windows, families=families, executor=SMALL)
    for family, expected in whole.items():
        if name == "taylor":
            torch.testing.assert_close(staged[family], expected, rtol=1e-6, atol=0)
        else:
            assert torch.equal(staged[family], expected), family


def test_a_tied_weight_has_the_gradients_of_all_its_uses() -> None:
    model = testing.make_decoder("llama", tie_word_embeddings=True)
    program, windows = trace(model, dynamic=True), testing.draw_tokens(4, 9)
    (name,) = (n for n in program.state if n in ("lm_head.weight", "model.embed_tokens.weight"))
    given = Calibration(analyze(program), (), make_token_samples(windows), executor=SMALL)
    found = sum_gradients(given, lambda loss: loss / CAUSAL_LM.count_predictions(given.samples), [name])[0][name]
    loss = model(windows, labels=windows, use_cache=False).loss
    (expected,) = torch.autograd.grad(loss, [model.lm_head.weight])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_nothing_after_the_last_watched_value_is_computed() -> None:
    program, inputs = built("decoder")
    analysis = analyze(program)
    lazy, _, made = counted(program)
    analysis = type(analysis)(**{**vars(analysis), "program": lazy})
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
def test_a_write_through_a_view_stays_in_the_stage_of_what_it_changes() -> None:
    program, x = trace(Writes().eval(), (torch.randn(3, 7),)), torch.randn(3, 7)
    flow = Flow(program)
    assert flow.uncut
    (found,) = Executor(stage=0, borders=0).run_programs([program], [(x,)])
    torch.testing.assert_close(found, program(x))


def test_results_can_be_kept_in_files_and_come_back() -> None:
    kept = spool.Spool(bound=100)
    tensors = {"a": torch.randn(20), "b": torch.randn(30), "size": 7}
    kept.put("here", tensors)
    folder = kept._staging.folder
    assert len(list(folder.iterdir())) == 1
    back = kept.take("here")
    assert back["size"] == 7
    assert torch.equal(back["b"], tensors["b"])
    assert not list(folder.iterdir())


def test_weights_are_changed_when_they_are_asked_for() -> None:
    asked: list[str] = []
    like = torch.empty(3, 4, dtype=torch.float16, device="meta")
    weights = Weights({"w": Lazy(like, lambda: asked.append("w") or torch.ones(3, 4, dtype=torch.float16))})
    cut = weights.with_edits({"w": lambda t: t[:2].float()})
    assert cut.find_like("w").shape == (2, 4)
    assert cut.find_like("w").dtype == torch.float32
    assert not asked
    assert torch.equal(cut["w"], torch.ones(2, 4))
    assert asked == ["w"]


def test_the_memory_bound_divides_into_what_stays_stages_and_borders() -> None:
    resident, executor = build_executor(Settings(memory=8_000_000))
    assert resident.bound + executor.stage + executor.borders < 8_000_000
    assert executor.device.type == "cpu" or torch.accelerator.is_available()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device")
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(MptkError, match=f"no device {name}"):
        find_device(name)


def test_a_word_that_is_no_device_is_refused() -> None:
    with pytest.raises(MptkError, match="no device 'gpu'; choose auto"):
        find_device("gpu")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "wanda"}, "generating text with the model needs all weights in memory, .*; give text with data"),
        ({"method": "maskprune"}, "training holds all weights in memory, .*; give a one-shot method without steps"),
    ],
)
def test_what_needs_the_whole_model_is_refused_if_it_does_not_fit(tmp_path: Path, changes: dict, said: str) -> None:
    testing.save_model(testing.make_llama(), tmp_path / "dense")
    with pytest.raises(MptkError, match=said):
        mptk.prune(str(tmp_path / "dense"), tmp_path / "out", Settings(memory=100_000, **changes))
    assert not (tmp_path / "out").exists()
