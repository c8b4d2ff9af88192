"""Plain modules at the edges of what can be cut: each is cut and proven, or refused by name; none ends in a bare error."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from made_modules import Made
from torch import Tensor, nn

import mptk
from mptk.errors import AnalysisError, BudgetError, TargetError, TraceError
from mptk.testing import expect_error

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def three() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).eval()


def make_gradient() -> nn.Module:
    """What an energy model gives: the gradient of a network by its input."""

    def forward(m: Made, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(m.net(x).sum(), x)[0]

    return Made(forward, net=three())


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[mptk.MptkError], str]] = {
    "without a family": (lambda: nn.Linear(8, 4), AnalysisError, ""),
    "a gradient": (make_gradient, TraceError, "Made"),
    "jit.trace": (lambda: torch.jit.trace(three(), X), TraceError, "Sequential"),
    "jit.script": (lambda: torch.jit.script(three()), TraceError, "Sequential"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_cannot_be_pruned_is_refused_by_name(kind):
    make, error, name = REFUSED[kind]
    with expect_error(error, name=name):
        mptk.prune(make(), sparsity=0.5, example_inputs=X, progress=None)


def test_an_unbatched_transposed_convolution_is_cut():
    """Convolutions of one sample at a time, as [channels, length]."""

    def forward(m: Made, x: Tensor) -> Tensor:
        return torch.stack([m.second(m.first(row).relu()) for row in (x[0], x[1])])

    net = Made(forward, first=nn.Conv1d(5, 12, 3), second=nn.ConvTranspose1d(12, 4, 3))
    pruned = mptk.prune(net, sparsity=0.5, example_inputs=X, progress=None)
    assert pruned.model.get_parameter("second.weight").shape == (6, 4, 3)


def recur(kind: type[nn.RNNBase], **options: int) -> Made:
    """A recurrent layer over the steps, and a head."""
    head = nn.Linear(24 if options.get("bidirectional") else 12, 5)
    return Made(lambda m, x: m.head(m.layer(x)[0]), layer=kind(8, 12, batch_first=True, **options), head=head)


@pytest.mark.parametrize(
    ("kind", "options", "gates"), [(nn.LSTM, {}, 4), (nn.GRU, {"num_layers": 2, "bidirectional": True}, 3)]
)
def test_the_hidden_units_of_a_recurrent_layer_are_cut(kind, options, gates):
    pruned = mptk.prune(recur(kind, **options), sparsity=0.5, tolerance=0.1, example_inputs=X, progress=None)
    (width,) = pruned.plan.widths.values()
    assert pruned.model.get_parameter("layer.weight_hh_l0").shape == (gates * width, width)
    assert pruned.model(torch.randn(3, 5, 8)).shape[0] == 3


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m))])
def test_a_wrapped_module_is_pruned_as_the_module_in_it(wrap):
    module = three()
    alone, wrapped = (mptk.prune(m, sparsity=0.5, example_inputs=X, progress=None) for m in (module, wrap(module)))
    assert wrapped.plan == alone.plan
    assert wrapped.report.model == "Sequential"
    assert torch.equal(wrapped.model(X), alone.model(X))
    analysis = mptk.analyze(wrap(module), (X,))
    assert mptk.rewrite(analysis, wrapped.plan).state.keys() == module.state_dict().keys()


def test_no_remedy_names_the_target_that_is_in_use():
    with expect_error(BudgetError) as refused:
        mptk.prune(three(), sparsity=0.29, tolerance=0.001, example_inputs=X, progress=None)
    assert "graph" not in refused.value.remedy


def between(up: nn.Module, down: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(up=up, relu=nn.ReLU(), down=down))


def test_channels_of_convolutions_are_no_feed_forward_width():
    mixed = Made(
        lambda m, x: m.down(m.depthwise(m.up(x).transpose(1, 2)).transpose(1, 2).relu()),
        up=nn.Linear(6, 16),
        down=nn.Linear(16, 6),
        depthwise=nn.Conv1d(16, 16, 3, padding=1, groups=16),
    )
    for net, sizes, name in [
        (between(nn.Linear(6, 16), nn.Linear(16, 4)), (2, 5, 6), "ffn"),
        (between(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 3)), (2, 3, 9, 9), "conv"),
        (between(nn.Conv2d(3, 16, 1), nn.ConvTranspose2d(16, 4, 3)), (2, 3, 9, 9), "conv"),
        (between(nn.Conv1d(3, 16, 3), nn.Conv1d(16, 4, 3)), (2, 3, 9), "conv"),
        (between(nn.Conv1d(3, 16, 1), nn.Conv1d(16, 4, 1)), (2, 3, 9), "ffn"),
        (mixed, (2, 5, 6), "ffn"),
    ]:
        assert [family.name for family in mptk.analyze(mptk.trace(net, torch.randn(sizes))).families] == [name]


def test_units_without_a_narrower_aligned_width_are_named():
    module = recur(nn.GRU, bidirectional=True)  # 24 channels
    with expect_error(TargetError, name="graph"):
        mptk.prune(module, sparsity=0.3, tolerance=0.2, align=24, example_inputs=X, progress=None)
    assert mptk.prune(module, sparsity=0.3, tolerance=0.2, align=1, example_inputs=X, progress=None) is not None


@pytest.mark.parametrize("method", ["wanda", "fisher", "taylor"])
def test_layers_under_vmap_are_scored_as_without_it(method):
    asked = {"example_inputs": X, "method": method, "sparsity": 0.25, "align": 1, "seed": 0}
    cut = [
        mptk.prune(Made(body, net=three()), **asked)
        for body in (lambda m, x: torch.vmap(m.net)(x), lambda m, x: m.net(x))
    ]
    assert cut[0].plan.families["channels"].width < 12
    if method != "fisher":  # which has Wanda's score there
        assert cut[0].plan == cut[1].plan


def ensemble() -> Made:
    """The mean of three networks of one shape, whose weights ``torch.vmap`` takes apart."""

    def forward(m: Made, x: Tensor) -> Tensor:
        weights, buffers = torch.func.stack_module_state(list(m.nets))
        one = lambda w, b: torch.func.functional_call(m.nets[0], (w, b), (x,))  # noqa: E731
        return torch.vmap(one)(weights, buffers).mean(0)

    return Made(forward, nets=nn.ModuleList(three() for _ in range(3)))


def test_weights_that_vmap_takes_apart_are_cut_by_scores_that_need_no_activations():
    with expect_error(AnalysisError):
        mptk.prune(ensemble(), example_inputs=X, method="wanda", sparsity=0.25, align=1)
    cut = mptk.prune(ensemble(), example_inputs=X, method="taylor", sparsity=0.25, align=1)
    assert cut.model(X).shape == ensemble()(X).shape
    assert sum(p.numel() for p in cut.model.parameters()) < sum(p.numel() for p in ensemble().parameters())
