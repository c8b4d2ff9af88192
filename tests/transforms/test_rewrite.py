"""Rewriting: the smaller program runs at any size, without the module, and is a valid exported program."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from decoder_analyses import analyze_decoder
from torch import Tensor, nn

import mptk
from mptk import FamilyPlan, Plan, analyze, trace
from mptk.ir import Analysis, Program, resolve_plan
from mptk.ir.program import count_parameters
from mptk.testing import draw_plan, draw_tokens, make_decoder, measure_largest
from passes.transforms.masked_reference import mask

SIZES = [(2, 7), (1, 5), (3, 19)]


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_dynamic_program_is_cut_for_all_batch_and_sequence_sizes(architecture):
    model = make_decoder(architecture, num_hidden_layers=1)
    analysis = analyze(trace(model, (draw_tokens(),), dynamic=True))
    plan = draw_plan(analysis)
    masked, cut = mask(analysis, resolve_plan(analysis, plan)), mptk.rewrite(analysis, plan)
    for size in SIZES:
        expected = masked(draw_tokens(*size))
        assert measure_largest(expected, cut(draw_tokens(*size))) <= 1e-5 * max(1, expected.abs().max())


def test_the_cut_program_outlives_the_module():
    module = make_decoder("gpt2", n_layer=1)
    analysis = analyze(trace(module, (draw_tokens(),)))
    plan = draw_plan(analysis)
    expected = mask(analysis, resolve_plan(analysis, plan))(draw_tokens())
    cut = mptk.rewrite(analysis, plan)
    gone = weakref.ref(module)
    del module, analysis
    gc.collect()
    assert gone() is None
    assert measure_largest(cut(draw_tokens()), expected) <= 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_the_cut_program_is_a_valid_exported_program(architecture):
    """Constructing it runs torch's verifier; its module computes the same. It tells the shapes that it computes."""
    analysis = analyze_decoder(architecture)
    cut = mptk.rewrite(analysis, draw_plan(analysis))
    exported = cut.to_exported()
    assert measure_largest(exported.module()(draw_tokens()), cut(draw_tokens())) == 0
    shapes = {name: tuple(t.shape) for name, t in cut.state_dict().items()}
    assert {name: tuple(t.shape) for name, t in exported.state_dict.items()}.items() <= shapes.items()
    told = {n.name: n.meta["val"].shape for n in cut.graph.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    assert told.items() >= computed_shapes(cut).items()


def computed_shapes(program: Program) -> dict[str, torch.Size]:
    """The shape of each call's result, by the call's name."""
    found: dict[str, torch.Size] = {}

    class Shapes(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            if n.op == "call_function" and isinstance(result, Tensor):
                found[n.name] = result.shape
            return result

    Shapes(program.graph).run(*program.list_arguments(draw_tokens()))
    return found


@pytest.fixture
def llama():
    return analyze_decoder("llama")


def half_of_ffn(analysis: Analysis) -> Plan:
    keep = {g.layer: (tuple(range(0, 80, 2)),) for g in analysis.family("ffn").groups}
    return Plan({"ffn": FamilyPlan(40, 80, keep)})


def test_weights_that_lose_nothing_share_storage_and_others_are_slices(llama):
    dense, cut = llama.program, mptk.rewrite(llama, half_of_ffn(llama))
    for name, tensor in cut.state.items():
        before = dense.state[name]
        if "mlp" not in name:
            assert tensor.data_ptr() == before.data_ptr()
        elif "down" in name:
            assert torch.equal(tensor, before[:, ::2])
        else:
            assert torch.equal(tensor, before[::2])
        assert tensor.is_contiguous()
    assert count_parameters(cut) == count_parameters(dense) - 40 * 3 * 48 * 2


def test_the_dense_program_is_left_as_it_was(llama):
    before, graph = llama.program(draw_tokens()), llama.program.graph.print_readable(print_output=False)
    plan = draw_plan(llama)
    mptk.rewrite(llama, plan)
    mask(llama, resolve_plan(llama, plan))(draw_tokens())
    assert llama.program.graph.print_readable(print_output=False) == graph
    assert measure_largest(llama.program(draw_tokens()), before) == 0


def test_a_plan_that_keeps_everything_changes_nothing(llama):
    whole = {f: {g.layer: (tuple(range(f.size)),) for g in f.groups} for f in llama.families}
    cut = mptk.rewrite(llama, Plan({f.name: FamilyPlan(f.size, f.size, keep) for f, keep in whole.items()}))
    assert measure_largest(cut(draw_tokens()), llama.program(draw_tokens())) == 0
    assert count_parameters(cut) == count_parameters(llama.program)
    assert mptk.rewrite(llama, Plan({}))(draw_tokens()).equal(llama.program(draw_tokens()))


def test_a_model_without_weights_is_cut_to_shapes():
    analysis = analyze(trace(make_decoder("llama", meta=True, num_hidden_layers=1), (draw_tokens(),)))
    cut = mptk.rewrite(analysis, half_of_ffn(analysis))
    assert cut.state["model.layers.0.mlp.up_proj.weight"].shape == (40, 48)
    assert cut.state["model.layers.0.mlp.down_proj.weight"].shape == (48, 40)
    assert count_parameters(cut) < count_parameters(analysis.program)
    assert not cut.has_values, "there is nothing to prove it by"


class Positional(nn.Module):
    """Constants along cut axes, sizes written into the forward, a symbolic size that also counts channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.head = nn.Embedding(13, 12), nn.Linear(12, 24), nn.Linear(24, 11)
        self.register_buffer("slopes", torch.linspace(0.5, 2, 4), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        batch, sequence = ids.shape
        x = self.up(self.embed(ids)).view(batch, sequence, 4, 6).transpose(1, 2)
        x = x.reshape(batch * 4, sequence, 6) * torch.arange(1.0, 7.0)
        x = x.view(batch, 4, sequence, 6) * self.slopes.view(4, 1, 1)
        return self.head(x.transpose(1, 2).reshape(batch, sequence, 24))  # type: ignore[no-any-return]


def test_sizes_and_constants_in_the_forward_follow():
    analysis = analyze(trace(Positional(), (draw_tokens() % 13,), dynamic=True))
    assert sorted(f.size for f in analysis.families) == [4, 6, 12]
    for seed in range(3):
        plan = draw_plan(analysis, seed=seed)
        masked, cut = mask(analysis, resolve_plan(analysis, plan)), mptk.rewrite(analysis, plan)
        for size in SIZES:
            assert measure_largest(masked(draw_tokens(*size) % 13), cut(draw_tokens(*size) % 13)) <= 1e-5
