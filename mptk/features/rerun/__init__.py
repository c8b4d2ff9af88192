"""Rerun: repeat the run that made a folder, from its report, and show what differs.

For whoever wants to know whether a result can be reproduced: ``mptk rerun DIR --out NEW``. docs/command-line.md
tells more.
"""

from mptk.protocols import Command, Feature

FEATURE = Feature(
    "rerun",
    "repeat the run that made a folder",
    page="docs/command-line.md",
    commands=[
        Command(
            "rerun",
            "mptk.features.rerun.command",
            "Check the result",
            after="eval",
            takes=("overwrite", "trust_remote_code"),
        )
    ],
)
