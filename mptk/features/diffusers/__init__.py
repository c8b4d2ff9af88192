"""diffusers: models of diffusers: the denoiser of a pipeline (a transformer or a UNet), and its autoencoder.

A part of a pipeline stands for a model wherever one is named: ``mptk prune PIPELINE/transformer …``. The result is the
whole pipeline, in which the part is smaller. docs/how-to/diffusion.md shows it. It needs ``mptk[diffusers]``.

``loader``: a part as a model. ``parts``: its config and class, as of transformers, and its pipeline. ``task``: what
counts in them. ``latents`` and ``pictures``: what they read.
"""

from mptk.protocols import Feature

FEATURE = Feature(
    "diffusers",
    "cut the models of a diffusers pipeline",
    page="docs/how-to/diffusion.md",
    loaders=["mptk.features.diffusers.loader:DIFFUSERS"],
    tasks={
        "denoising": "mptk.features.diffusers.task:DENOISING",
        "autoencoding": "mptk.features.diffusers.task:AUTOENCODING",
    },
    inputs={
        "timestep": "mptk.features.diffusers.latents:LATENTS",
        "sample": "mptk.features.diffusers.pictures:PICTURES",
    },
)
