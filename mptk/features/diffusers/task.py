"""task: models of diffusers: the denoiser of a pipeline (a transformer or a UNet), and its autoencoder.

What counts is how far they move from the dense model. No labels are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mptk.features.diffusers.parts import DiffusersConfig
from mptk.ir import Samples
from mptk.tasks.model_form import MODEL_FORM
from mptk.tasks.numbers import Numbers
from passes.frontend.trace import Flat, unwrap_module

OUT_SAMPLE = "out_sample"
"""Optimum's name of what these models give."""

CAPTION_MASK = "encoder_attention_mask"
"""PixArt's mask of its captions' padding: it has a dimension of tokens without channels."""


@dataclass(frozen=True)
class Diffusion(Numbers):
    """Fields as in ``Numbers``. ``main``: the input by which the kind is known."""

    main: str = "timestep"
    sequences = False

    def explain_refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        if isinstance(config, DiffusersConfig) and all(each.main_input_name == self.main for each in classes):
            return None
        return f"{type(config).__name__} is not of diffusers"

    def open_sizes(self, example: Samples) -> Mapping[str, tuple[int, ...]]:
        """The number of samples, of tokens of text and of packed patches. Height and width are as in the example."""
        return {
            name: (0, 1) if tensor.ndim == 3 or name == CAPTION_MASK else (0,)
            for name, tensor in example.inputs.items()
        }

    def choose_example(self, example: Samples, samples: Samples) -> Samples:
        few = Samples(samples.inputs)
        return few[: len(example)] if len(few) >= len(example) else few.repeat(len(example))


def run_autoencoder(module: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """The decoded images, and the latents' mean and log variance: as outputs of the program, no cut may touch them."""
    latents = module.encode(images).latent_dist
    return module.decode(latents.mode())[0], latents.parameters


class Encoded(Flat):
    """An autoencoder called with images, which also gives the latents."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return run_autoencoder(self.module, *inputs)


@dataclass(frozen=True)
class Autoencoding(Diffusion):
    """An autoencoder of images, whose latents other parts of its pipeline read."""

    main: str = "sample"

    def choose_wrapper(self, model: nn.Module, example: Samples) -> Callable[[nn.Module, Sequence[str]], Flat]:
        return Encoded

    def call(self, module: nn.Module, samples: Samples, **more: Any) -> tuple[Tensor, Tensor]:
        """``run_autoencoder`` by way of ``forward``, which the wrappers of several processes need."""
        whole, latents = unwrap_module(module), list[Any]()

        def encode(images: Tensor) -> Any:
            latents.append(type(whole).encode(whole, images))
            return latents[-1]

        whole.encode = encode
        try:
            decoded = module(*samples.tensors)[0]
        finally:
            del whole.encode
        return decoded, latents[0].latent_dist.parameters

    def read(self, called: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = called
        return found


DENOISING = Diffusion(
    "denoising",
    "denoiser of diffusers",
    (),
    "the predicted noise, over the schedule's timesteps,",
    replace(MODEL_FORM, outputs=(OUT_SAMPLE,)),
)
AUTOENCODING = Autoencoding(
    "autoencoding",
    "autoencoder of diffusers",
    (),
    "the decoded images and their latents",
    replace(MODEL_FORM, outputs=(OUT_SAMPLE, "latent_parameters")),
)
