"""``Program.module()``: a cut model as a module to train, under the dense model's names."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mptk
from mptk import testing
from mptk.errors import TraceError
from mptk.ir import Program
from mptk.testing import draw_plan, expect_error


class Net(nn.Module):
    """Two inputs, two outputs, a batch norm, a tied weight and a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 22), nn.Linear(22, 6)
        self.norm = nn.BatchNorm1d(22)
        self.head = nn.Linear(6, 6, bias=False)
        self.again = nn.Linear(6, 6, bias=False)
        self.again.weight = self.head.weight
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.norm(self.up(x)).relu()
        made = self.down(hidden) * self.scale + shift
        return {"first": self.head(made), "second": self.again(made + 1)}


INPUTS = {"x": torch.randn(3, 6), "shift": torch.randn(3, 6)}


def cut(module: nn.Module) -> Program:
    analysis = mptk.analyze(module, INPUTS)
    return mptk.rewrite(analysis, draw_plan(analysis, [analysis.families[0].name], share=0.5))


@pytest.fixture
def program():
    return cut(Net())


def test_it_has_the_cut_weights_under_the_old_names_and_says_what_is_missing(program):
    small = program.module()
    assert set(small.state_dict()) == set(Net().state_dict())
    assert small.up.weight.shape == (11, 6)
    assert small.norm.running_mean.shape == (11,)
    assert small.again.weight is small.head.weight
    assert "scale" in dict(small.named_buffers())
    outputs, expected = small(**INPUTS), program(*INPUTS.values())
    assert all(torch.equal(one, other) for one, other in zip(outputs.values(), expected, strict=True))
    assert torch.equal(small(INPUTS["x"], shift=INPUTS["shift"])["first"], outputs["first"])
    with pytest.raises(TypeError, match="x, shift"):
        small(INPUTS["x"])
    with expect_error(TraceError):
        mptk.trace(Net().to("meta"), INPUTS).module()


def test_it_trains_and_shares_nothing_with_the_dense_model():
    dense = Net()
    before = copy.deepcopy(dense.state_dict())
    small = cut(dense).module().train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        found = small(**INPUTS)
        loss = found["first"].square().mean() + found["second"].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    assert small.again.weight is small.head.weight


def test_its_state_goes_into_another_one(program):
    one, other = program.module(), program.module()
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.5)
    assert not torch.equal(one(**INPUTS)["first"], other(**INPUTS)["first"])
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(**INPUTS)["first"], other(**INPUTS)["first"])
    copied = copy.deepcopy(one)
    assert torch.equal(one(**INPUTS)["second"], copied(**INPUTS)["second"])


def test_a_transformers_model_keeps_its_names_and_ties():
    model = testing.make_llama(layers=1)
    analysis = mptk.analyze(model)
    program = mptk.rewrite(analysis, draw_plan(analysis, ["ffn"], share=0.5))
    small, ids = program.module(), torch.tensor([[3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5, 4, 3]])
    assert set(small.state_dict()) == set(model.state_dict())
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert torch.equal(small(input_ids=ids), program(ids))
