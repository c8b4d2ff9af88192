"""Every command line in the README and the Makefile is one that the command line accepts."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from mptk.cli.main import app

ROOT = Path(__file__).resolve().parents[1]


def command_lines() -> list[str]:
    """Every ``mptk …`` line of the README's blocks and the Makefile, and inline ones with options."""
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    inline = re.findall(
        r"`(mptk \w+ [^`]*--[^`]*)`", re.sub(r"^```.*?^```", "", readme, flags=re.MULTILINE | re.DOTALL)
    )
    made = re.findall(r"^\t\$\(BIN\)/(mptk .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.startswith("mptk ")] + inline + made


@pytest.mark.parametrize("line", command_lines())
def test_documented_command_lines_parse(line, tmp_path, monkeypatch):
    for recipe in re.findall(r"--config (\S+)", line):  # which is read when the line is parsed
        (tmp_path / recipe).parent.mkdir(parents=True)
        (tmp_path / recipe).write_text("model: smollm2-135m\n")
    monkeypatch.chdir(tmp_path)
    group = typer.main.get_command(app)
    arguments = shlex.split(line, comments=True)[1:]
    with group.make_context("mptk", list(arguments)) as context:
        name, command, rest = group.resolve_command(context, arguments)
        command.make_context(name, rest, parent=context)


def test_documentation_has_command_lines():
    lines = command_lines()
    assert {line.split()[1] for line in lines} >= {"models", "fetch", "analyze", "prune", "bench", "report"}
    assert any("--eval-data" in line for line in lines)
