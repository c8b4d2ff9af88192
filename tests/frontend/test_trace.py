"""Tracing: the program computes what the module does, shares its weights, and leaves the module as it was.

It reaches for passes.frontend.trace: it takes more than mptk.trace, and some modules need no task; for AnyImages of
mptk.tasks, too, under which lists of images are traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from made_modules import Made
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import ModelOutput

from mptk.errors import InputError, TraceError
from mptk.features.image_text.image_forms import AnyImages
from mptk.ir.program import count_parameters
from mptk.testing import draw_tokens, expect_error, make_decoder, measure_largest
from passes.frontend.trace import trace_to_program

X = torch.randn(2, 5, 6)


class Net(nn.Module):
    """Tied weights, buffers of one shape, an index constant, a weight that is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.unused = nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("kept", torch.arange(6.0))
        self.register_buffer("derived", torch.arange(6.0) + 1, persistent=False)
        self.plain = torch.tensor([0.5], device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x)) + self.kept + self.derived
        x = self.norm(x.transpose(1, 2)).transpose(1, 2) * self.plain
        return x[..., [-2, 1, 0]]


def test_the_program_computes_what_the_module_does_and_shares_its_weights():
    net = Net().eval()
    program = trace_to_program(net, (X,))
    assert measure_largest(program(X), net(X)) == 0
    assert measure_largest(program.to_exported().module()(X), net(X)) == 0
    weights = dict(net.named_parameters(remove_duplicate=False))
    for name in program.parameters:
        assert program.state[name].data_ptr() == weights[name].data_ptr()
    net.first.weight.data.mul_(2)
    assert measure_largest(program(X), net(X)) == 0


def test_weights_have_the_modules_own_names_and_an_exported_program_its_own():
    net = Net()
    program = trace_to_program(net, (X,))
    ((alias, name),) = program.aliases.items()
    assert {alias, name} == {"first.weight", "second.weight"}
    assert set(program.parameters) >= {name, "norm.weight", "norm.bias"}
    assert program.state_dict().keys() == net.state_dict().keys()
    assert count_parameters(program) == sum(p.numel() for p in net.parameters())
    Net().load_state_dict(program.state_dict())
    assert "derived" in program.state
    assert "derived" not in program.state_dict()
    theirs = [s.target for s in program.exported.graph_signature.input_specs if s.target is not None]
    ours = [s.target for s in program.signature.input_specs if s.target is not None]
    assert set(theirs) <= {*program.exported.state_dict, *program.exported.constants}
    assert ours == [name.removeprefix("module.") for name in theirs] != theirs


def test_a_module_without_weights_stays_as_it_is_and_its_buffers_are_told_apart():
    with torch.device("meta"):
        net = Net()
    before = {name: (id(t), type(t)) for name, t in [*net.named_parameters(), *net.named_buffers()]}
    program = trace_to_program(net, (X,))
    assert {name: (id(t), type(t)) for name, t in [*net.named_parameters(), *net.named_buffers()]} == before
    assert len(program.aliases) == 1
    assert {"norm.running_mean", "norm.running_var"} <= program.state.keys(), "though they have one shape"


def test_a_model_without_weights_stays_without():
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2, "num_key_value_heads": 8}
    with torch.device("meta"):
        big = LlamaForCausalLM(LlamaConfig(**shape))
    program = trace_to_program(big)
    assert count_parameters(program) > 600_000_000
    assert all(isinstance(t, FakeTensor) and t.device.type == "cpu" for t in program.state.values())
    assert all(p.is_meta for p in big.parameters())
    assert {n for n, _ in big.named_parameters()} == set(program.parameters)


def test_index_constants_keep_their_values_without_weights():
    """An index list in the forward: on meta tensors its values would be lost."""
    with torch.device("meta"):
        net = Made(lambda m, x: m.up(x)[..., [-2, 3], :], up=nn.Linear(6, 6))
    (constant,) = (t for n, t in trace_to_program(net, (X,)).state.items() if not n.startswith("up."))
    assert not isinstance(constant, FakeTensor)
    assert constant.tolist() == [-2, 3]


