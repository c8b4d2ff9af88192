"""The examples run: the script in a folder of its own, the notebook cell by cell in a kernel of its own."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from runpy import run_path

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOK = EXAMPLES / "prune_in_a_notebook.ipynb"


def test_the_script_prunes_both_kinds_of_models(tmp_path, go_to, capsys):
    go_to(tmp_path)
    run_path(str(EXAMPLES / "prune_in_python.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "Pruned(LlamaForCausalLM, sparsity 0." in said
    dense, small = map(int, re.findall(r"(\d+) -> (\d+) channels", said)[0])
    assert 0 < small < dense
    assert list(tmp_path.iterdir()) == []


def test_the_notebook_runs_and_shows_its_progress():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    run = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": EXAMPLES.parent}}
    )
    run.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(str(output.get("text") or output["data"]["text/plain"]) for output in outputs)
    assert "Pruned(LlamaForCausalLM, sparsity 0." in said
    assert said.count("reloaded checkpoint") == 2, "the report's and verify's"
    assert re.search(r"\d s  trace", said)
    assert "plan.json" in said


def test_the_notebook_installs_mptk_only_where_it_is_missing(fresh, tmp_path):
    """In place of Python, a program that writes what it was asked for."""
    first = next(cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code")
    python, asked = tmp_path / "python", tmp_path / "asked"
    python.write_text(f'#!/bin/sh\necho "$@" > {asked}\n')
    python.chmod(0o700)
    cell = f"import sys\nsys.executable = {str(python)!r}\n{first.source}"
    assert fresh.run(cell).code == 0
    assert not asked.exists()
    assert fresh.run(cell, paths=()).code == 0
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]
    assert asked.read_text() == f"-m pip install --quiet git+{project['urls']['Repository']}\n"
