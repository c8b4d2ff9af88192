"""pruned_folder: a pruned folder that a run begins with: its cut and its weights, and training that is not its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from torch import nn

from mptk.compile.cut import find_changes
from mptk.config import Settings, collect_values
from mptk.distributed.processes import holds
from mptk.io import Resident, open_dense
from mptk.protocols import Chosen, Opened, Prepared, Report
from mptk.publish.manifest import check_manifest
from mptk.run.estimate import Estimator
from mptk.targets.stock_config import check_code
from mptk.tasks import find_folder_task
from mptk.trust import Trust


@dataclass(frozen=True)
class PrunedFolder:
    """An ``--out`` folder of ``prune``, whose cut and weights a run begins with.

    ``dense``: the dense model: its name if it has moved, itself if it was pruned in memory, or open already; None: as
    the report says. ``reads_data``: whether the run reads data, to train or to measure on.
    """

    reads_data: ClassVar[bool] = True

    folder: Path
    report: Report
    dense: str | nn.Module | Opened | None = None

    @staticmethod
    def read(folder: str | Path, dense: str | nn.Module | Opened | None = None) -> PrunedFolder:
        """The folder, as it was published. Raises MptkError if it holds no pruned model, or was changed."""
        report = Report.read(folder)
        check_manifest(Path(folder))
        return PrunedFolder(Path(folder), report, dense)

    @property
    def source(self) -> str:
        """The name of the dense model."""
        return self.dense if isinstance(self.dense, str) else self.report.model

    def take_settings(self, asked: Settings) -> Settings:
        """The settings of a run that begins with the folder.

        What is cut comes from the report, all else from ``asked``: the report decides neither ``data``, which may name
        something to download, nor whether the model's own Python code may run.
        """
        changes = {**collect_values(asked, "recover"), "learning": asked.learning}
        # The folder's weights were fitted when it was made.
        changes |= {"reconstruct": False, "distil_epochs": 0}
        return replace(self.report.settings, **changes).with_plan(str(self.folder / "plan.json"))

    def open_dense(self, resident: Resident, trust: Trust) -> Opened:
        """The dense model. Raises MptkError if it is not found, or was changed."""
        if isinstance(self.dense, Opened):
            return self.dense
        report = self.report
        loaded = open_dense(report.model, report.model_sha256, self.dense, trust, resident, live=report.live)
        return Opened(loaded, find_folder_task(self.folder, report, loaded))

    def read_estimator(self, trust: Trust) -> Estimator | None:
        """The estimator of its recovery; None: the run is too short to need one."""
        loaded = self.open_dense(Resident(0), trust).loaded  # its sizes count; no weights stay in memory
        kept = self.report.cost["pruned"]["parameters"] / self.report.cost["dense"]["parameters"]
        return Estimator(loaded.model, loaded.dtype, kept)

    def read_choice(self, prepared: Prepared) -> Chosen:
        """The plan and the weights that it has. Raises MptkError if code in it is not the dense model's."""
        check_code(prepared.loaded.path, self.folder)
        planned = prepared.planned
        assert planned is not None
        if not holds():  # the first process sends out the shards
            return planned
        changes = find_changes(prepared.analysis, planned.cut, self.folder, self.report, prepared.loaded.trust)
        return replace(planned, changes=changes)
