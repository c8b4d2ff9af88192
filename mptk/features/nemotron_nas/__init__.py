"""nemotron_nas: checkpoints of LLaMA's block in which each layer has widths of its own (DeciLM).

``mptk prune … --target nemotron-nas`` writes them, for vLLM, SGLang, TensorRT-LLM and mlx-lm. Such a folder, of mptk or
of others, also stands for a model wherever one is named, without its own code. docs/deploy.md describes both.

``target``: the form of the result. ``loader``: such a folder as a model. ``modeling_nemotron_nas``: its class, which
is copied into the result.
"""

from mptk.protocols import Feature

FEATURE = Feature(
    "nemotron_nas",
    "a width for each layer in checkpoints that vLLM, TensorRT-LLM and others read",
    page="docs/deploy.md",
    loaders=["mptk.features.nemotron_nas.loader:NEMOTRON_NAS"],
    targets={"nemotron-nas": "mptk.features.nemotron_nas.target:TARGET"},
)
