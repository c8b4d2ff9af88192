"""Hub: upload a folder that mptk wrote, with its model card, to a model hub.

For whoever shares a result: ``mptk push DIR OWNER/NAME``. Only a folder whose files are unchanged is sent.
docs/command-line.md tells more.
"""

from mptk.protocols import Command, Feature

FEATURE = Feature(
    "hub",
    "upload a folder to a model hub",
    page="docs/command-line.md",
    commands=[Command("push", "mptk.features.hub.command", "Use the result", after="gguf")],
)
