"""Mutants: small errors put into the code, one at a time. A test must fail at each, or the list says why none can.

    python -m tests.mutants [--sample 200] [--jobs 2] [--seeds 0,1] [--json FILE] [--only PATH]

cosmic-ray makes the mutants; a sample of those of ``SUBJECTS`` is drawn by the seed, of the errors that a person could
make: a ``+`` for a ``-``, a ``<`` for a ``<=``, a number that is one off (``EXCHANGED``). Each is put to the tests that run
its line (``tests/reach.py``) in a copy of the tree: to those that ``make test`` runs, and, if it lives on, to the quickest
of what ``make test-all`` runs beside it. So what is said to be noticed is noticed, and some of what is said to survive
would be noticed by a slower test. ``ALLOWED`` has survivors that no test can tell apart.
A run goes on where it was stopped: mutants that FILE has already are not tested again.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from subprocess import PIPE, Popen
from typing import Annotated, Any

import typer

from benchmarks.common import result_header, write_result
from tests.durations import read_durations
from tests.mutants_allowed import ALLOWED
from tests.reach import divide_tests, list_reaching_tests, record_reach

ROOT = Path(__file__).parents[1]
TREE = ("mptk", "passes", "tests", "benchmarks", "docs", "examples", "README.md", "CONTRIBUTING.md", "pyproject.toml")
LIMIT_S, TIMES, HANGS_S = 60, 10, 3600
"""A test hangs that takes LIMIT_S more than TIMES its own processor time, or a batch of tests that takes HANGS_S by the clock."""

SUBJECTS = (
    "mptk/ir/axes.py",
    "mptk/ir/resolved_plan.py",
    "passes/transforms/rewrite.py",
    "passes/transforms/masked_reference.py",
    "passes/transforms/fold_norms.py",
    "passes/analysis/zero_propagation.py",
    "passes/analysis/dependence.py",
    "passes/check_cut.py",
    "passes/verify.py",
    "mptk/methods/maskprune/solver.py",
    "mptk/proof/proof.py",
    "mptk/proof/verification.py",
    "mptk/publish/manifest.py",
    "mptk/targets/stock_config.py",
    "mptk/io/checkpoint.py",
    "passes/targets/stock/emit.py",
)
"""Files whose mutants are tested: where an error could give a wrong model without a word."""

EXCHANGED = re.compile(
    r"Add_Sub|Sub_Add|Sub_Mul|Mul_Div|Mul_Add|Div_Mul|Div_FloorDiv|FloorDiv_Div|FloorDiv_Mod|Mod_FloorDiv|Pow_Mul"
    r"|BitOr_BitAnd|BitAnd_BitOr|BitXor_BitOr|Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Lt_Gt|Gt_Lt|Is_IsNot|IsNot_Is"
)
"""Of the operators that replace one sign by another, those that are tried."""


@dataclass(frozen=True)
class Mutant:
    """``operator`` of cosmic-ray at its ``occurrence``-th place in the file ``path``."""

    path: str
    operator: str
    occurrence: int
    line: int


def drawn(sample: int, seed: int, only: str) -> list[Mutant]:
    """Mutants at random, as many of each file, that change what runs: a type hint does not; no Python is none."""
    mutants = all_mutants()
    random.Random(seed).shuffle(mutants)
    paths = [path for path in SUBJECTS if only in path]
    each = -(-sample // len(paths))
    by_path = [[m for m in mutants if m.path == path] for path in paths]
    chosen = [itertools.islice(filter(_runs, of_one), each) for of_one in by_path]
    return [m for row in itertools.zip_longest(*chosen) for m in row if m is not None]


def _runs(mutant: Mutant) -> bool:
    try:
        return _code(mutated(mutant)) != _code(Path(mutant.path).read_text())
    except SyntaxError:
        return False


def all_mutants() -> list[Mutant]:
    """Every mutant of ``SUBJECTS`` that cosmic-ray knows."""
    from cosmic_ray.commands import init
    from cosmic_ray.work_db import use_db

    with tempfile.TemporaryDirectory() as folder, use_db(Path(folder) / "work.sqlite") as db:
        init([Path(p) for p in SUBJECTS], db, {})
        found = [m for item in db.work_items for m in item.mutations]
    mutants = [Mutant(str(m.module_path), m.operator_name, m.occurrence, m.start_pos[0]) for m in found]
    signs = ("core/ReplaceBinaryOperator", "core/ReplaceComparisonOperator")
    plausible = (m for m in mutants if not m.operator.startswith(signs) or EXCHANGED.fullmatch(_exchange(m)))
    return sorted(plausible, key=str)


def _exchange(mutant: Mutant) -> str:
    return mutant.operator.partition("Operator_")[2]


def mutated(mutant: Mutant) -> str:
    """The file's text with the mutant in it."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = Path(mutant.path).read_text()
    return mutate_code(source, get_operator(mutant.operator)(), mutant.occurrence) or source


