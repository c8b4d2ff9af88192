"""Plain modules at the edges of what can be cut: each is cut and proven, or refused by name; none ends in a bare error."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mptk
from mptk.errors import AnalysisError, BudgetError, TargetError, TraceError
from mptk.testing import expect_error

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def three() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).eval()


class Gradient(nn.Module):
    """What an energy model gives: the gradient of a network by its input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = three()

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.net(x).sum(), x)[0]


class Unbatched(nn.Module):
    """Convolutions of one sample at a time, as [channels, length]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv1d(5, 12, 3), nn.ConvTranspose1d(12, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.second(self.first(x[0]).relu()), self.second(self.first(x[1]).relu())])


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[mptk.MptkError], str]] = {
    "without a family": (lambda: nn.Linear(8, 4), AnalysisError, ""),
    "without a weight": (nn.ReLU, AnalysisError, ""),
    "a gradient": (Gradient, TraceError, "Gradient"),
    "jit.trace": (lambda: torch.jit.trace(three(), X), TraceError, "Sequential"),
    "jit.script": (lambda: torch.jit.script(three()), TraceError, "Sequential"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_cannot_be_pruned_is_refused_by_name(kind: str) -> None:
    make, error, name = REFUSED[kind]
    with expect_error(error, name=name):
        mptk.prune(make(), sparsity=0.5, example_inputs=X, progress=None)


def test_an_unbatched_transposed_convolution_is_cut() -> None:
    pruned = mptk.prune(Unbatched(), sparsity=0.5, example_inputs=X, progress=None)
    assert pruned.model.get_parameter("second.weight").shape == (6, 4, 3)


class Recurrent(nn.Module):
    """A recurrent layer over the steps, and a head."""

    def __init__(self, kind: type[nn.RNNBase], **options: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = kind(8, 12, batch_first=True, **options)
        self.head = nn.Linear(24 if options.get("bidirectional") else 12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "options", "gates"), [(nn.LSTM, {}, 4), (nn.GRU, {"num_layers": 2, "bidirectional": True}, 3)]
)
def test_the_hidden_units_of_a_recurrent_layer_are_cut(
    kind: type[nn.RNNBase], options: dict[str, int], gates: int
) -> None:
    pruned = mptk.prune(Recurrent(kind, **options), sparsity=0.5, tolerance=0.1, example_inputs=X, progress=None)
    (width,) = pruned.plan.widths.values()
    assert pruned.model.get_parameter("layer.weight_hh_l0").shape == (gates * width, width)
    assert pruned.model(torch.randn(3, 5, 8)).shape[0] == 3


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m))])
def test_a_wrapped_module_is_pruned_as_the_module_in_it(wrap: Callable[[nn.Module], nn.Module]) -> None:
    module = three()
    alone, wrapped = (mptk.prune(m, sparsity=0.5, example_inputs=X, progress=None) for m in (module, wrap(module)))
    assert wrapped.plan == alone.plan
    assert wrapped.report.model == "Sequential"
    assert torch.equal(wrapped.model(X), alone.model(X))
    analysis = mptk.analyze(wrap(module), (X,))
    assert mptk.rewrite(analysis, wrapped.plan).state.keys() == module.state_dict().keys()


def test_no_remedy_names_the_target_that_is_in_use() -> None:
    with expect_error(BudgetError) as refused:
        mptk.prune(three(), sparsity=0.29, tolerance=0.001, example_inputs=X, progress=None)
    assert "graph" not in refused.value.remedy


class MixedFeedForward(nn.Module):
    """Two linear layers with a depthwise convolution between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 6)
        self.depthwise = nn.Conv1d(16, 16, 3, padding=1, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.depthwise(self.up(x).transpose(1, 2)).transpose(1, 2).relu())


def between(up: nn.Module, down: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(up=up, relu=nn.ReLU(), down=down))


def test_channels_of_convolutions_are_no_feed_forward_width() -> None:
    for net, sizes, name in [
        (between(nn.Linear(6, 16), nn.Linear(16, 4)), (2, 5, 6), "ffn"),
        (between(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)), (2, 3, 9, 9), "conv"),
        (between(nn.Conv2d(3, 16, 1), nn.ConvTranspose2d(16, 4, 3)), (2, 3, 9, 9), "conv"),
        (between(nn.Conv1d(3, 16, 3), nn.Conv1d(16, 4, 3)), (2, 3, 9), "conv"),
        (between(nn.Conv1d(3, 16, 1), nn.Conv1d(16, 4, 1)), (2, 3, 9), "ffn"),
        (MixedFeedForward(), (2, 5, 6), "ffn"),
    ]:
        assert [family.name for family in mptk.analyze(mptk.trace(net, torch.randn(sizes))).families] == [name]


def test_units_without_a_narrower_aligned_width_are_named() -> None:
    module = Recurrent(nn.GRU, bidirectional=True)  # 24 channels
    with expect_error(TargetError, name="graph"):
        mptk.prune(module, sparsity=0.3, tolerance=0.2, align=24, example_inputs=X, progress=None)
    assert mptk.prune(module, sparsity=0.3, tolerance=0.2, align=1, example_inputs=X, progress=None) is not None


class Mapped(nn.Module):
    """Its layers run on one sample at a time, under ``torch.vmap``, or on all at once."""

    def __init__(self, *, mapped: bool) -> None:
        super().__init__()
        self.net, self.mapped = three(), mapped

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.net)(x) if self.mapped else self.net(x)


@pytest.mark.parametrize("method", ["wanda", "fisher", "taylor"])
def test_layers_under_vmap_are_scored_as_without_it(method: str) -> None:
    cut = [
        mptk.prune(Mapped(mapped=mapped), example_inputs=X, method=method, sparsity=0.25, align=1, seed=0)
        for mapped in (True, False)
    ]
    assert cut[0].plan.families["channels"].width < 12
    if method != "fisher":  # which has Wanda's score there
        assert cut[0].plan == cut[1].plan


class Ensemble(nn.Module):
    """The mean of three networks of one shape, whose weights ``torch.vmap`` takes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(three() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights, buffers = torch.func.stack_module_state(list(self.nets))
        one = lambda w, b: torch.func.functional_call(self.nets[0], (w, b), (x,))  # noqa: E731
        return torch.vmap(one)(weights, buffers).mean(0)


def test_weights_that_vmap_takes_apart_are_cut_by_scores_that_need_no_activations() -> None:
    with expect_error(AnalysisError):
        mptk.prune(Ensemble(), example_inputs=X, method="wanda", sparsity=0.25, align=1)
    cut = mptk.prune(Ensemble(), example_inputs=X, method="taylor", sparsity=0.25, align=1)
    assert cut.model(X).shape == Ensemble()(X).shape
    assert sum(p.numel() for p in cut.model.parameters()) < sum(p.numel() for p in Ensemble().parameters())
