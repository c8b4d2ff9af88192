"""quantized_checkpoints: checkpoints of transformers whose weights are quantised (GPTQ, AWQ, fp8, bitsandbytes, …).

Such a folder or hub id stands for a model wherever one is named. Its weights are written as floats once, to a
checkpoint in the cache folder, and a note in the report says so. README.md lists what a model may be. Some formats
need ``mptk[quantized]``.

``loader``: such a checkpoint as a model. ``formats``: how each method stores a matrix.
"""

from mptk.protocols import Feature

FEATURE = Feature(
    "quantized_checkpoints",
    "read checkpoints whose weights are quantised",
    page="README.md",
    loaders=["mptk.features.quantized_checkpoints.loader:QUANTIZED"],
)
