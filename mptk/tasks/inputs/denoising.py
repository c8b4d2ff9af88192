"""denoising: record what a diffusers pipeline gives its denoiser at each timestep while it makes images."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mptk.errors import MptkError, take_first_line
from mptk.io import data as text
from mptk.io.diffusion import open_pipeline
from mptk.io.models import Loaded
from mptk.progress import Count

IMAGE_STEPS = 20
"""Timesteps in which an image is made here, spread over the schedule."""


def record_samples(
    loaded: Loaded, like: Mapping[str, Tensor], data: str, count: int, seed: int, progress: Count
) -> dict[str, Tensor]:
    """``count`` samples that the model's pipeline gives it, in a random order of images and timesteps.

    ``like``: examples of the inputs. ``data``: text with a prompt on each line; ``self`` if the pipeline reads none.

    Raises:
        MptkError: the model has no pipeline, or it needs prompts; or the pipeline does not run.
    """
    model = loaded.whole()
    pipeline = open_pipeline(loaded.path, model)
    pipeline.set_progress_bar_config(disable=True)
    calls: list[dict[str, Tensor]] = []
    names = inspect.signature(model.forward)

    def record(module: nn.Module, args: tuple[object, ...], given: dict[str, object]) -> None:
        calls.append(_collect_inputs(names.bind(*args, **given).arguments, like))

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
    """What each image is made of, as arguments of the pipeline, again and again.

    Raises:
        MptkError: the pipeline reads prompts, and ``data`` has none.
    """
    arguments = inspect.signature(pipeline.__call__).parameters
    if "prompt" in arguments:
        if data == text.SELF:
            raise MptkError(
                "this pipeline makes images of prompts; give a file with one on each line with --data, or random"
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
        raise MptkError(
            f"the pipeline {type(pipeline).__name__} does not run ({take_first_line(error)}); try it in diffusers"
        ) from error


def _collect_inputs(given: Mapping[str, Any], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one call, each with as many samples as the latents, in the types of the examples."""
    flat = {**given, **given.get("kwargs", {}), **(given.get("added_cond_kwargs") or {})}
    count = len(flat[next(iter(like))])
    found = {}
    for name, example in like.items():
        tensor = torch.as_tensor(flat[name]).to(example.dtype)
        tensor = tensor if tensor.ndim == example.ndim else tensor[None]
        found[name] = tensor.expand(count, *tensor.shape[1:]).clone()
    return found
