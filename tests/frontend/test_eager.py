"""A module given in memory: its traced program is the module itself, at other sizes, at a second call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from live_modules import INNER, QUICK, WIDTH, draw_input, is_near, prune_live, zero_removed
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import mptk
from mptk.errors import DataError, TraceError
from mptk.testing import draw_plan, expect_error
from tests.programs.oracles import zeroed


class Net(nn.Module):
    """x → down(body(relu(up(x)))), with buffers and attributes for ``body``."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.other = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH), nn.Linear(INNER, WIDTH)
        self.register_buffer("mean", torch.rand(INNER))
        self.body, self.calls, self.seen = body, 0, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.up(x).relu())


SAID = " (test_eager.py:"
# Body → the sizes of the example, of a call that is refused and of one that is taken; what the trace fixed.
FIXED: dict[str, tuple[Any, ...]] = {
    "centred": (
        lambda net, h: net.down(h - h.mean(0) if h.shape[0] > 1 else h),
        *((2, 6), (1, 6), (3, 9), "batch", "batch > 1"),
    ),
    "long or short": (
        lambda net, h: net.down(h) if h.shape[1] > 4 else net.other(h),
        *((2, 6), (2, 3), (1, 9), "x.shape[1] > 4", f"x.shape[1] > 4{SAID}"),
    ),
    "mean by number": (
        lambda net, h: net.down(h).sum(1) / float(h.shape[1]),
        *((2, 6), (2, 9), (3, 6), "x.shape[1]", f"x.shape[1] = 6{SAID}"),
    ),
    "one by one": (
        lambda net, h: torch.stack([net.down(h[i]) for i in range(len(h))]),
        *((2, 6), (5, 6), (2, 9), "batch", f"batch = 2{SAID}"),
    ),
    "pooled": (
        lambda net, h: net.down(F.avg_pool1d(h.transpose(1, 2), max(1, h.shape[1] // 3)).transpose(1, 2)),
        *((2, 6), (2, 9), (3, 7), "Max(1, (x.shape[1]//3)) = 2", f"Max(1, (x.shape[1]//3)) = 2{SAID}"),
    ),
    "in three": (
        lambda net, h: net.down(torch.cat([part * k for k, part in enumerate(h.chunk(3, 1))], 1)),
        *((2, 6), (2, 4), (1, 6), None, f"= 3{SAID}"),
    ),
    "every third": (
        lambda net, h: net.down(h if h.shape[1] % 3 == 0 else -h),
        *((2, 6), (2, 7), (3, 9), "Mod(x.shape[1], 3) = 0", f"Mod(x.shape[1], 3) = 0{SAID}"),
    ),
}
ONE_BY_ONE, BY_NUMBER, EVERY_THIRD = (FIXED[name][0] for name in ("one by one", "mean by number", "every third"))


# ---- sizes ----


@pytest.mark.parametrize("fixed", FIXED)
def test_what_the_trace_fixed_is_said_and_refused_at_the_call(fixed):
    body, example, refused, taken, name, noted = FIXED[fixed]
    net = Net(body)
    pruned = prune_live(net, draw_input(*example))
    (note,) = (note for note in pruned.report.notes if note.startswith("fixed: "))
    assert noted in note
    small, eager = pruned.model, zero_removed(net, pruned)
    for sizes in (example, taken):
        assert is_near(small(draw_input(*sizes)), eager(draw_input(*sizes)))
    with expect_error(DataError, name=name):
        small(draw_input(*refused))


def test_a_line_that_fixed_several_conditions_is_said_once():
    def count(net: Any, h: Tensor) -> Tensor:
        return net.down(h * sum(2 if h.shape[1] > k else 3 for k in range(2, 6)))

    (note,) = (note for note in prune_live(Net(count), draw_input(2, 9)).report.notes if note.startswith("fixed: "))
    assert note.count("test_eager.py:") == 1


@pytest.mark.parametrize("fixed", ["centred", "long or short"])
def test_a_program_that_is_rewritten_by_hand_refuses_the_same(fixed):
    body, example, refused, taken, name, _ = FIXED[fixed]
    net = Net(body).eval()
    analysis = mptk.analyze(mptk.trace(net, draw_input(*example), dynamic=True))
    plan = draw_plan(analysis)
    small, eager = mptk.rewrite(analysis, plan).module(), zeroed(net, analysis, plan)
    assert is_near(small(draw_input(*taken)), eager(draw_input(*taken)))
    with expect_error(DataError, name=name):
        small(draw_input(*refused))


def test_sizes_that_tensors_carry_stay_open():
    def open_(net: Any, h: Tensor) -> Tensor:
        rows = h.reshape(h.shape[0] * h.shape[1], -1) / h.shape[1]
        return net.down(
            rows.view(h.shape[0], -1, rows.shape[1]) + torch.zeros(1, h.shape[1], 1).expand(h.shape[0], -1, -1)
        )

    net = Net(open_)
    pruned = prune_live(net, draw_input(1, 6))
    assert not [note for note in pruned.report.notes if "fixed" in note]
    small, eager = pruned.model, zero_removed(net, pruned)
    for sizes in ((1, 6), (4, 6), (1, 1), (3, 9), (2, 1)):
        assert is_near(small(draw_input(*sizes)), eager(draw_input(*sizes)))


def test_a_static_trace_takes_the_sizes_of_its_example_only():
    analysis = mptk.analyze(Net(lambda net, h: net.down(h)), draw_input(2, 6))
    small = mptk.rewrite(analysis, draw_plan(analysis)).module()
    assert small(draw_input(2, 6)).shape == (2, 6, WIDTH)
    for sizes, name in (((3, 6), "batch"), ((2, 7), "x.shape[1]"), ((2,), "x")):
        with expect_error(DataError, name=name):
            small(draw_input(*sizes))


class Chosen(nn.Module):
    """Rows of x by their numbers; ``least``: the fewest samples that it takes."""

    def __init__(self, least: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.least = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH), least

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if ids.shape[0] < self.least:
            raise ValueError("too few samples")
        h = self.up(x).relu()
        return self.down(h.gather(1, ids[:, :, None].expand(-1, -1, INNER)))


def test_a_size_of_1_that_other_inputs_must_have_too_is_open():
    """One sample beside several ids, or one row beside ids of several, is refused by the module itself."""
    net, ids = Chosen(), torch.arange(15).view(3, 5) % 6
    pruned = mptk.prune(net, example_inputs=(draw_input(3, 6), ids), **QUICK)
    eager = zero_removed(net, pruned)
    for batch, rows, count in ((1, 6, 5), (3, 1, 5), (2, 6, 1), (1, 1, 1), (4, 9, 7)):
        given = draw_input(batch, rows), torch.arange(batch * count).view(batch, count) % rows
        assert is_near(pruned.model(*given), eager(*given))
    strict = mptk.prune(Chosen(least=2), example_inputs=(draw_input(3, 6), ids), **QUICK).model
    with expect_error(DataError, name="x.shape[0]"):
        strict(draw_input(1, 6), ids[:1])


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.down(self.up(x).relu() + self.up(y)) / x.shape[1]


def test_two_inputs_of_one_length_must_agree():
    pruned = mptk.prune(Two(), example_inputs=(draw_input(2, 6), draw_input(2, 6)), **QUICK)
    assert pruned.model(draw_input(3, 5), draw_input(3, 5)).shape == (3, 5, WIDTH)
    with expect_error(DataError, name="y.shape[1]"):
        pruned.model(draw_input(3, 5), draw_input(3, 1))


def test_a_module_of_one_batch_is_calibrated_proven_and_verified_in_such_batches(tmp_path):
    net = Net(ONE_BY_ONE)
    pruned = prune_live(net, draw_input(3, 6), method="wanda", data=draw_input(7, 6))
    assert pruned.report.data["calibration"]["samples"] == 6
    assert all(d.ok for d in mptk.verify(pruned.save(tmp_path / "out"), model=net))
    assert mptk.evaluate(pruned, draw_input(4, 6), progress=None)["model"] > 0
    with expect_error(DataError, name="data"):
        prune_live(Net(BY_NUMBER), draw_input(2, 6), data=draw_input(4, 5))


def test_what_a_first_trace_fixed_holds_for_a_module_that_is_pruned_twice():
    first = prune_live(Net(EVERY_THIRD), draw_input(2, 6), sparsity=0.2)
    second = prune_live(first.model, draw_input(2, 6), sparsity=0.3)
    assert second.model(draw_input(3, 9)).shape == (3, 9, WIDTH)
    with expect_error(DataError, name="Mod(x.shape[1], 3) = 0"):
        second.model(draw_input(2, 7))


def test_where_no_trace_with_open_sizes_works_fewer_are_left_open():
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 12, 3, stride=4), nn.Conv2d(12, 16, 3, padding=1)
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.one(x))
            if not isinstance(h.shape[2], int):  # an open size is none
                raise TypeError("heights are integers")
            return self.head(F.relu(self.two(h)).mean((2, 3)))

    x = torch.randn(2, 3, 16, 16)
    with expect_error(TraceError, name="Images"):  # as AlexNet at 64 x 64
        mptk.trace(Images(), x, dynamic=True)
    pruned = prune_live(Images(), x)
    (note,) = (note for note in pruned.report.notes if "left open, since torch.export cannot trace" in note)
    assert pruned.model(torch.randn(5, 3, 16, 16)).shape == (5, 5), note
    with expect_error(DataError, name="x.shape[2]"):
        pruned.model(torch.randn(2, 3, 20, 16))


# ---- state ----


def assigned(net: Any, h: Tensor) -> Tensor:
    net.mean = 0.9 * net.mean + 0.1 * h.mean((0, 1))
    return net.down(h + net.mean)


def written(net: Any, h: Tensor) -> Tensor:
    net.mean.mul_(0.9).add_(0.1 * h.mean((0, 1)))
    return net.down(h + net.mean)


def running(net: Any, h: Tensor) -> Tensor:
    """Batch norm by the input's own statistics, whose schema does not say that it writes the running ones."""
    y = F.batch_norm(h.transpose(1, 2), net.mean, torch.ones_like(net.mean), training=True)
    return net.down(y.transpose(1, 2) + net.mean)


@pytest.mark.parametrize("body", [assigned, written])
def test_a_buffer_that_forward_changes_is_the_same_at_each_call(body):
    net = Net(body)
    pruned = prune_live(net, draw_input(2, 6))
    small, eager = pruned.model, zero_removed(net, pruned)
    for seed, sizes in enumerate([(2, 6), (2, 6), (1, 3), (2, 6)]):
        assert is_near(small(draw_input(*sizes, seed=seed)), eager(draw_input(*sizes, seed=seed)))
    kept = eager.mean[eager.mean != 0]
    assert is_near(small.mean, kept)


def grows(net: Any, h: Tensor) -> Tensor:
    net.mean = torch.cat([net.mean, h.mean((0, 1))])
    return net.down(h + net.mean[-INNER:])


def counts(net: Any, h: Tensor) -> Tensor:
    net.calls += 1
    return net.down(h) * net.calls


def only_counts(net: Any, h: Tensor) -> Tensor:
    net.calls += 1
    return net.down(h)


def remembers(net: Any, h: Tensor) -> Tensor:
    net.seen.append(h.shape[0])
    return net.down(h)


@pytest.mark.parametrize(
    ("body", "name"), [(grows, "mean"), (counts, "calls"), (only_counts, "calls"), (remembers, "seen")]
)
def test_other_state_is_refused_by_name(body, name):
    with expect_error(TraceError, name=name):
        prune_live(Net(body), draw_input(2, 6))
    analysis = mptk.analyze(Net(body), draw_input(2, 6))
    with expect_error(TraceError, name=name):
        mptk.rewrite(analysis, draw_plan(analysis))


def state_of(net: nn.Module) -> tuple[object, ...]:
    """All that a user could see of a module."""
    tensors = [(n, t.tolist(), t.requires_grad) for n, t in (*net.named_parameters(), *net.named_buffers())]
    plain = [
        (name, part.training, {k: copy.copy(v) for k, v in vars(part).items() if isinstance(v, int | list | str)})
        for name, part in net.named_modules()
    ]
    hooks = [(list(part._forward_hooks), list(part._forward_pre_hooks)) for part in net.modules()]
    return tensors, plain, hooks


@pytest.mark.parametrize("body", [written, assigned, running, counts])
def test_the_given_module_stays_as_it_is(body):
    net = Net(body).train()
    net.up.weight.requires_grad_(False)
    net.down.eval()
    net.down.register_forward_hook(lambda module, given, result: result * 1)
    before = state_of(net)
    try:
        prune_live(net, draw_input(2, 6))
        analysis = mptk.analyze(net, draw_input(2, 6))
        mptk.rewrite(analysis, draw_plan(analysis))
    except TraceError:
        assert body is counts
    assert state_of(net) == before


class Cached(nn.Module):
    """A decoder with a static cache whose tensors are buffers, as transformers exports it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=61, hidden_size=16, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2
        )
        self.model = LlamaForCausalLM(config).eval()
        self.cache = StaticCache(config=config, max_cache_len=12)
        self.cache.early_initialization(2, 2, 8, torch.float32, torch.device("cpu"))
        for i, layer in enumerate(self.cache.layers):
            self.register_buffer(f"keys_{i}", layer.keys)
            self.register_buffer(f"values_{i}", layer.values)
            self.register_buffer(f"length_{i}", layer.cumulative_length)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, past_key_values=self.cache, use_cache=True).logits


def test_a_static_cache_stays_as_it_is_and_fills_in_the_pruned_module():
    net, ids = Cached(), torch.arange(10).reshape(2, 5)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pruned = prune_live(net, ids, families="ffn")
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    small, eager = pruned.model, zero_removed(net, pruned)
    for _ in range(2):
        assert is_near(small(ids), eager(ids))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
