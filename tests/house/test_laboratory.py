"""The folder of the laboratory: one for the workers of a run, or one that runs name."""

from __future__ import annotations

from pathlib import Path

from mptk.testing.fixtures import place_laboratory


def test_workers_share_it_and_runs_that_name_it(monkeypatch, tmp_path):
    monkeypatch.delenv("MPTK_LABORATORY", raising=False)
    workers = {place_laboratory(tmp_path / worker) for worker in ("popen-gw0", "popen-gw1")}
    assert workers == {tmp_path / "laboratory"}
    assert place_laboratory(tmp_path) == tmp_path / "laboratory"
    monkeypatch.setenv("MPTK_LABORATORY", "named")
    assert place_laboratory(tmp_path) == Path.cwd() / "named"
