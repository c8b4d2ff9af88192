"""The benchmark of accelerators runs on a CPU, too: each job's stages, resumed, side by side in a table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, scale, scale_checkpoint
from benchmarks.gpu import JOBS, Stages, do, main

SIZES = {"layers": 2, "hidden": 64, "ffn": 320, "heads": 4, "kv_heads": 2, "vocab": 301}


@pytest.fixture
def work(tmp_path, inside):
    """A folder with the checkpoint of the quick run, of which jobs run in this process."""
    scale_checkpoint.make_checkpoint(tmp_path / "tiny", scale_checkpoint.config_of(**SIZES), characters=20_000)

    def here(measured: object, command: list[str], *_: object, **__: object) -> scale.Row:
        do(gpu.Job(**json.loads(command[-1])))
        return {"seconds": 1.0, "command": "here"}

    inside.around("benchmarks.gpu.measured", here)
    return tmp_path


def run(work: Path, *, jobs: str) -> list[scale.Row]:
    file = work / "gpu.json"
    options = {"models": "", "samples": 1, "length": 1, "steps": 1, "memory": "", "threads": 1, "job": ""}
    main(devices="cpu", jobs=jobs, work=work, json_file=file, quick=True, show=False, **options)  # type: ignore[arg-type]
    return scale.rows_in(file)


def test_every_job_runs_by_stages_and_is_not_run_again(work, capsys):
    jobs = [job for job in JOBS if job != "taylor"]  # as wanda
    rows = run(work, jobs=",".join(jobs))
    assert [row["row"] for row in rows] == jobs
    stages = {row["row"]: set(row["stages"]) for row in rows}
    assert {"score (wanda)", "choose widths", "prove"} <= stages["wanda"]
    assert {"masks", "recovery", "prove"} <= stages["masks"]
    assert {"recovery", "prove"} <= stages["recovery"]
    assert stages["proof"] == {"proof"}
    assert all(found["seconds"] >= 0 and "peak_bytes" not in found for r in rows for found in r["stages"].values())
    assert "| tiny | masks | recovery | " in capsys.readouterr().out
    assert run(work, jobs=",".join(jobs)) == rows, "with the seconds of the first run"


def test_a_devices_peak_belongs_to_the_stage_that_reached_it():
    class Memory:
        peak, now = 0, 5

        def reset_peak_memory_stats(self, _: torch.device) -> None:
            self.peak = self.now

        def synchronize(self, _: torch.device) -> None:
            """Nothing is pending."""

        def max_memory_allocated(self, _: torch.device) -> int:
            return self.peak

    stages, memory = Stages("cpu"), Memory()
    stages.module = memory  # type: ignore[assignment]
    for stage, peak in (("will need about 1 GB", 99), ("load", 7), ("load", 9), ("score", 30), ("load", 8)):
        stages(stage, 0, 0)
        memory.peak = max(memory.peak, peak)
    stages.end()
    assert {name: found["peak_bytes"] for name, found in stages.found.items()} == {"load": 9, "score": 30}
