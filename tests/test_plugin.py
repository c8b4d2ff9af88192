"""examples/plugin, installed: its criterion, its rule and its target work from the command line and from Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mptk.run.report import Report
from tests import toy_checkpoints

ROOT = Path(__file__).resolve().parents[1]
COMMON = ["--samples", "4", "--length", "32", "--multiple-of", "4", "--no-onnx", "--sparsity", "0.25"]


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
    folder = tmp_path_factory.mktemp("model")
    toy_checkpoints.llama().save_pretrained(folder)
    toy_checkpoints.tokenizer(begin=True).save_pretrained(folder)
    return str(folder)


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "COLUMNS": "200"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_criterion_and_target_prune_and_verify_from_the_command_line(site: Path, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--method", "mean-magnitude", "--target", "npz", "--out", str(out), *COMMON]
    pruned = run(site, "-m", "mptk", "prune", model, *options)
    assert pruned.returncode == 0, pruned.stderr
    report = Report.read(out)
    assert (report.settings.method, report.settings.target) == ("mean-magnitude", "npz")
    narrowed = [f["width"] for f in report.families.values() if f["width"] < f["of"]]
    assert narrowed
    assert all(width % 8 == 0 for width in narrowed)
    assert [d["stage"] for d in report.proof] == ["stored weights", "rewritten graph"]
    assert not (out / "config.json").exists()
    verified = run(site, "-m", "mptk", "verify", str(out))
    assert verified.returncode == 0, verified.stderr


def test_without_the_plugin_its_names_are_unknown(model: str, tmp_path: Path) -> None:
    for option in ("--method", "--target"):
        missing = run(Path(), "-m", "mptk", "prune", model, option, "npz", "--out", str(tmp_path / "out"), *COMMON)
        assert missing.returncode == 2
        assert f"Invalid value for '{option}': 'npz' is not known" in missing.stderr


ANALYSED = """
import torch
from torch import nn
import mptk
from mptk_example.rule import gate

class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.by, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 7)
    def forward(self, x):
        return self.down(gate(self.up(x), self.by(x)))

(family,) = mptk.analyze(Gated(), [torch.randn(3, 6)]).families
print(family.size, sorted(member.weight for member in family.groups[0].members))
"""


def test_rule_makes_its_operator_prunable_and_is_listed(site: Path) -> None:
    analysed = run(site, "-c", ANALYSED)
    assert analysed.returncode == 0, analysed.stderr
    members = ["by.bias", "by.weight", "down.weight", "up.bias", "up.weight"]
    assert analysed.stdout.strip() == f"10 {members}"
    listed = run(site, "-m", "mptk", "ops")
    assert "mptk_example.gate" in listed.stdout


def test_a_plugin_that_does_not_load_is_one_line(site: Path, tmp_path: Path) -> None:
    broken = tmp_path / "site"
    shutil.copytree(site, broken)
    (broken / "mptk_example" / "target.py").unlink()
    failed = run(broken, "-m", "mptk", "analyze", "nothing-there")
    assert failed.returncode == 1
    failed = run(
        broken, "-m", "mptk", "prune", "m", "--target", "npz", "--steps", "0", "--method", "wanda", "--out", "o"
    )
    assert failed.returncode == 1
    assert "the plugin npz of mptk-example does not load" in failed.stderr
    assert "Traceback" not in failed.stderr
