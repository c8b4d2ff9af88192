"""Zipped: read checkpoints in zip files, and give each run a label. mptk imports this file at its start: keep it light."""

from dataclasses import dataclass

from mptk.config import CoreSettings, declare_setting
from mptk.protocols import Command, Feature


@dataclass(frozen=True)
class LabelSettings(CoreSettings):
    label: str = declare_setting("", "A label for the report.", "Output", ("prune",), after="strict")


FEATURE = Feature(
    "zipped",
    "read checkpoints in zip files, and label runs",
    settings=LabelSettings,
    commands=[Command("labels", "mptk_zipped.command", "Check the result", after="report")],
    loaders=["mptk_zipped.parts:ZIPPED"],
    stages={"label": "mptk_zipped.parts:LABEL"},
    rows={"label": "mptk_zipped.parts:LabelRow"},
)
