"""gguf: files of llama.cpp.

A ``.gguf`` file stands for a model wherever one is named: ``mptk prune model.gguf …``. It is dequantised once, to a
checkpoint of floats in the cache folder; what needs only the config reads the file's metadata. README.md lists what a
model may be; docs/deploy.md says how a result becomes such a file.

``loader``: a file as a model. ``reading``: its metadata, and the checkpoint that it becomes.
"""

from mptk.plugins import Feature

FEATURE = Feature(
    "gguf",
    "read and write files of llama.cpp",
    page="docs/deploy.md",
    loaders=["mptk.features.gguf.loader:GGUF"],
)
