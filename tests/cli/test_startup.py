"""A quick start: what needs no model imports none of the heavy libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mptk

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("accelerate", "datasets", "huggingface_hub", "numpy", "onnx", "onnxruntime", "peft", "torch", "transformers")


def imported(program: str, tmp_path: Path) -> set[str]:
    """Which of ``HEAVY`` a program has imported when it ends, in a process of its own."""
    found = tmp_path / "found"
    report = f"atexit.register(lambda: pathlib.Path({str(found)!r}).write_text(' '.join(sys.modules)))"
    subprocess.run(
        [sys.executable, "-c", f"import atexit, pathlib, sys\n{report}\n{program}"],
        cwd=ROOT,
        env=os.environ | {"MPTK_CACHE": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return set(HEAVY) & set(found.read_text().split())


@pytest.mark.features
@pytest.mark.parametrize(
    "arguments",
    ["--help", "--version", "models", "ops --help", "prune --help", "analyze --help", "eval --help", "bench --help"],
)
def test_a_command_that_needs_no_model_imports_no_heavy_library(arguments, tmp_path):
    program = f"sys.argv = ['mptk', *{arguments.split()!r}]; from mptk.cli.main import main; main()"
    assert imported(program, tmp_path) == set()


@pytest.mark.parametrize(
    "statement",
    [
        "import mptk; mptk.__version__; dir(mptk)",
        "from mptk import MptkError, ProofError, FamilyPlan, Plan",
        "from mptk import Settings; Settings()",
    ],
)
def test_an_import_that_needs_no_model_imports_no_heavy_library(statement, tmp_path):
    assert imported(statement, tmp_path) == set()


def test_what_is_heavy_is_seen(tmp_path):
    assert imported("import numpy", tmp_path) == {"numpy"}


@pytest.mark.features
def test_the_public_names_are_all_that_is_listed():
    assert dir(mptk) == sorted(mptk.__all__)
    assert all(getattr(mptk, name) is not None for name in mptk.__all__)
    assert not hasattr(mptk, "anything_else")
