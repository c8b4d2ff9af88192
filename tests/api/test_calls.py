"""A pruned module at the call and in training: its gradients, its types and strides, its containers, state outside of it."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import mptk
from mptk.errors import DataError, InputError, ModelError, ProofError, TraceError
from mptk.testing import expect_error
from tests.programs.oracles import zeroed

ASKED: dict[str, Any] = {"sparsity": 0.3, "align": 1, "tolerance": 0.2, "method": "magnitude", "progress": None}
X = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.out, self.body = nn.Linear(8, 40), nn.Linear(40, 12), nn.Linear(12, 4), body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def prune(
    body: Callable[..., Any], out: Path | None = None, x: Tensor = X, **options: Any
) -> tuple[mptk.Pruned, nn.Module]:
    net = Net(body).eval()
    found = mptk.prune(net, out, example_inputs=x, onnx=False, **{**ASKED, **options})
    return found, zeroed(net, found.compiled.prepared.analysis, found.plan)


# ---- gradients ----


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    module.zero_grad()
    (module(X) * torch.arange(4)).sum().backward()
    return {name: p.grad for name, p in module.named_parameters()}


def without(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = net.up(x).relu()
    return net.out(net.down(h).relu())


def without_between(net: Any, x: Tensor) -> Tensor:
    """Gradients reach ``up`` only through the part in which they are on again."""
    with torch.no_grad():
        h = net.up(x)
        with torch.enable_grad():
            h = h * net.up.bias
    return net.out(net.down(h).relu())


@torch.no_grad()
def of_a_decorator(net: Any, x: Tensor) -> Tensor:
    return net.up(x).relu()


@pytest.mark.parametrize("body", [without, without_between, lambda net, x: net.out(net.down(of_a_decorator(net, x)))])
def test_a_part_without_gradients_stays_without(body, tmp_path):
    pruned, oracle = prune(body, tmp_path / "out")
    expected = gradients(oracle)
    assert not [note for note in pruned.report.notes if "gradients" in note]
    assert {row["stage"]: row["ok"] for row in pruned.report.proof}["gradients"]
    for module in (pruned.model, mptk.Pruned.open(tmp_path / "out").model):
        found = gradients(module)
        for name in ("up.weight", "out.bias", "down.bias"):
            if expected[name] is None:
                assert found[name] is None or not found[name].any()
            else:
                assert found[name].abs().max() == pytest.approx(expected[name].abs().max().item(), rel=1e-4)


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return (x * 4).round() / 4

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient


def doubled(net: Any, x: Tensor) -> Tensor:
    h = net.up(x).relu()
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * 2)
    return net.out(net.down(h))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            lambda net, x: net.out(net.down(Straight.apply(net.up(x)))),
            r"Straight \(test_calls.py:\d+\) has a backward of its own",
        ),
        (doubled, r"a hook on the gradient of a tensor \(test_calls.py:\d+\)"),
    ],
)
def test_a_backward_that_no_graph_holds_is_said_with_its_line(body, said):
    (note,) = (note for note in prune(body)[0].report.notes if note.startswith("gradients: "))
    assert re.search(said, note), note


@pytest.mark.always
def test_a_wrong_gradient_fails_the_proof(inside):
    inside.around(
        "mptk.proof.proof.cut_gradients", lambda real, *given: {name: g * 2 for name, g in real(*given).items()}
    )
    with expect_error(ProofError, name="gradients"):
        prune(lambda net, x: net.out(net.down(net.up(x))))


@pytest.mark.parametrize(
    ("body", "leaf"),
    [
        (lambda net, x: net.out(net.down(net.up(x))) * (2 if torch.is_grad_enabled() else 1), False),
        (lambda net, x: net.out(net.down(net.up(x))) * (2 if x.requires_grad else 1), True),
    ],
)
def test_a_branch_on_gradients_is_refused_on_the_other_side(body, leaf):
    pruned, oracle = prune(body)
    assert [note for note in pruned.report.notes if note.startswith("gradients: ")]
    with torch.no_grad():
        torch.testing.assert_close(pruned.model(X), oracle(X))
    for module in (pruned.model, copy.deepcopy(pruned.model)):
        with expect_error(InputError):
            module(X.clone().requires_grad_(leaf))


# ---- types and strides ----


def test_inputs_of_other_types_and_strides_are_refused():
    def by_type(net: Any, x: Tensor) -> Tensor:
        return net.out(net.down(net.up(x.float() * (3 if x.dtype == torch.bool else 1))))

    whole = torch.randint(0, 5, (3, 6, 8))
    pruned, oracle = prune(by_type, x=whole)
    torch.testing.assert_close(pruned.model(whole), oracle(whole))
    for other in (whole.bool(), whole.int(), whole.float()):
        with expect_error(DataError, name="x"):
            pruned.model(other)

    def by_stride(net: Any, x: Tensor) -> Tensor:
        return net.out(net.down(net.up(x))) * (1 if x.is_contiguous() else 2)

    pruned, oracle = prune(by_stride)
    torch.testing.assert_close(pruned.model(X), oracle(X))
    with expect_error(DataError, name="x"):
        pruned.model(X.transpose(0, 1).contiguous().transpose(0, 1))
    free, oracle = prune(lambda net, x: net.out(net.down(net.up(x))))
    strided = X.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(free.model(strided), oracle(strided))


def test_a_converted_module_takes_inputs_of_its_type_or_says_why_not():
    free, _ = prune(lambda net, x: net.out(net.down(net.up(x))))
    with expect_error(DataError, name="x"):
        free.model(X.double())
    assert free.model.double()(X.double()).dtype is torch.float64
    held, _ = prune(lambda net, x: net.out(net.down(net.up(x.double().float()))))
    module = held.model.double()
    with expect_error(ModelError):
        module(X.double())
    assert module.float()(X).dtype is torch.float32


# ---- names ----


class Named(Net):
    def forward(self, x: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        y = self.out(self.down(self.up(x)))
        y = y if bias is None else y + bias
        return y if scale is None else y * scale


class ByPosition(Net):
    def forward(self, x: Tensor, scale: Tensor, /) -> Tensor:
        return self.out(self.down(self.up(x))) * scale


class ByName(Net):
    def forward(self, *, x: Tensor, scale: Tensor) -> Tensor:
        return self.out(self.down(self.up(x))) * scale


def test_inputs_by_position_and_by_name_are_forwards_own(tmp_path):
    """The second argument by position is not the second of the example."""
    scale = torch.rand(3, 1, 1)
    given = {"x": X, "scale": scale}
    named = mptk.prune(Named(len).eval(), tmp_path / "out", example_inputs=given, onnx=False, **ASKED)
    for module in (named.model, mptk.Pruned.open(tmp_path / "out").model):
        assert torch.equal(module(X, scale=scale), module(scale=scale, x=X))
        with pytest.raises(TypeError):
            module(X, scale)
        with pytest.raises(TypeError):
            module(X, bias=scale)
    placed = mptk.prune(ByPosition(len).eval(), example_inputs=(X, scale), **ASKED).model
    assert placed(X, scale).shape == (3, 6, 4)
    only = mptk.prune(ByName(len).eval(), example_inputs=given, **ASKED).model
    assert only(**given).shape == (3, 6, 4)


# ---- containers ----


class Pair(NamedTuple):
    first: Tensor
    second: Tensor | None


@dataclasses.dataclass
class Both:
    logits: Tensor
    more: dict[str, Any]


CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "a dict": lambda y: {"a": y, "b": y + 1},
    "a tuple of one": lambda y: (y,),
    "a list in a tuple": lambda y: ([y, None], y.mean(-1), "text"),
    "a named tuple": lambda y: Pair(y, None),
    "a dataclass": lambda y: Both(y, {"x": [y, 3]}),
}


def test_outputs_come_back_as_forward_returned_them(tmp_path):
    """All containers at once, as the parts of a dict."""
    pruned, oracle = prune(
        lambda net, x: {name: make(net.out(net.down(net.up(x)))) for name, make in CONTAINERS.items()}, tmp_path / "out"
    )
    expected = oracle(X)
    opened = mptk.Pruned.open(tmp_path / "out").model
    for module in (pruned.model, opened, copy.deepcopy(opened), pickle.loads(pickle.dumps(opened))):  # noqa: S301
        found = module(X)
        for name in CONTAINERS:
            assert type(found[name]).__name__ == type(expected[name]).__name__
        assert_same(found, expected)


@pytest.mark.parametrize("name", ["a tuple of one", "a dataclass"])
def test_a_container_is_the_whole_output(name):
    make = CONTAINERS[name]
    pruned, oracle = prune(lambda net, x: make(net.out(net.down(net.up(x)))))
    found, expected = pruned.model(X), oracle(X)
    assert type(found).__name__ == type(expected).__name__
    assert_same(found, expected)


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected)
    elif dataclasses.is_dataclass(expected):
        assert_same(vars(found), vars(expected))
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert_same(list(found.values()), list(expected.values()))
    elif isinstance(expected, list | tuple):
        assert getattr(found, "_fields", None) == getattr(expected, "_fields", None)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def test_an_output_that_no_graph_gives_back_is_refused_by_name():
    class Odd:
        def __init__(self, y: Tensor) -> None:
            self.y = y

    with expect_error(TraceError, name="Odd"):
        prune(lambda net, x: Odd(net.out(net.down(net.up(x)))))


# ---- state outside of attributes ----

CALLS = 0
SEEN: list[int] = []


def counted(net: Any, x: Tensor) -> Tensor:
    global CALLS
    CALLS += 1
    return net.out(net.down(net.up(x))) * (2 if CALLS > 100 else 1)


def listed(net: Any, x: Tensor) -> Tensor:
    SEEN.append(len(x))
    return net.out(net.down(net.up(x)))


def closed_over() -> Callable[..., Any]:
    calls = 0

    def body(net: Any, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return net.out(net.down(net.up(x)))

    return body


class Ticking:
    """A callable object that keeps a number."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, net: Any, x: Tensor) -> Tensor:
        self.calls += 1
        return net.out(net.down(net.up(x)))


class Counting(Net):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x)


@pytest.mark.parametrize(("body", "name"), [(counted, "CALLS"), (listed, "SEEN"), (closed_over(), "body.calls")])
def test_state_outside_of_a_module_is_refused_by_name(body, name):
    with expect_error(TraceError, name=name):
        prune(body)


def test_state_of_a_class_and_of_a_hook_is_refused_by_name():
    plain = lambda net, x: net.out(net.down(net.up(x)))  # noqa: E731
    with expect_error(TraceError, name="body"):
        prune(Ticking())
    listed = Net(plain)
    listed.bodies = [closed_over()]
    listed.body = lambda net, x: net.bodies[0](net, x)
    with expect_error(TraceError, name="body.calls"):
        mptk.prune(listed, example_inputs=X, **ASKED)
    with expect_error(TraceError, name="Counting.calls"):
        mptk.prune(Counting(plain), example_inputs=X, **ASKED)
    seen = {"calls": 0}

    def hook(module: nn.Module, given: Any) -> None:
        seen["calls"] += 1

    net = Net(plain)
    net.up.register_forward_pre_hook(hook)
    with expect_error(TraceError, name="hook.seen"):
        mptk.prune(net, example_inputs=X, **ASKED)
