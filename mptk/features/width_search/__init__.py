"""Width search: rank the ways to divide a budget among families and blocks, by loss and by a short training.

``mptk shapes MODEL --sparsity 0.5`` prints the ranking, and ``mptk prune --search`` cuts to its first. docs/shapes.md
tells more.
"""

from mptk.config import CHOOSER, DIVIDER, READER, WRITER
from mptk.plugins import Command, Feature

FEATURE = Feature(
    "width_search",
    "rank the ways to divide a budget",
    page="docs/shapes.md",
    commands=[
        Command(
            "shapes",
            "mptk.cli.advise",
            "Prune a model",
            after="rung",
            roles=(CHOOSER, DIVIDER, READER, WRITER),
        )
    ],
)
