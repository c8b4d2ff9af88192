"""Advice: how far can this model be cut for this text? Measured before any cut is made.

``mptk advise MODEL --data A,B`` measures cuts of several sizes on each text and says which sparsity is safe;
``mptk.advise`` gives the same as an object. ``mptk prune --quantize auto`` cuts and rounds by it.
docs/how-to/how-far.md tells more.
"""

from mptk.config import CHOOSER, READER
from mptk.protocols import Command, Feature

FEATURE = Feature(
    "advise",
    "say which sparsity is safe for a text",
    page="docs/how-to/how-far.md",
    commands=[
        Command(
            "advise",
            "mptk.features.advise.command",
            "Prune a model",
            after="analyze",
            roles=(CHOOSER, READER),
            takes=("steps", "eval_windows"),
        )
    ],
    stages={"advise": "mptk.features.advise.stage:TYPE_STAGE"},
    rows={"advice": "mptk.features.advise.advice:Advice"},
    views={"advice": "mptk.features.advise.view:ChoiceView"},
)
