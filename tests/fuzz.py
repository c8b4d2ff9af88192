"""Random programs without end: what of them is refused, proven, wrong or crashes the analysis.

    python -m tests.fuzz [--programs 5000] [--family NAME] [--modules 200] [--edges 200] [--jobs 2] [--seed 0] [--json FILE]
    python -m tests.fuzz --program 'DESCRIPTION'

Program number n is drawn from seed + n, so that a run says which it was. Each that is wrong or crashes is made smaller,
once for each cause, and printed as a description that the second form runs again. Exit code 1 if there is any.
Modules, whose ``forward`` is Python with branches and state, are those of ``tests/eager_modules.py``, and of
``tests/edge_modules.py``: arithmetic on sizes, state outside of attributes, gradients, types, containers. One that is
wrong is printed with its seed.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import result_header, write_result
from tests import eager_modules, edge_modules
from tests.programs import CATALOGUE, FAILURES, Outcome, Program, cause_of, check, reduced, seeded

BLOCK, LIMIT_S = 25, 120


@dataclass
class Failure:
    """A program that is wrong or crashed, made smaller."""

    verdict: str
    cause: str
    program: str
    detail: str
    count: int = 1


@dataclass
class Tally:
    """What became of the programs: verdicts, families cut, refusals by reason, kinds used and proven, failures."""

    verdicts: Counter[str] = field(default_factory=Counter)
    families: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    used: Counter[str] = field(default_factory=Counter)
    proven: Counter[str] = field(default_factory=Counter)
    failures: dict[str, Failure] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        self.families += other.families
        for name in ("verdicts", "refused", "used", "proven"):
            getattr(self, name).update(getattr(other, name))
        for key, failure in other.failures.items():
            if key in self.failures:
                self.failures[key].count += failure.count
            else:
                self.failures[key] = failure


def key_of(program: Program, cause: str) -> str:
    """Failures of one cause at the same steps are taken to be one."""
    return f"{cause} in {', '.join(sorted(_spelled(program))) or program.form}"


def _spelled(program: Program) -> set[str]:
    """The steps with those options that are words: the spellings."""
    return {" ".join([s.kind, *(str(v) for v in s.options.values() if isinstance(v, str))]) for s in program.steps}


def run_block(seeds: range, family: str = "") -> Tally:
    """Check the programs of some seeds, in this process."""
    torch.set_num_threads(1)
    tally = Tally()
    for seed in seeds:
        count(tally, seeded(seed, family))
    return tally


def count(tally: Tally, program: Program) -> None:
    """Check one program and enter it."""
    outcome = _in_time(program)
    tally.verdicts[outcome.verdict] += 1
    tally.families += outcome.families
    kinds = {s.kind for s in program.steps}
    tally.used.update(kinds)
    if outcome.verdict == "proven":
        tally.proven.update(kinds)
    elif outcome.verdict == "refused":
        tally.refused[outcome.cause.split(" (")[0]] += 1
    elif outcome.verdict in FAILURES:
        _enter_failure(tally, program, outcome)


def _enter_failure(tally: Tally, program: Program, outcome: Outcome) -> None:
    cause = cause_of(outcome)
    for failure in tally.failures.values():
        if failure.cause == cause and _spelled(Program.parse(failure.program)) <= _spelled(program):
            failure.count += 1
            return
    small = program if "TimeoutError" in cause else reduced(program, outcome)
    detail = outcome.cause if small is program else check(small).cause
    failure = Failure(outcome.verdict, cause, repr(small), detail)
    tally.failures[key_of(small, cause)] = failure


def _in_time(program: Program) -> Outcome:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {LIMIT_S} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        return check(program)
    finally:
        signal.alarm(0)


def tallies(count: int, jobs: int, seed: int, family: str) -> Iterator[Tally]:
    """One for each block of programs, as they are done."""
    blocks = [range(start, min(start + BLOCK, seed + count)) for start in range(seed, seed + count, BLOCK)]
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=20) as pool:
        yield from pool.imap_unordered(partial(run_block, family=family), blocks)


@dataclass
class Modules:
    """What became of the random modules: verdicts, calls that were equal and refused by size, refusals, failures."""

    verdicts: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def enter(self, text: str, outcome: eager_modules.Outcome | edge_modules.Outcome) -> None:
        self.verdicts[outcome.verdict] += 1
        self.calls.update({"equal": outcome.calls[0], "refused by size": outcome.calls[1]})
        if outcome.verdict == eager_modules.REFUSED:
            self.refused[" ".join(outcome.cause.split(";")[0].split()[:9])] += 1
        elif outcome.verdict != eager_modules.EQUAL:
            self.failures.append(f"{outcome.verdict}: {outcome.cause} in {text}")

    def __str__(self) -> str:
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in self.verdicts.most_common())
        calls = ", ".join(f"{count} {what}" for what, count in self.calls.items())
        reasons = [f"{count:5} refused: {reason}" for reason, count in self.refused.most_common()]
        return "\n".join(
            [f"{sum(self.verdicts.values())} modules: {verdicts}; calls: {calls}", *reasons, *self.failures]
        )


def check_module(seed: int) -> tuple[str, eager_modules.Outcome]:
    """Check the module of a seed, in this process. Any other error than a refusal is a crash."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    text = str(eager_modules.described(seed))
    try:
        return text, eager_modules.check(eager_modules.described(seed))
    except Exception as error:
        return text, eager_modules.Outcome("crashed", f"{type(error).__name__}: {error}")


