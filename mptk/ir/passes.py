"""passes: the protocol of all passes that change a Program, and the loop that runs a list of them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import ClassVar

from torch import Tensor

from mptk.ir.program import Program, count_parameters


@dataclass(frozen=True)
class PassResult:
    """What a pass returns: the new program, whether it differs from the old one, and notes for people."""

    program: Program
    changed: bool
    notes: tuple[str, ...] = ()


class Pass(ABC):
    """One transformation: Program in, Program out.

    A pass is a frozen dataclass; its fields are its arguments. The first lines of the docstrings of the class,
    ``requires`` and ``ensures`` are printed by ``mptk passes``.
    """

    name: ClassVar[str]

    def requires(self, program: Program) -> None:  # noqa: B027 (most passes take any program)
        """Any program."""

    @abstractmethod
    def run(self, program: Program) -> PassResult:
        """Transform ``program``, which itself does not change."""

    @abstractmethod
    def ensures(self, before: Program, after: Program) -> None:
        """Check what holds after the pass, besides ``check``. Raises AssertionError if it does not hold."""

    def __call__(self, program: Program) -> PassResult:
        """Run the pass with its checks: requires, run, ``check``, ensures."""
        # The graph's invariants come before ``ensures``, which may then rely on them.
        self.requires(program)
        result = self.run(program)
        check(result.program)
        self.ensures(program, result.program)
        return result


@dataclass
class PassRecord:
    """The record of one stage: its seconds, and for a pass the ops and parameters before and after.

    Prints as ``rewrite: 1,204 → 1,188 ops, 134,515,008 → 98,211,456 parameters``.
    """

    name: str
    seconds: float = 0.0
    ops: tuple[int, int] | None = None
    parameters: tuple[int, int] | None = None
    changed: bool | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = {"ops": self.ops, "parameters": self.parameters}
        parts = [f"{pair[0]:,} → {pair[1]:,} {what}" for what, pair in counts.items() if pair is not None]
        return f"{self.name}: {', '.join([*parts, *self.notes]) or f'{self.seconds:.2f} s'}"


@dataclass
class Log:
    """The stages of a run in order, for the report. ``on_record`` is called with each finished stage."""

    records: list[PassRecord] = field(default_factory=list)
    on_record: Callable[[PassRecord], None] | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[PassRecord]:
        record, start = PassRecord(name), time.perf_counter()
        yield record
        record.seconds = round(time.perf_counter() - start, 2)
        self.add(record)

    def add(self, record: PassRecord) -> None:
        """Keep the record of a finished stage."""
        self.records.append(record)
        if self.on_record is not None:
            self.on_record(record)

    def to_list(self) -> list[dict[str, object]]:
        return [{k: v for k, v in asdict(r).items() if v not in (None, ())} for r in self.records]


def run_passes(program: Program, passes: Sequence[Pass], log: Log) -> list[PassResult]:
    """Apply ``passes`` in order, each with its checks, and record them in ``log``. Returns their results."""
    results: list[PassResult] = []
    # Each pass gets the result of the one before, and is timed together with its checks.
    for step in passes:
        with log.stage(step.name) as record:
            result = step(program)
            record.ops = (count_ops(program), count_ops(result.program))
            record.parameters = (count_parameters(program), count_parameters(result.program))
            record.changed, record.notes = result.changed, result.notes
        results.append(result)
        program = result.program
    return results


def count_ops(program: Program) -> int:
    """The number of calls in the graph."""
    return sum(n.op == "call_function" for n in program.graph.graph.nodes)


def list_state_shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by name, for ``ensures``."""
    return {name: tuple(like.shape) for name, like in program.state.likes.items()}


def check(program: Program) -> None:
    """Check a program's invariants: the graph is well formed, and weights have the shapes that it expects."""
    program.graph.graph.lint()  # torch's own check: order, names, users
    weights = program.weights
    for node in program.list_placeholders():
        value = node.meta.get("val")
        if node.name in weights and isinstance(value, Tensor):
            weight = program.state.find_like(weights[node.name])
            assert tuple(value.shape) == tuple(weight.shape), f"{weights[node.name]}: {value.shape} != {weight.shape}"
