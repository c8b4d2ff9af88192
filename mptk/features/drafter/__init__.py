"""Drafter: cut the layers that predict further tokens (multi-token prediction) with the model, and prove the cut.

For whoever serves models of DeepSeek, GLM or Qwen3-Next that draft tokens: their checkpoints have these layers beside
the weights of the class, and without this feature a pruned folder has none. It has no option. docs/deploy.md
tells more.
"""

from mptk.protocols import Feature

FEATURE = Feature(
    "drafter",
    "cut layers that predict further tokens with the model",
    page="docs/deploy.md",
    stages={"drafter": "mptk.features.drafter.cut:CUT_HEADS"},
)
