"""examples/plugin, installed: its criterion, its rule and its target work from the command line and from Python.

A process imports torch and transformers for many seconds, so one does that for all tests, and none of mptk. Each program
then runs in a fork of it, which imports mptk and what is installed beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from mptk import Report, testing
from mptk.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
COMMON = ["--samples", "4", "--length", "32", "--align", "4", "--no-onnx", "--sparsity", "0.25"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed package, with its entry points."""
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(ROOT / "examples" / "plugin", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(site), str(source)], check=True)
    return site


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    words = testing.make_tokenizer(begin=True)
    return testing.save_model(testing.make_llama(), tmp_path_factory.mktemp("model"), words)


class Done(NamedTuple):
    code: int
    out: str
    err: str


COMMANDS = """
import contextlib, io, json, sys
from mptk.cli.main import main

done = []
for line in arguments:
    sys.argv[1:] = line
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
    done.append((code or 0, out.getvalue(), err.getvalue()))
print(json.dumps(done))
"""
FORKS = """
import json, os, sys
import accelerate, onnx, peft, torch.export, transformers.models.llama.modeling_llama

for asked in sys.stdin:
    site, code, arguments, answer = json.loads(asked)
    child = os.fork()
    if child == 0:
        sys.path.insert(0, site)
        sys.stdout = open(answer, "w")
        exec(code, {"arguments": arguments})
        sys.stdout.close()
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""
Run = Callable[..., str]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """What a program prints that sees what is installed in a folder, and ``arguments``."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    answer = tmp_path_factory.mktemp("answers") / "out"
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout

        def run(site: Path, code: str, *arguments: object) -> str:
            process.stdin.write(json.dumps([str(site), code, arguments, str(answer)]) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "0\n"
            return answer.read_text()

        yield run
        process.stdin.close()


def commands(python: Run, site: Path, *lines: list[str]) -> list[Done]:
    """Command lines, one after the other, in one process that sees what is installed in ``site``."""
    return [Done(*each) for each in json.loads(python(site, COMMANDS, *lines))]


def test_criterion_and_target_prune_and_verify_from_the_command_line(
    python: Run, site: Path, model: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--method", "peak", "--target", "npz", "--out", str(out), *COMMON]
    listed, pruned = commands(python, site, ["ops"], ["prune", model, *options])
    assert "mptk_example.gate" in listed.out
    assert pruned.code == 0, pruned.err
    report = Report.read(out)
    assert (report.settings.method, report.settings.target) == ("peak", "npz")
    narrowed = [f["width"] for f in report.families.values() if f["width"] < f["of"]]
    assert narrowed
    assert all(width % 8 == 0 for width in narrowed)
    assert [d["stage"] for d in report.proof] == ["stored weights", "rewritten graph"]
    assert not (out / "config.json").exists()
    (verified,) = commands(python, site, ["verify", str(out)])
    assert verified.code == 0, verified.err


def test_without_the_plugin_its_names_are_unknown(model: str, tmp_path: Path) -> None:
    options = ("--method", "--target")
    lines = [["prune", model, option, "npz", "--out", str(tmp_path / "out"), *COMMON] for option in options]
    for option, line in zip(options, lines, strict=True):
        missing = CliRunner().invoke(app, line)
        assert missing.exit_code == 2
        assert f"Invalid value for '{option}': 'npz' is not known" in missing.stderr


ANALYSED = """
import torch
from torch import nn
import mptk
from mptk import Samples
from mptk.methods import criteria
from mptk_example.rule import gate

class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.by, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 7)
    def forward(self, x):
        return self.down(gate(self.up(x), self.by(x)))

model, x = Gated(), torch.randn(3, 6)
analysis = mptk.analyze(model, [x])
(family,) = analysis.families
print(family.size, sorted(member.weight for member in family.groups[0].members))
peaks = gate(model.up(x), model.by(x)).abs().amax(0) * model.down.weight.abs().sum(0)
found = criteria.score_units(analysis, "peak", Samples({"x": x}))[family.name]
print(torch.allclose(found.flatten(), peaks))
"""


def test_rule_makes_its_operator_prunable_and_the_criterion_measures_it(python: Run, site: Path) -> None:
    members = ["by.bias", "by.weight", "down.weight", "up.bias", "up.weight"]
    assert python(site, ANALYSED).split("\n")[:2] == [f"10 {members}", "True"]


def test_a_plugin_that_does_not_load_is_one_line(python: Run, site: Path, tmp_path: Path) -> None:
    broken = tmp_path / "site"
    shutil.copytree(site, broken)
    (broken / "mptk_example" / "target.py").unlink()
    words = ["--target", "npz", "--steps", "0", "--method", "wanda", "--out", str(tmp_path / "o")]
    other, failed = commands(python, broken, ["analyze", "nothing-there"], ["prune", "m", *words])
    assert (other.code, failed.code) == (1, 1)
    assert "the plugin npz of mptk-example does not load" in failed.err
    assert "Traceback" not in failed.err