def check_edge(seed: int) -> tuple[str, edge_modules.Outcome]:
    """As ``check_module``, for the modules at the edges. Every fourth is written as ONNX, too, which takes longest."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    text = f"{seed}: {edge_modules.edge(seed)[1]}"
    try:
        return text, edge_modules.check(seed, onnx=seed % 4 == 0)
    except Exception as error:
        return text, edge_modules.Outcome("crashed", f"{type(error).__name__}: {error}")


def modules_of(check: Callable[[int], tuple[str, Any]], count: int, jobs: int, seed: int) -> Modules:
    """The outcomes of so many random modules."""
    found = Modules()
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=50) as pool:
        for each in pool.imap_unordered(check, range(seed, seed + count)):
            found.enter(*each)
    return found


def report(tally: Tally) -> str:
    """The figures, each kind of step, and each distinct failure."""
    tried = sum(tally.verdicts.values())
    lines = [f"{tried} programs: " + ", ".join(f"{n} {verdict}" for verdict, n in tally.verdicts.most_common())]
    lines += [f"{tally.families} families cut, in {tally.verdicts['proven'] / max(tried, 1):.0%} of the programs", ""]
    lines += ["step                     used  proven"]
    lines += [f"{kind:24}{tally.used[kind]:5}{tally.proven[kind]:8}" for kind in sorted(CATALOGUE)]
    lines += ["", *(f"{n:5} refused: {reason}" for reason, n in tally.refused.most_common())]
    for key, failure in sorted(tally.failures.items(), key=lambda item: -item[1].count):
        lines += ["", f"{failure.count} {key}", f"  {failure.detail}", f"  {failure.program}"]
    return "\n".join(lines)


def main(
    programs: Annotated[int, typer.Option(help="how many")] = 5000,
    modules: Annotated[int, typer.Option(help="how many modules with Python in their forward")] = 0,
    edges: Annotated[int, typer.Option(help="how many modules at the edges of a trace")] = 0,
    family: Annotated[str, typer.Option(help="only programs with a step of this family of operators")] = "",
    jobs: int = 2,
    seed: int = 0,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    program: Annotated[str | None, typer.Option(help="check this description alone")] = None,
) -> None:
    tally, start = Tally(), time.monotonic()
    if program is not None:
        count(tally, Program.parse(program))
    else:
        for part in tallies(programs, jobs, seed, family):
            tally.add(part)
            print(f"\r{sum(tally.verdicts.values())} of {programs}", end="", flush=True)
    print("\r" + report(tally))
    each = {
        name: modules_of(check, count, jobs, seed) if count else Modules()
        for name, check, count in (("modules", check_module, modules), ("edges", check_edge, edges))
    }
    for name, found in each.items():
        print(f"{name}: {found}" if found.verdicts else "")
    if json_file is not None:
        write_result(json_file, _header(tally, each, seed, time.monotonic() - start), _rows(tally))
    wrong = any(found.failures for found in each.values())
    raise typer.Exit(any(tally.verdicts[verdict] for verdict in FAILURES) or wrong)


def _header(tally: Tally, modules: dict[str, Modules], seed: int, seconds: float) -> dict[str, Any]:
    figures = {"verdicts": dict(tally.verdicts), "families": tally.families, "refused": dict(tally.refused)}
    failures = [asdict(f) for f in tally.failures.values()]
    own = {"seed": seed, "seconds": round(seconds), **figures, "failures": failures}
    own |= {name: vars(found) for name, found in modules.items()}
    return {**result_header(), **own}


def _rows(tally: Tally) -> list[dict[str, Any]]:
    return [{"step": kind, "used": tally.used[kind], "proven": tally.proven[kind]} for kind in sorted(CATALOGUE)]


if __name__ == "__main__":
    typer.run(main)
