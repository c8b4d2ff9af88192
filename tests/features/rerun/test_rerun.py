"""`mptk rerun`: repeat the run that made a folder, and say what differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import done
from lab import all_of, fields
from typer.testing import CliRunner

import mptk
from mptk import Report
from mptk.cli.main import app
from mptk.errors import ChangedError, FileError
from mptk.features.rerun.api import repeat_run
from mptk.publish.manifest import write_manifest
from mptk.testing import expect_error


@pytest.fixture(scope="module")
def made(laboratory):
    """A pruned decoder without ONNX."""
    return laboratory.keep("rerun/made", lambda out: laboratory.prune("decoder", out))


def find_differences(folder: Path, again: Path) -> set[str]:
    return {row["what"] for row in repeat_run(folder, again) if not row["same"]}


def test_rerun_gives_the_same_and_says_so(made, tmp_path):
    run = done("rerun", made, "--out", tmp_path / "again", "--json", tmp_path / "rerun.json")
    assert "the run gave the same result" in run.stdout
    rows = {row["what"]: row["same"] for row in json.loads((tmp_path / "rerun.json").read_text())["rows"]}
    assert {"model", "plan", "weights", "calibration data (input_ids)", "quality of pruned", "mptk", "torch"} <= {*rows}
    assert all(rows.values())


def test_rerun_says_what_differs(made, tmp_path):
    other, text = shutil.copytree(made, tmp_path / "other"), tmp_path / "text.raw"
    text.write_text(" ".join(f"w{n * n % 95} w{n % 95}" for n in range(1500)))
    fields("report.json", settings__data=str(text), versions__torch="1.0")(other)
    with expect_error(ChangedError, name="report.json"):
        repeat_run(other, tmp_path / "again")
    write_manifest(other)
    result = CliRunner().invoke(app, ["rerun", str(other), "--out", str(tmp_path / "again")])
    assert result.exit_code == 1
    before, differs, last = result.stdout.rpartition("differs in ")
    assert differs
    assert not before.strip() or before.endswith("\n")
    assert all(words in last for words in ("calibration data", "quality of pruned", "torch"))
    assert "transformers" not in last


def test_rerun_compares_the_files_and_not_what_the_report_says_of_them(made, tmp_path):
    """Whoever changes a file can make the manifest fit, and other versions may give the same."""
    other = shutil.copytree(made, tmp_path / "other")
    all_of(fields("config.json", rms_norm_eps=0.5), fields("report.json", versions__torch="1.0"), write_manifest)(other)
    assert find_differences(other, tmp_path / "again") == {"torch", "written config.json"}


def test_a_recovery_is_repeated_too(laboratory, tmp_path):
    assert find_differences(laboratory.open_recovered(), tmp_path / "again") == set()


def test_a_report_does_not_choose_where_a_rerun_writes(made, tmp_path):
    copy = shutil.copytree(made, tmp_path / "copy")
    asked = {"teacher": "cached", "teacher_cache": str(tmp_path / "elsewhere"), "tracker": "wandb"}
    fields("report.json", **{f"settings__learning__{name}": value for name, value in asked.items()})(copy)
    write_manifest(copy)
    assert Report.read(copy).settings.learning.teacher_cache
    repeat_run(copy, tmp_path / "out")
    learning = Report.read(tmp_path / "out").settings.learning
    assert (learning.teacher, learning.teacher_cache, learning.tracker) == ("cached", None, "none")


def test_a_run_is_not_repeated_after_its_weights_were_changed_in_memory(tmp_path):
    net, x = torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.ReLU(), torch.nn.Linear(20, 4)), torch.randn(8, 6)
    mptk.prune(net, tmp_path / "out", example_inputs=x, sparsity=0.2, method="magnitude", onnx=False, progress=None)
    opened = mptk.Pruned.open(tmp_path / "out")
    for parameter in opened.model.parameters():
        parameter.data.add_(1)
    folder = opened.save(tmp_path / "trained")
    with expect_error(FileError, name=folder):
        repeat_run(folder, tmp_path / "again")
