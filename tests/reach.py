"""Which tests run a line: recorded once for a commit by coverage.py, while all tests run that are about the product."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from coverage import CoverageData

from benchmarks.common import result_header
from tests.durations import read_durations

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("tests/house", "tests/measured")
"""Tests of the project and of its documents, most of which start processes that are not recorded."""
SLOWEST_S = 5.0
"""Slower tests are not recorded, and so not asked: they would take most of the recording."""
NEAREST = 3
"""Files whose quick tests are asked first: most mutants die there."""
ASKED_S = 300.0
"""Seconds of tests that are not quick that a mutant may take, the quickest first."""


def record_reach(paths: Sequence[str], jobs: int) -> CoverageData:
    """Run the tests, and keep which of them run each line of ``paths`` in ``build/``. A commit is recorded once."""
    record = ROOT / "build" / f"reach-{result_header()['commit']}"
    if not record.exists():
        record.parent.mkdir(exist_ok=True)
        config = record.with_suffix(".ini")
        config.write_text("[run]\nrelative_files = true\ninclude =\n" + "".join(f"    {path}\n" for path in paths))
        slowest = [name for name, seconds in read_durations().items() if seconds > SLOWEST_S]
        part = record.with_suffix(".part")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--suite=all", f"-n{jobs}"]
        command += ["--dist=loadfile", "--no-loadscope-reorder", f"--cov-config={config}", "--cov-report="]
        command += ["--cov", "--cov-context=test", *(f"--ignore={folder}" for folder in ELSEWHERE)]
        command += [f"--deselect={name}" for name in slowest]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "COVERAGE_FILE": str(part)}, check=False)
        part.rename(record)
    data = CoverageData(str(record))
    data.read()
    return data


def list_reaching_tests(data: CoverageData, path: str, line: int) -> set[str]:
    """The tests that run a line. One whose set-up runs it may share what it sets up: all of its file are listed."""
    contexts = _list_contexts(data.contexts_by_lineno(path), (ROOT / path).read_text(), line)
    reaching = {name for name, phase in contexts if phase != "teardown"}
    files = {name.partition("::")[0] for name, phase in contexts if phase == "setup"}
    everywhere = {context.rpartition("|")[0] for context in data.measured_contexts()}
    return reaching | {name for name in everywhere if name.partition("::")[0] in files}


def _list_contexts(by_line: Mapping[int, Sequence[str]], source: str, line: int) -> set[tuple[str, str]]:
    """Test and phase for all that runs the statement of a line. What runs on import counts as run by its users:
    a signature by those that run the function, a constant by those that run any function of the file."""
    enclosing = list(_find_enclosing(ast.parse(source), line))
    inside_function = [node for node in enclosing if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    statement = enclosing[-1] if enclosing else None
    lines = range(1, len(source.splitlines()) + 1)
    if inside_function and statement is not None:
        innermost = inside_function[-1]
        first, last = statement.lineno, statement.end_lineno or statement.lineno
        if statement is innermost:
            first = innermost.body[0].lineno
        elif body := getattr(statement, "body", None):
            last = body[0].lineno - 1
        lines = range(first, last + 1)
    found = {context.rpartition("|")[::2] for n in lines for context in by_line.get(n, ()) if "|" in context}
    return {(name, phase) for name, phase in found}


def _find_enclosing(node: ast.AST, line: int) -> Iterator[ast.stmt]:
    """The statements that a line is in, from the outermost to the innermost."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt) and child.lineno <= line <= (child.end_lineno or child.lineno):
            yield child
            yield from _find_enclosing(child, line)
        elif not isinstance(child, (ast.stmt, ast.expr)):
            yield from _find_enclosing(child, line)


def divide_tests(reaching: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Suite and tests, in the order in which a mutant is put to them: from those that most likely notice it soonest.
    Of the tests of a batch, the suite runs its own."""
    slow = read_durations()
    by_file = Counter(name.partition("::")[0] for name in reaching if name not in slow)
    nearest = {file for file, _ in by_file.most_common(NEAREST)}
    yield "quick", [name for name in sorted(reaching) if name.partition("::")[0] in nearest]
    yield "quick", [name for name in sorted(reaching) if name.partition("::")[0] not in nearest]
    rest, seconds = [], 0.0
    for name in sorted(reaching.intersection(slow), key=lambda name: (slow[name], name)):
        seconds += slow[name]
        if seconds > ASKED_S:
            break
        rest.append(name)
    yield "rest", rest
