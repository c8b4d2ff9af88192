"""stage: the protocol of what a feature adds to the stages of a run."""

from __future__ import annotations

from collections.abc import Mapping

from mptk.config import Settings
from mptk.cost.estimate import ModelSizes, Pass
from mptk.plugins import load_parts
from mptk.protocols.chain import Compiled, Prepared
from mptk.protocols.report import Rows
from mptk.protocols.values import Context, SampleSets


class Stage:
    """What a feature does in a run. Its methods are in the order of a run.

    All of them are called in every run. They do nothing if the settings ask for nothing of the feature.
    """

    def check(self, settings: Settings) -> None:
        """Raise MptkError for settings that no model can meet. They are complete."""

    def estimate(self, settings: Settings, sizes: ModelSizes) -> Mapping[str, Pass]:
        """The work of its stages, by the name that progress shows."""
        return {}

    def divide(self, prepared: Prepared, sets: SampleSets, context: Context) -> tuple[Prepared, Rows]:
        """``prepared`` with fewer candidates, before units are chosen; and what was found as rows of the report."""
        return prepared, {}

    def complete(self, compiled: Compiled) -> Compiled:
        """``compiled`` with what else the plan cuts, such as heads that draft tokens."""
        return compiled

    def describe(self, compiled: Compiled) -> Rows:
        """Its rows of the report."""
        return {}


def list_stages() -> list[Stage]:
    """The stages that features add to a run."""
    return list(load_parts("stages").values())
