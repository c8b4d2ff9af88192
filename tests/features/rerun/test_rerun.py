"""`mptk rerun`: repeat the run that made a folder, and say what differs.

It reaches for mptk.features.rerun.api: the settings of a run that is not made.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from inside import Inside
from lab import raw_report
from test_changed_weights import X, prune_net, train
from test_cli import files, mptk, surroundings  # noqa: F401 (fixtures)
from test_recipe import made, recover_shortly  # noqa: F401 (a fixture)
from test_trust import dense, edit, pruned  # noqa: F401 (fixtures)

import mptk as api
from mptk import MptkError, Report
from mptk.features.rerun.api import repeat_run
from mptk.files import write_json
from mptk.publish.manifest import write_manifest


def test_rerun_gives_the_same_and_says_so(made: Path, tmp_path: Path, mptk) -> None:  # noqa: F811
    result = mptk("rerun", made, "--out", tmp_path / "again", "--json", tmp_path / "rerun.json")
    assert result.code == 0, result.stderr
    assert "the run gave the same result" in result.stdout
    rows = {row["what"]: row for row in json.loads((tmp_path / "rerun.json").read_text())["rows"]}
    assert {"model", "plan", "weights", "calibration data (input_ids)", "quality of pruned", "mptk", "torch"} <= set(
        rows
    )
    assert all(row["same"] for row in rows.values())


def test_rerun_says_what_differs(made: Path, tmp_path: Path, mptk) -> None:  # noqa: F811
    other = tmp_path / "other"
    shutil.copytree(made, other)
    text = tmp_path / "text.raw"
    text.write_text(" ".join(f"dragon {n} has {n * n} jars of gold\n" for n in range(150)))
    report = json.loads((other / "report.json").read_text())
    report["settings"]["data"] = str(text)
    report["versions"]["torch"] = "1.0"
    (other / "report.json").write_text(json.dumps(report))
    assert "was changed since it was published" in mptk("rerun", other, "--out", tmp_path / "again").error
    write_manifest(other)
    result = mptk("rerun", other, "--out", tmp_path / "again")
    assert result.code == 1
    assert f"the result differs from {other} in plan, weights, calibration data" in result.error
    last = result.stdout.splitlines()[-1]
    assert last.startswith("differs in ")
    assert "weights" in last or "plan" in last
    assert all(words in last for words in ("calibration data", "quality of pruned", "torch"))
    assert "transformers" not in last


def test_rerun_compares_the_files_and_not_what_the_report_says_of_them(
    made: Path,  # noqa: F811
    tmp_path: Path,
    mptk,  # noqa: F811
) -> None:
    """Whoever changes a file can make the manifest fit, and other versions may give the same."""
    other = tmp_path / "other"
    shutil.copytree(made, other)
    config = json.loads((other / "config.json").read_text())
    write_json(other / "config.json", {**config, "rms_norm_eps": 0.5})
    report = json.loads((other / "report.json").read_text())
    report["versions"]["torch"] = "1.0"
    write_json(other / "report.json", report)
    write_manifest(other)
    result = mptk("rerun", other, "--out", tmp_path / "again")
    assert result.code == 1
    assert "in written config.json; compare the versions" in result.error
    assert result.stdout.splitlines()[-1] == "differs in torch, written config.json"
    (other / "config.json").write_bytes((made / "config.json").read_bytes())
    write_manifest(other)
    result = mptk("rerun", other, "--out", tmp_path / "again")
    assert (result.code, result.stdout.splitlines()[-1]) == (0, "differs in torch")


def test_a_recovery_is_repeated_too(made: Path, tmp_path: Path, mptk) -> None:  # noqa: F811
    recover_shortly(mptk, made, tmp_path / "r")
    result = mptk("rerun", tmp_path / "r", "--out", tmp_path / "again")
    assert result.code == 0, result.stderr
    assert "the run gave the same result" in result.stdout


def test_a_report_does_not_choose_where_a_rerun_writes(
    pruned: Path,  # noqa: F811
    tmp_path: Path,
    inside: Inside,
) -> None:
    asked = inside.asked("mptk.features.rerun.api.prune")
    copy = tmp_path / "copy"
    shutil.copytree(pruned, copy)
    settings = raw_report(copy)["settings"]
    settings["learning"] |= {"teacher": "cached", "teacher_cache": str(tmp_path / "elsewhere"), "tracker": "wandb"}
    edit(copy, settings=settings)
    assert Report.read(copy).settings.learning.teacher_cache
    assert repeat_run(copy, tmp_path / "out") is None
    learning = asked[0][2].learning
    assert (learning.teacher, learning.teacher_cache, learning.tracker) == ("cached", None, "none")


def test_a_run_is_not_repeated_after_its_weights_were_changed_in_memory(tmp_path: Path) -> None:
    prune_net(tmp_path / "out")
    opened = api.Pruned.open(tmp_path / "out")
    train(opened.model, X)
    folder = opened.save(tmp_path / "trained")
    with pytest.raises(MptkError, match="mptk rerun cannot repeat"):
        repeat_run(folder, tmp_path / "again")
