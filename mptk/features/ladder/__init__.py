"""Ladder: several sizes of a model in one run, each cut further from the next larger one.

For whoever serves a model on several machines: ``mptk prune MODEL --ladder 0.2,0.3,0.5`` makes a folder of each size.
With ``--shared`` all sizes are one set of weights in one folder, of which ``mptk rung`` writes the smaller ones.
docs/how-to/ladder.md tells more.

In reading order: ``command`` and ``api`` (what users call), ``ladder`` (sizes one after the other), ``shared`` (all at
once; ``together`` is their module in training), ``rungs`` and ``slices`` (how smaller sizes are stored), ``estimate``.
"""

from dataclasses import dataclass

from mptk.config import CUT, PRUNE, CoreSettings, Idle, declare_setting
from mptk.protocols import Command, Feature

RUNGS = "rungs"
"""The subfolder with what the smaller sizes have beside the weights that they share with the folder."""
NO_LADDER = Idle(
    lambda a: "sparsity" not in a.instead,
    "only the sizes of --ladder can share weights",
    "give --ladder, or leave it out",
)


@dataclass(frozen=True, init=False, repr=False, eq=False)  # only the joined settings are made: start-up counts
class LadderSettings(CoreSettings):
    """The setting of this feature. The sizes are none: each run of a ladder has the sparsity of one."""

    shared: bool = declare_setting(
        False,
        "One set of weights for all sizes of --ladder, in one folder; `mptk rung` writes each smaller one.",
        CUT,
        PRUNE,
        (NO_LADDER,),
        in_plan=True,
        after="larger",
    )

    @property
    def not_alone(self) -> str:
        why = "only the sizes of a ladder can share weights; use mptk.ladder, or leave out --shared"
        return why if self.shared else super().not_alone

    @property
    def subfolders(self) -> tuple[str, ...]:
        return (*super().subfolders, RUNGS) if self.shared else super().subfolders


FEATURE = Feature(
    "ladder",
    "make several sizes in one run",
    page="docs/how-to/ladder.md",
    settings=LadderSettings,
    commands=[Command("rung", "mptk.features.ladder.command", "Prune a model", after="recover")],
    options=["mptk.features.ladder.command"],
    subfolders={RUNGS: "rung"},
)
