"""Random modules with Python in their ``forward``: branches and loops on sizes, state, several types and inputs.

Each is pruned through the public API. The pruned module and the eager one, whose removed weights are zero, are then
called side by side: at the example's sizes, twice, and at others. Every call must be equal or refused.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mptk
from mptk import MptkError, ProofError
from tests.programs.oracles import disturbed, zeroed

INPUT, OUTPUT = 7, 5
TYPES = {"float32": 1e-4, "float64": 1e-9, "bfloat16": 5e-2, "mixed": 5e-2}
"""The types of a module's layers → how near its outputs must come, relative to the largest."""
REFUSED, EQUAL = "refused", "equal"
PIECES: dict[str, Callable[..., Tensor]] = {}


def piece(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Something that ``forward`` does to ``h`` [batch, length, width], a layer's hidden units; ``k``: a number."""
    PIECES[function.__name__] = function
    return function


# ---- branches ----


@piece
def batch_above(own: Layer, h: Tensor, k: int) -> Tensor:
    return h - h.mean(0) if h.shape[0] > k % 3 else h * 2


@piece
def batch_is(own: Layer, h: Tensor, k: int) -> Tensor:
    return h * own.scale if h.shape[0] == 1 + k % 3 else h


@piece
def length_above(own: Layer, h: Tensor, k: int) -> Tensor:
    return h * own.scale if h.shape[1] > k else h + own.scale


@piece
def length_even(own: Layer, h: Tensor, k: int) -> Tensor:
    return h * own.scale if h.size(1) % 2 == k % 2 else h


@piece
def longer_than_wide(own: Layer, h: Tensor, k: int) -> Tensor:
    return h + h.mean(1, keepdim=True) if h.shape[0] > h.shape[1] else h


@piece
def squeezed(own: Layer, h: Tensor, k: int) -> Tensor:
    h = h.squeeze(k % 2)
    return (h * own.scale).unsqueeze(k % 2) if h.ndim == 2 else h


# ---- loops ----


@piece
def each_sample(own: Layer, h: Tensor, k: int) -> Tensor:
    return torch.stack([sample * own.scale for sample in h])


@piece
def each_position(own: Layer, h: Tensor, k: int) -> Tensor:
    state, found = h[:, 0], []
    for t in range(h.shape[1]):
        state = 0.5 * state + h[:, t] * own.scale
        found.append(state)
    return torch.stack(found, 1)


@piece
def as_often_as_long(own: Layer, h: Tensor, k: int) -> Tensor:
    for _ in range(h.shape[1] // (2 + k % 2)):
        h = torch.tanh(h * own.scale)
    return h


@piece
def halves(own: Layer, h: Tensor, k: int) -> Tensor:
    first, *rest = torch.chunk(h, 2 + k % 2, 1)
    return torch.cat([first * own.scale, *rest], 1)


# ---- sizes as numbers ----


@piece
def divided_by_float(own: Layer, h: Tensor, k: int) -> Tensor:
    return h * 5 / float(h.shape[k % 2])


@piece
def divided_by_size(own: Layer, h: Tensor, k: int) -> Tensor:
    return h * 5 / h.shape[k % 2]


@piece
def root(own: Layer, h: Tensor, k: int) -> Tensor:
    return h / math.sqrt(h.shape[1] * 2 + k)


@piece
def power(own: Layer, h: Tensor, k: int) -> Tensor:
    return h * (1 + h.shape[1]) ** -0.5


@piece
def pooled(own: Layer, h: Tensor, k: int) -> Tensor:
    return h + F.avg_pool1d(h.transpose(1, 2), max(1, h.shape[1] // 2)).mean(2)[:, None]


@piece
def first_part(own: Layer, h: Tensor, k: int) -> Tensor:
    return h + h[:, : (h.shape[1] + 1) // 2].mean(1, keepdim=True)


@piece
def at_most(own: Layer, h: Tensor, k: int) -> Tensor:
    return h + h[:, : min(h.shape[1], k)].mean(1, keepdim=True)


@piece
def positions(own: Layer, h: Tensor, k: int) -> Tensor:
    return h + torch.arange(h.shape[1], dtype=h.dtype)[:, None] * 0.1


@piece
def all_rows(own: Layer, h: Tensor, k: int) -> Tensor:
    rows = h.reshape(h.shape[0] * h.shape[1], -1)
    return (rows - rows.mean(0)).reshape(h.shape[0], h.shape[1], -1)


@piece
def counted(own: Layer, h: Tensor, k: int) -> Tensor:
    return h * (h.numel() // h.shape[-1]) / 10


# ---- state ----


@piece
def assigned(own: Layer, h: Tensor, k: int) -> Tensor:
    own.mean = 0.9 * own.mean + 0.1 * h.mean((0, 1))
    return h + own.mean


@piece
def written(own: Layer, h: Tensor, k: int) -> Tensor:
    own.mean.mul_(0.5).add_(0.5 * h.mean((0, 1)))
    return h + own.mean


@piece
def written_after(own: Layer, h: Tensor, k: int) -> Tensor:
    y = h + own.mean
    own.mean.copy_(h.amax((0, 1)))
    return y


@piece
def calls_in_a_buffer(own: Layer, h: Tensor, k: int) -> Tensor:
    own.calls += 1
    return h * own.calls


@piece
def calls_in_an_attribute(own: Layer, h: Tensor, k: int) -> Tensor:
    own.times += 1
    return h * own.times if k % 2 else h


@piece
def calls_in_a_list(own: Layer, h: Tensor, k: int) -> Tensor:
    own.seen.append(k)
    return h * len(own.seen)


@piece
def kept(own: Layer, h: Tensor, k: int) -> Tensor:
    own.last = h.detach()
    return h


@piece
def the_one_before(own: Layer, h: Tensor, k: int) -> Tensor:
    before, own.before = own.before, h.detach().mean((0, 1))
    return h + before


@piece
def made_once(own: Layer, h: Tensor, k: int) -> Tensor:
    table = own.tables.setdefault(int(h.shape[1]), torch.arange(h.shape[1], dtype=h.dtype)[:, None] / 10)
    return h + table


@piece
def growing(own: Layer, h: Tensor, k: int) -> Tensor:
    own.history = torch.cat([own.history, h.mean((0, 1))[None]])
    return h + own.history.mean(0)


# ---- types ----


@piece
def through_double(own: Layer, h: Tensor, k: int) -> Tensor:
    return (h.double() * 1.5).to(h.dtype)


@piece
def through_half(own: Layer, h: Tensor, k: int) -> Tensor:
    return h.to(torch.bfloat16).to(h.dtype) if h.dtype == torch.bfloat16 else h


class Layer(nn.Module):
    """x + down(pieces(relu(up(x)))). ``dtype``: that of its weights; what comes in is converted, and back."""

    def __init__(self, width: int, inner: int, pieces: Sequence[tuple[str, int]], dtype: torch.dtype) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner, dtype=dtype), nn.Linear(inner, width, dtype=dtype)
        self.scale = nn.Parameter(torch.rand(inner, dtype=dtype) + 0.5)
        self.register_buffer("mean", torch.rand(inner, dtype=dtype))
        self.register_buffer("history", torch.zeros(1, inner, dtype=dtype))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.pieces, self.dtype = pieces, dtype
        self.times, self.seen, self.tables, self.before = 0, list[int](), dict[int, Tensor](), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x.to(self.dtype)).relu()
        for name, k in self.pieces:
            h = PIECES[name](self, h, k)
        return x + self.down(h.to(self.dtype)).to(x.dtype)


class Module(nn.Module):
    """A stem, layers and a head; with ``second``, of two inputs."""

    def __init__(self, description: Description) -> None:
        super().__init__()
        torch.manual_seed(description.seed)
        d, types = description, description.dtypes
        self.stem, self.head = nn.Linear(INPUT, d.width, dtype=types[0]), nn.Linear(d.width, OUTPUT, dtype=types[0])
        self.layers = nn.ModuleList(
            Layer(d.width, inner, pieces, types[i % len(types)]) for i, (inner, pieces) in enumerate(d.layers)
        )
        self.side = nn.Linear(INPUT, d.width, dtype=types[0]) if d.second else None

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        if self.side is not None and y is not None:
            x = x + self.side(y)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@dataclass(frozen=True)
class Description:
    """A random module and the sizes of its example."""

    seed: int
    types: str
    width: int
    layers: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]
    second: bool
    batch: int
    length: int

    @property
    def dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16] if self.types == "mixed" else [getattr(torch, self.types)]

    def inputs(self, seed: int, batch: int, length: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        count = 2 if self.second else 1
        return [torch.randn(batch, length, INPUT, generator=generator).to(self.dtypes[0]) for _ in range(count)]


def described(seed: int) -> Description:
    """The module of a seed."""
    draw = random.Random(seed)
    layers = []
    for _ in range(draw.choice((1, 2))):
        names = draw.sample(sorted(PIECES), draw.choice((1, 1, 2)))
        layers.append((draw.choice((12, 16, 20)), tuple((name, draw.randrange(1, 8)) for name in names)))
    types = draw.choice(("float32", "float32", *TYPES))
    batch, length = draw.choice((1, 2, 2, 3)), draw.choice((4, 5, 6))
    return Description(seed, types, draw.choice((6, 8, 10)), tuple(layers), draw.random() < 0.25, batch, length)


@dataclass(frozen=True)
class Outcome:
    """``verdict``: refused, equal, or what is wrong. ``calls``: how many were equal and refused by size."""

    verdict: str
    cause: str = ""
    calls: tuple[int, int] = (0, 0)


def check(d: Description) -> Outcome:
    """Prune a module and call it beside the eager one with zeroed weights."""
    module = Module(d)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    options = {"sparsity": 0.3, "tolerance": 0.3, "align": 2, "method": "magnitude", "progress": None}
    try:
        pruned = mptk.prune(module, example_inputs=tuple(d.inputs(0, d.batch, d.length)), seed=d.seed, **options)
    except ProofError as error:
        return Outcome("wrong", str(error))
    except MptkError as error:
        return Outcome(REFUSED, str(error))
    if any(not torch.equal(before[name], tensor) for name, tensor in module.state_dict().items()):
        return Outcome("wrong", "the module that was given has changed")
    analysis = pruned.compiled.prepared.analysis
    assert not disturbed(analysis, pruned.plan)
    eager, small = zeroed(module, analysis, pruned.plan).eval(), pruned.model
    if wrong := _other_types(module, small):
        return Outcome("wrong", wrong)
    return _called(d, small, eager)


def _other_types(module: nn.Module, small: nn.Module) -> str:
    found = {name: tensor.dtype for name, tensor in small.state_dict().items()}
    return next((f"{n} is {found.get(n)}" for n, t in module.state_dict().items() if found.get(n) != t.dtype), "")


def _called(d: Description, small: nn.Module, eager: nn.Module) -> Outcome:
    equal = by_size = 0
    b, n = d.batch, d.length
    for seed, sizes in enumerate([(b, n), (b, n), (1, n), (b + 1, n), (5, n), (b, n + 1), (b, n + 4), (b, n - 2), (b, 1), (1, 1), (4, 9), (b, n)]):  # fmt: skip
        inputs = d.inputs(seed + 1, *sizes)
        try:
            found: Any = _run(small, inputs)
        except MptkError:
            by_size += 1
            continue
        except Exception as error:
            found = error
        try:
            expected: Any = _run(eager, inputs)
        except Exception as error:
            if not isinstance(found, Exception):
                return Outcome("wrong", f"{sizes}: computes, and the module raises {error}")
            continue
        if isinstance(found, Exception):
            return Outcome("crashed", f"{sizes}: {type(found).__name__}: {found}")
        if found.dtype != expected.dtype or found.shape != expected.shape:
            return Outcome("wrong", f"{sizes}: {found.dtype} {list(found.shape)}, not {expected.dtype} {list(expected.shape)}")  # fmt: skip
        apart = (found.double() - expected.double()).abs().max().item()
        if not apart <= TYPES[d.types] * max(1.0, expected.double().abs().max().item()):
            return Outcome("wrong", f"{sizes}: differs by {apart:.1e} at call {seed + 1}")
        equal += 1
    return Outcome(EQUAL, calls=(equal, by_size))


@torch.no_grad()
def _run(module: nn.Module, inputs: Sequence[Tensor]) -> Any:
    return module(*(x.clone() for x in inputs))
