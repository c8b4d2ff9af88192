"""A program: its description, as plain data that one line of JSON holds, and the module that it describes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .catalogue import CATALOGUE, Applied, Maker, Step

BATCH, LENGTH, INPUT, VOCAB, OUTPUT = 3, 5, 7, 13, 11
WIDTHS = (6, 8, 10, 12, 14, 18)
WIDEST = 40
SOURCES = ("float", "tokens")
FORMS = ("tensor", "tuple", "list", "dict", "nested tuple", "nested list", "nested dict")


@dataclass(frozen=True)
class Program:
    """``steps`` run one after the other on a stem of ``width`` channels; the heads take what no step has taken.

    ``heads`` are one for each tensor of the output; the first sums over all values that are left over, the others take
    the newest value, the one before, … ``form`` says how the outputs are nested. ``seed`` is that of weights, inputs
    and plans.
    """

    source: str = "float"
    width: int = 6
    steps: tuple[Step, ...] = ()
    heads: tuple[str, ...] = ("linear",)
    form: str = "tensor"
    seed: int = 0

    def __repr__(self) -> str:
        steps = [[s.kind, list(s.inputs), dict(s.options)] for s in self.steps]
        return json.dumps([self.source, self.width, steps, list(self.heads), self.form, self.seed])

    @staticmethod
    def parse(text: str) -> Program:
        """The program that ``repr`` printed."""
        source, width, steps, heads, form, seed = json.loads(text)
        made = tuple(Step(kind, tuple(inputs), options) for kind, inputs, options in steps)
        return Program(source, width, made, tuple(heads), form, seed)


class Module(nn.Module):
    """What a program describes. Its parameters are made by the first call."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.stem = (
            nn.Embedding(VOCAB, program.width) if program.source == "tokens" else nn.Linear(INPUT, program.width)
        )
        self.steps = nn.ModuleList(Applied(_with_fitting(s.kind), s.options) for s in program.steps)
        self.heads = nn.ModuleList(Applied(_head, {"kind": kind}) for kind in program.heads)

    def forward(self, x: Tensor) -> Any:
        values = [self.stem(x)] if self.program.source == "tokens" else [x, self.stem(x)]
        loose = [values[-1]]
        for step, applied in zip(self.program.steps, self.steps, strict=True):
            taken = [values[-1 - i % len(values)] for i in step.inputs]
            if CATALOGUE[step.kind].writes and (taken[0] is x or _overlaps(taken[0])):
                taken[0] = taken[0].clone()
            loose = [v for v in loose if not any(v is t for t in taken)]
            values.append(applied(*taken))
            loose.append(values[-1])
        rest = [values[-1 - i % len(values)] for i in range(len(self.heads) - 1)]
        sources = [loose, *([v] for v in rest)]
        heads = [head(self.stem.weight, *taken) for head, taken in zip(self.heads, sources, strict=True)]
        return _nest(heads, self.program.form)


def _overlaps(x: Tensor) -> bool:
    """Whether elements share memory, as after expand: torch refuses to write to such a tensor."""
    return any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))


def _with_fitting(kind: str) -> Any:
    """A kind's function, behind a linear layer where the first input's width does not suit it."""
    found = CATALOGUE[kind]

    def function(make: Maker, x: Tensor, *others: Tensor, **options: Any) -> Tensor:
        width = x.shape[-1]
        if width % found.multiple or width > WIDEST or width < 4:
            x = make.linear(x, next(w for w in (*WIDTHS[1:], WIDTHS[0]) if w % found.multiple == 0))
        return found.function(make, x, *others, **options)

    return function


def _head(make: Maker, stem: Tensor, *values: Tensor, kind: str) -> Tensor:
    """The results of one kind of head on each value, added; ``raw`` is the newest value as it is."""
    if kind == "raw":
        return values[-1]
    results = [_reduce(make, stem, v, kind) for v in values]
    return sum(results[1:], results[0])


def _reduce(make: Maker, stem: Tensor, x: Tensor, kind: str) -> Tensor:
    if kind in ("sum", "mean"):
        return getattr(x, kind)(-1, keepdim=True)
    if kind == "last":
        return make.linear(x[:, -1:], OUTPUT)
    if kind == "flat":
        return make.linear(x.flatten(1), OUTPUT)[:, None]
    if kind == "tied":
        width = stem.shape[1] if stem.shape[0] == VOCAB else stem.shape[0]
        x = make.fit(x, width)
        return x @ (stem.t() if stem.shape[0] == VOCAB else stem)
    return make.linear(x, OUTPUT)


def _nest(heads: Sequence[Tensor], form: str) -> Any:
    names: Mapping[str, Any] = {f"y{i}": y for i, y in enumerate(heads)}
    forms = {"tuple": tuple(heads), "list": list(heads), "dict": names}
    kind = form.removeprefix("nested ")
    if kind == "tensor":
        return heads[0]
    return forms[kind] if kind == form else {"tuple": (forms[kind],), "list": [forms[kind]], "dict": {"a": names}}[kind]


def build(program: Program) -> nn.Module:
    """The module of ``program`` with seeded weights, in evaluation mode and the default dtype."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(program.seed)
        module = Module(program).eval()
        module(*inputs_of(program))
        return module


def inputs_of(program: Program) -> tuple[Tensor]:
    """Token ids, or numbers in the default dtype: [B, T] or [B, T, INPUT]."""
    with torch.random.fork_rng():
        torch.manual_seed(program.seed + 1)
        ids = torch.randint(VOCAB, (BATCH, LENGTH))
        return (ids if program.source == "tokens" else torch.randn(BATCH, LENGTH, INPUT),)
