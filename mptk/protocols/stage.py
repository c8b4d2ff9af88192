"""stage: the protocol of what a feature adds to the stages of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

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

    shorter: Mapping[str, str] = MappingProxyType({})
    """What progress calls a part of it → what makes that shorter."""
    chooses_type: bool = False
    """Whether it makes the choice of ``Settings.chooses_type``: ``divide`` then gives settings without ``auto``."""

    def check(self, settings: Settings) -> None:
        """Raise MptkError for settings that no model can meet. They are complete."""

    def choose_numbers(self, settings: Settings, tokens: int) -> Mapping[str, int]:
        """Its ``CoreSettings.further_numbers``, if the minutes of the run leave ``tokens`` to train on."""
        return {}

    def describe_numbers(self, settings: Settings) -> Sequence[str]:
        """Its numbers of complete settings, in words."""
        return []

    def count_training_samples(self, settings: Settings) -> int:
        """Number of training samples that it uses."""
        return 0

    def count_held_out(self, settings: Settings, samples: int) -> int:
        """Number of samples to hold out for it, if ``samples`` others are used."""
        return 0

    def estimate(self, settings: Settings, sizes: ModelSizes, kept: float) -> Mapping[str, Pass]:
        """Its work, by what progress calls the parts. ``kept``: the share of the parameters that the cut model has."""
        return {}

    def divide(self, prepared: Prepared, sets: SampleSets, context: Context) -> tuple[Prepared, Rows]:
        """``prepared`` with fewer candidates, before units are chosen; and what was found as rows of the report.

        It may have other settings, too, and a plan in place of candidates.
        """
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