def _code(source: str) -> str:
    """What runs of a source file: no type hints, no type aliases for checkers."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def difference(mutant: Mutant) -> str:
    """The lines that the mutant changes."""
    before, after = Path(mutant.path).read_text().splitlines(), mutated(mutant).splitlines()
    changed = [line for line in difflib.unified_diff(before, after, lineterm="", n=0) if line[:1] in "+-"]
    return "\n".join(line for line in changed if not line.startswith(("+++", "---")))


# ---- testing them ----


def test_one(copy, mutant, reaching, worker):
    """``killed``, ``survived`` or ``ran too long``, and the suite that noticed it: quick, rest, or none."""
    file, original = copy / mutant.path, (ROOT / mutant.path).read_text()
    file.write_text(mutated(mutant))
    try:
        assert worker.stdin is not None
        assert worker.stdout is not None
        for suite, tests in divide_tests(reaching):
            worker.stdin.write(json.dumps({"suite": suite, "tests": tests}) + "\n")
            worker.stdin.flush()
            if (verdict := worker.stdout.readline().strip()) != "survived":
                return verdict, suite
        return "survived", ""
    finally:
        file.write_text(original)


test_one.__test__ = False  # type: ignore[attr-defined]


def serve(copy: str) -> None:
    """A worker: has torch and transformers in memory, and tests each request in a process forked from itself."""
    os.chdir(copy)
    _preload()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run_tests(copy, **json.loads(line))
        print(_verdict(child), flush=True)


def _preload() -> None:
    """Import what tests import and mutants leave alone, and what an export loads on its first call."""
    for name in (
        "hypothesis.extra.numpy",
        "networkx",
        "onnx_ir",
        "onnxscript",
        "onnxruntime",
        "peft",
        "pytest",
        "datasets",
    ):
        importlib.import_module(name)
    for kind in ("llama", "mistral", "mixtral", "gpt2", "gemma3", "opt"):
        importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    import torch

    torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),), strict=False)


class Chosen:
    """A plugin of pytest: only these tests, the quickest first, and none may hang."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.tests, self.slow = {*tests}, read_durations()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid in self.tests]
        items.sort(key=lambda item: self.slow.get(item.nodeid, 0.0))  # the conftest sorted them for many workers

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        # Processor time: a busy machine is no reason to stop.
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S + TIMES * self.slow.get(nodeid, 0.0))


def _run_tests(copy: str, suite: str, tests: Sequence[str]) -> None:
    """In the forked process: run the tests of the copy, up to the first that fails."""
    if not tests:
        os._exit(0)
    import pytest

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    for name in [n for n in sys.modules if n.split(".")[0] in ("mptk", "passes", "tests", "benchmarks")]:
        del sys.modules[name]
    sys.path[:] = [copy, *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, Path(copy)))]
    signal.alarm(HANGS_S)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)  # for the imports
    files = sorted({name.partition("::")[0] for name in tests})
    words = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov", f"--suite={suite}", *files]
    os._exit(int(pytest.main(words, plugins=[Chosen(tests)])))


def _verdict(child: int) -> str:
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM):
        return "ran too long"
    # 5: none of the tests is in this suite
    return "survived" if os.waitstatus_to_exitcode(status) in (0, 5) else "killed"


