"""The examples run: the script as a program, the notebook cell by cell in a kernel of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_the_script_prunes_both_kinds_of_models(tmp_path: Path) -> None:
    script = EXAMPLES / "prune_in_python.py"
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    ran = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "Pruned(LlamaForCausalLM, sparsity 0." in ran.stdout
    dense, small = map(int, re.findall(r"(\d+) -> (\d+) channels", ran.stdout)[0])
    assert 0 < small < dense
    assert list(tmp_path.iterdir()) == []


def test_the_notebook_runs_and_shows_its_progress() -> None:
    notebook = nbformat.read(EXAMPLES / "prune_in_a_notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    run = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": EXAMPLES.parent}}
    )
    run.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(str(output.get("text") or output["data"]["text/plain"]) for output in outputs)
    assert "Pruned(LlamaForCausalLM, sparsity 0." in said
    assert "reloaded checkpoint" in said
    assert re.search(r"\d s  trace", said)
    assert "plan.json" in said
