"""latents: what a denoiser of diffusers reads: latents, timesteps, and what they are conditioned on.

Samples are the calls that the model's own pipeline makes of its denoiser while it makes images (``record_samples``).
Random samples need only the config.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mptk.config import Settings
from mptk.errors import InputError, ModelError, take_first_line
from mptk.features.diffusers.parts import ADDED_CONDITIONS, open_pipeline
from mptk.io import RANDOM_DATA, Loaded
from mptk.io import data as text
from mptk.io.text.sources import SELF
from mptk.progress import Count
from mptk.tasks.inputs.base import EXAMPLES, Inputs, Named

TRAINED_TIMESTEPS = 1000
"""Timesteps that a denoiser is trained on."""
TEXT_TOKENS, LATENT_PATCHES = 16, 16
"""Tokens of random text embeddings, and patches of random packed latents."""


class Latents(Inputs):
    """Latents float32 [n, channels, height, width], or packed [n, patches, channels]; timesteps float32 [n]; and more.

    The timesteps are spread evenly over the schedule.
    """

    def make_example(self, model: nn.Module) -> Named:
        return draw_latents(model, EXAMPLES, 0)

    def draw_calibration(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Named:
        return self._draw_samples(loaded, settings.data, count, settings.seed, progress)

    def draw_evaluation(self, loaded: Loaded, settings: Settings) -> Named:
        source = settings.eval_data or settings.data
        return self._draw_samples(loaded, source, settings.eval_windows, settings.seed + 1, lambda done, total: None)

    def name_data(self, data: str) -> str:
        return "images of its own pipeline" if data == SELF else super().name_data(data)

    def _draw_samples(self, loaded: Loaded, data: str, count: int, seed: int, progress: Count) -> Named:
        if data == RANDOM_DATA:
            return draw_latents(loaded.model, count, seed)
        return record_samples(loaded, self.make_example(loaded.model), data, count, seed, progress)


LATENTS = Latents()


def draw_latents(model: nn.Module, count: int, seed: int) -> Named:
    """``count`` random samples of what a denoiser reads."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    parameters = inspect.signature(model.forward).parameters
    size = getattr(config, "sample_size", None)
    order = [*parameters, *ADDED_CONDITIONS]
    shapes = (
        (n, [size for size in shape if size]) for n, shape in _list_shapes(model, size).items() if None not in shape
    )
    made = {name: torch.randn(count, *shape, generator=generator) for name, shape in shapes if name in order}
    # Every part of the schedule once, in a random order.
    spread = (torch.randperm(count, generator=generator) + 0.5) / count
    made["timestep"] = spread * (1 if size is None else TRAINED_TIMESTEPS)  # packed latents come with times from 0 to 1
    if classes := _find_first(config, "num_embeds_ada_norm", "num_class_embeds"):
        made["class_labels"] = torch.randint(classes, (count,), generator=generator)
    if getattr(config, "guidance_embeds", False):
        made["guidance"] = torch.full((count,), 3.5)  # the default of Flux's pipeline
    if getattr(config, "caption_channels", None) and "encoder_attention_mask" in parameters:
        made["encoder_attention_mask"] = torch.ones(count, TEXT_TOKENS)  # of PixArt's padded captions
    # What has no default must be there; all else may be left out.
    needs = {name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    if lacking := sorted(needs - made.keys()):
        raise ModelError(
            f"{type(model).__name__} reads {lacking[0]}, which mptk cannot make; cut it in Python with example_inputs "
            "(docs/python.md)",
            name=lacking[0],
        )
    return {name: made[name] for name in order if name in made}


def _list_shapes(model: Any, size: int | Sequence[int] | None) -> dict[str, tuple[int | None, ...]]:
    """Input → its shape without the samples' dimension; None in it: the class does not read it."""
    config = model.config
    height, width = size if isinstance(size, Sequence) else (size, size)
    latents = (LATENT_PATCHES, config.in_channels) if size is None else (config.in_channels, height, width)
    text = _find_first(config, "joint_attention_dim", "caption_channels", "cross_attention_dim")
    shapes: dict[str, tuple[int | None, ...]] = {
        "sample": latents,
        "hidden_states": latents,
        "encoder_hidden_states": (TEXT_TOKENS, text),
        "pooled_projections": (_find_first(config, "pooled_projection_dim"),),
        "img_ids": (LATENT_PATCHES, 3),
        "txt_ids": (TEXT_TOKENS, 3),
    }
    if getattr(config, "addition_embed_type", None) == "text_time":  # Stable Diffusion XL: sizes of image and crop
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        shapes |= {"text_embeds": (width,), "time_ids": (6,)}
    if getattr(model, "use_additional_conditions", False):  # PixArt
        shapes |= {"resolution": (2,), "aspect_ratio": (1,)}
    return shapes


def _find_first(config: object, *names: str) -> int | None:
    """The first of these numbers that a config has; of one for each block, the first block's."""
    found = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    return found[0] if isinstance(found, list | tuple) else found


# ---- samples of the model's own pipeline ----

IMAGE_STEPS = 20
"""Timesteps in which an image is made here, spread over the schedule."""


def record_samples(
    loaded: Loaded, like: Mapping[str, Tensor], data: str, count: int, seed: int, progress: Count
) -> dict[str, Tensor]:
    """``count`` samples that the model's pipeline gives it, in a random order of images and timesteps.

    ``like``: examples of the inputs. ``data``: text with a prompt on each line; ``self`` if the pipeline reads none.
    """
    model = loaded.load_all()
    pipeline = open_pipeline(loaded.path, model)
    pipeline.set_progress_bar_config(disable=True)
    calls: list[dict[str, Tensor]] = []
    names = inspect.signature(model.forward)

    def record(module: nn.Module, args: tuple[object, ...], given: dict[str, object]) -> None:
        calls.append(_collect_inputs(names.bind(*args, **given).arguments, like))

    # The pipeline runs as it is; the hook sees the denoiser's inputs. The generator gives images, timesteps and the
    # order.
    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    generator = torch.Generator().manual_seed(seed)
    try:
        for condition in draw_conditions(pipeline, data, generator):
            _make_image(pipeline, condition, min(IMAGE_STEPS, count), generator)
            found = sum(len(call["timestep"]) for call in calls)
            progress(min(found, count), count)
            if found >= count:
                break
    finally:
        hook.remove()
    inputs = {name: torch.cat([call[name] for call in calls]) for name in like}
    chosen = torch.randperm(len(inputs["timestep"]), generator=generator)[:count]
    return {name: tensor[chosen] for name, tensor in inputs.items()}


def draw_conditions(pipeline: Any, data: str, generator: torch.Generator) -> Iterator[Mapping[str, object]]:
    """What each image is made of, as arguments of the pipeline, again and again."""
    arguments = inspect.signature(pipeline.__call__).parameters
    if "prompt" in arguments:
        if data == text.SELF:
            raise InputError(
                "this pipeline makes images of prompts; give a file with one on each line with --data, or random",
                name="data",
            )
        pieces = ("".join(document) for document in text.read_documents(data, None))
        prompts = [line.strip() for piece in pieces for line in piece.splitlines() if line.strip()]
        yield from ({"prompt": prompt} for prompt in itertools.cycle(prompts))
    elif "class_labels" in arguments:
        classes = pipeline.transformer.config.num_embeds_ada_norm
        while True:
            yield {"class_labels": torch.randint(classes, (1,), generator=generator).tolist()}
    else:
        yield from itertools.repeat({})


def _make_image(pipeline: Any, condition: Mapping[str, object], steps: int, generator: torch.Generator) -> None:
    arguments = inspect.signature(pipeline.__call__).parameters
    options = {"num_inference_steps": steps, "generator": generator, "output_type": "latent"}
    options["use_resolution_binning"] = False  # the model's own size
    known = {name: value for name, value in options.items() if name in arguments}
    try:
        with torch.no_grad():
            pipeline(**condition, **known)
    except Exception as error:  # any part may raise anything
        raise ModelError(
            f"the pipeline {type(pipeline).__name__} does not run ({take_first_line(error)}); try it in diffusers",
            name=type(pipeline).__name__,
        ) from error


def _collect_inputs(given: Mapping[str, Any], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one call, each with as many samples as the latents, in the types of the examples."""
    # Some inputs stand in a dict, and a timestep may be one number for the whole batch.
    flat = {**given, **given.get("kwargs", {}), **(given.get("added_cond_kwargs") or {})}
    count = len(flat[next(iter(like))])
    found = {}
    for name, example in like.items():
        tensor = torch.as_tensor(flat[name]).to(example.dtype)
        tensor = tensor if tensor.ndim == example.ndim else tensor[None]
        found[name] = tensor.expand(count, *tensor.shape[1:]).clone()
    return found