def run(mutants: Sequence[Mutant], jobs: int) -> Iterator[tuple[Mutant, str, str]]:
    """Test the mutants, ``jobs`` at a time, each worker in a copy of the tree of its own."""
    if not mutants:
        return
    reach = record_reach(SUBJECTS, jobs)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(jobs) as pool:
        free: Queue[tuple[Path, Popen[str]]] = Queue()
        for i in range(jobs):
            copy = Path(folder) / str(i)
            for name in TREE:
                source = ROOT / name
                target = copy / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
            command = [sys.executable, "-m", "tests.mutants", "--serve", str(copy)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
            free.put((copy, Popen(command, stdin=PIPE, stdout=PIPE, text=True, cwd=ROOT, env=environment)))

        def one(mutant: Mutant) -> tuple[Mutant, str, str]:
            copy, worker = free.get()
            try:
                return mutant, *test_one(copy, mutant, list_reaching_tests(reach, mutant.path, mutant.line), worker)
            finally:
                free.put((copy, worker))

        yield from pool.map(one, mutants)
        for _ in range(jobs):
            free.get()[1].kill()


def report(rows: Sequence[dict[str, Any]]) -> None:
    """Totals by file, then the survivors that are not explained."""
    for path in dict.fromkeys(r["path"] for r in rows):
        print(f"{path:40} {_count([r for r in rows if r['path'] == path])}")
    print(f"{'all':40} {_count(rows)}")
    survivors = [r for r in rows if r["verdict"] == "survived"]
    explained = [r for r in survivors if r["change"] in ALLOWED]
    share = 1 - len(survivors) / max(1, len(rows))
    print(f"{len(rows)} mutants, {share:.1%} killed, {len(survivors)} survived, {len(explained)} of them explained")
    for r in survivors:
        print(f"\n{r['path']}:{r['line']} {ALLOWED.get(r['change'], 'not explained')}\n{r['change']}")


def _count(rows: Sequence[dict[str, Any]]) -> str:
    killed = [r["suite"] for r in rows if r["verdict"] != "survived"]
    quick = killed.count("quick")
    return f"{len(rows):4} mutants, make test killed {quick:4}, make test-all {len(killed):4}, {len(rows) - len(killed):3} survived"


def main(
    sample: Annotated[int, typer.Option(help="how many")] = 200,
    jobs: int = 2,
    seeds: Annotated[str, typer.Option(help="a draw for each")] = "0",
    only: Annotated[str, typer.Option(help="files whose path has this in it")] = "",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    serve_in: Annotated[str, typer.Option("--serve", hidden=True)] = "",
) -> None:
    """Test a sample of mutants; prints totals and survivors. Exit code 1 if less than 92 % are killed."""
    if serve_in:
        return serve(serve_in)
    rows = json.loads(json_file.read_text())["rows"] if json_file and json_file.exists() else []
    for seed in map(int, seeds.split(",")):
        chosen = drawn(sample, seed, only)
        # A mutant that another draw has had is the same mutant.
        known = {(r["path"], r["change"]): (r["verdict"], r["suite"]) for r in rows}
        done = {(r["path"], r["change"]) for r in rows if r["seed"] == seed}
        left = [m for m in chosen if (m.path, difference(m)) not in done]
        again = [(m, *known[key]) for m in left if (key := (m.path, difference(m))) in known]
        new = run([m for m in left if (m.path, difference(m)) not in known], jobs)
        for mutant, verdict, suite in itertools.chain(again, new):
            found = {"change": difference(mutant), "verdict": verdict, "suite": suite, "seed": seed}
            rows.append({**asdict(mutant), **found})
            print(f"{len(rows):4} {verdict:12} {suite:5} {mutant.path}:{mutant.line} {mutant.operator}", flush=True)
            if json_file:
                write_result(json_file, result_header(), rows)
    for seed in dict.fromkeys(r["seed"] for r in rows):
        print(f"\ndraw {seed}")
        report([r for r in rows if r["seed"] == seed])
    killed = sum(r["verdict"] != "survived" for r in rows)
    raise typer.Exit(killed < 0.92 * len(rows))


if __name__ == "__main__":
    typer.run(main)
