"""of_folder: the task that a written folder was pruned as."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mptk.errors import MptkError
from mptk.io.models import Loaded
from mptk.io.untrusted import load_tensors
from mptk.protocols.report import PROVEN_ON, Report
from mptk.protocols.task import Task
from mptk.tasks import bind_task
from mptk.tasks.module import Module, make_example_samples


def find_folder_task(folder: Path, report: Report, loaded: Loaded) -> Task:
    """The task that a folder was pruned as. A module gets the example inputs of its proof."""
    inputs = load_folder_inputs(folder, report)
    return bind_task(loaded) if inputs is None else Module(make_example_samples(loaded.model, inputs))


def load_folder_inputs(folder: Path, report: Report) -> dict[str, Tensor] | None:
    """The example inputs of a folder that was pruned as a module; None if it was not."""
    if report.task != Module.name:
        return None
    return load_tensors(
        folder / PROVEN_ON,
        lambda why: MptkError(f"{folder} has no {PROVEN_ON} ({why}); do not use the folder, prune again"),
    )
