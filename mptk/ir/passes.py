"""pipeline: an explicit list of passes over a Program, with a check and a record of the difference after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from mptk.ir.program import Program, parameter_count


@dataclass(frozen=True)
class Pass:
    """One transformation: Program in, Program out."""

    name: str
    run: Callable[[Program], Program]


@dataclass
class Record:
    """What one stage did: seconds taken, and for a pass the ops and parameters before and after."""

    name: str
    seconds: float = 0.0
    ops: tuple[int, int] | None = None
    parameters: tuple[int, int] | None = None


@dataclass
class Log:
    """The stages of a run in order, for the report."""

    records: list[Record] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[Record]:
        record, start = Record(name), time.perf_counter()
        yield record
        record.seconds = round(time.perf_counter() - start, 2)
        self.records.append(record)

    def as_list(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in asdict(r).items() if v is not None} for r in self.records]


def run(program: Program, passes: Sequence[Pass], log: Log, keep: dict[str, Program] | None = None) -> Program:
    """Apply ``passes`` in order; after each the program is checked and the difference recorded.

    ``keep`` is given the program after each pass, by the pass's name.
    """
    for p in passes:
        with log.stage(p.name) as record:
            after = p.run(program)
            check(after)
            record.ops = (count_ops(program), count_ops(after))
            record.parameters = (parameter_count(program), parameter_count(after))
        program = after
        if keep is not None:
            keep[p.name] = after
    return program


def count_ops(program: Program) -> int:
    """Calls in the graph."""
    return sum(n.op == "call_function" for n in program.graph.graph.nodes)


def check(program: Program) -> None:
    """A program's invariants: a well-formed graph, and every weight of the size that the graph expects."""
    program.graph.graph.lint()
    weights = program.weights
    for node in program.placeholders():
        value = node.meta.get("val")
        if node.name in weights and isinstance(value, Tensor):
            weight = program.state[weights[node.name]]
            assert tuple(value.shape) == tuple(weight.shape), f"{weights[node.name]}: {value.shape} != {weight.shape}"
