"""Dual encoders: models that embed images and texts in one space, as CLIP and SigLIP.

``mptk prune MODEL --data PAIRS`` cuts both towers together. docs/how-to/dual-encoder.md shows it.

``task``: the kind of model, and its graph. ``captioned``: images with captions.
"""

from mptk.protocols import Feature

FEATURE = Feature(
    "dual_encoder",
    "cut models that embed images and texts, as CLIP",
    page="docs/how-to/dual-encoder.md",
    tasks={"dual-encoder": "mptk.features.dual_encoder.task:DUAL_ENCODER"},
)