@pytest.mark.parametrize("training", [False, True])
def test_the_modules_mode_is_left_as_it_was(training):
    net = Net().train(training)
    net.norm.eval()
    trace_to_program(net, (X,))
    assert net.training == net.first.training == training
    assert not net.norm.training


def test_dropout_is_off_also_for_a_module_in_training():
    net = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.9)).train()
    program = trace_to_program(net, (X,))
    assert measure_largest(program(X), net.eval()(X)) == 0


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "nested": lambda a, b: ((a,), [b, None]),
    "dict": lambda a, b: {"logits": a, "cache": b},
    "transformers": lambda a, b: ModelOutput(logits=a, cache=b),
    "tensor": lambda a, b: a,
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_every_tensor_of_the_result_is_an_output(kind):
    """What does not reach the result is dropped; of what a transformers model returns, the first tensor is the result."""
    net = Made(lambda m, x: OUTPUTS[kind](m.first(x), m.second(x)), first=nn.Linear(6, 4), second=nn.Linear(6, 3))
    program = trace_to_program(net, (X,))
    users = {program.weights[n.name] for n in program.list_placeholders() if n.name in program.weights and n.users}
    if kind in ("transformers", "tensor"):
        assert measure_largest(program(X), net.first(X)) == 0
        assert users == {"first.weight", "first.bias"}
    else:
        assert measure_largest(program(X), (net.first(X), net.second(X))) == 0
        assert users == set(program.parameters)


def test_a_dynamic_program_runs_at_other_sizes():
    net = make_decoder("llama", num_hidden_layers=1)
    program = trace_to_program(net, (draw_tokens(),), dynamic=True)
    assert program.length is None
    for ids in (draw_tokens(1, 5), draw_tokens(3, 19), draw_tokens(2, 7)):
        with torch.no_grad():
            assert measure_largest(program(ids), net(ids).logits) <= 1e-5
    assert trace_to_program(net, dynamic=(0,)).length == 7


def test_missing_inputs_are_asked_for():
    with expect_error(InputError, name="example_inputs"):
        trace_to_program(Net())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_control_flow_on_data_is_refused_and_the_module_left_whole(device):
    with torch.device(device):
        net = Made(lambda m, x: (y := m.up(x)) * (1 if y.sum() > 0 else -1), up=nn.Linear(6, 6))
    with expect_error(TraceError, name="Made"):
        trace_to_program(net, (X,))
    assert net.up.weight.device.type == device
    assert net.training


def test_a_forward_without_a_cache_argument_is_given_none():
    """Though the module has a config as models of transformers have."""
    net = nn.Linear(6, 4)
    net.config = "any"
    assert measure_largest(trace_to_program(net, (X,))(X), net(X)) == 0


def divide_images(_: Made, images: Tensor) -> Tensor:
    """As classes do: by a list of them, and by numbers that depend on which are blank."""
    with AnyImages():
        real = (images == 0).sum((-1, -2, -3)) != images.shape[1:].numel()
        parts = images[real].flatten(1).split(real[:, None].sum(1).tolist())
        return torch.cat(list(torch.cat(parts)))


def test_a_trace_with_lists_of_images_holds_for_any_number():
    program = trace_to_program(Made(divide_images), torch.randn(3, 2, 4, 4), dynamic=(0,))
    assert not program.sizes.fixed
    assert "aten.index" not in program.graph.code  # no image is left out
    images = torch.randn(7, 2, 4, 4)
    assert torch.equal(program(images).flatten(), images.flatten())


class Stated(nn.Module):
    """Adds a weight, a buffer that no checkpoint holds, and a constant of the trace."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), weight))
        self.register_buffer("plain", torch.full((3,), 10 * weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight + self.plain + torch.tensor([float(x.shape[0])] * 3)


def test_the_state_of_a_module_has_no_constants_of_its_trace():
    one, other = (trace_to_program(Stated(weight), torch.zeros(rows, 3)) for weight, rows in ((1.0, 2), (2.0, 5)))
    assert other.with_state(one.collect_module_state())(torch.zeros(5, 3))[0].tolist() == [1 + 10 + 5] * 3
