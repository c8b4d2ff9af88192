"""images: pictures of a folder, as the model's image processor makes them; folders of pictures as videos."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES

from mptk.errors import DataError, FileError, ModelError, PackageError
from mptk.io import Loaded
from mptk.progress import Count
from mptk.tasks.inputs.base import EXAMPLES, FileInputs, Named, load_preprocessor, select_accepted

IMAGE_SIZE, IMAGE_CHANNELS = 224, 3
"""Size of an image if neither processor nor config says one."""
SHAPES = "spatial_shapes"
"""The input with the height and the width of each image in patches, of classes that read patches."""


class Images(FileInputs):
    """``pixel_values`` and whatever else the model's image processor makes of pictures."""

    what, suffixes = "images", (".png", ".jpg", ".jpeg", ".webp", ".bmp")

    def make_example(self, model: nn.Module) -> Named:
        vision = getattr(model.config, "vision_config", model.config)
        if SHAPES in inspect.signature(model.forward).parameters:
            return make_patches(vision)
        size = getattr(vision, "image_size", None) or IMAGE_SIZE
        channels = getattr(vision, "num_channels", None) or IMAGE_CHANNELS
        height, width = size if isinstance(size, Sequence) else (size, size)
        generator = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(EXAMPLES, channels, height, width, generator=generator)}

    def prepare(self, loaded: Loaded, files: Sequence[Path], progress: Count) -> Named:
        """The files as the model's image processor prepares them."""
        packages = " install pillow and torchvision if they are missing,"
        # One file at a time: a processor may pad images of several sizes to one, and several sizes must be refused.
        processor, made = load_preprocessor(loaded, AutoImageProcessor, "image processor", packages), []
        example = self.make_example(loaded.model)
        for done, file in enumerate(files, 1):
            found = processor(images=open_image(file), return_tensors="pt")
            tensors = {n: x for n, x in found.items() if isinstance(x, torch.Tensor)}
            # A full mask says what the class assumes without one.
            read = {n: x for n, x in tensors.items() if n in example or not (n.endswith("mask") and bool(x.all()))}
            made.append(select_accepted(loaded.model, read))
            progress(done, len(files))
        names = list(example)
        # The model is traced with the example's inputs, so data must have the same ones.
        if any(set(names) != set(one) for one in made):
            extra = ", ".join(sorted(set(made[0]) ^ set(names)))
            raise ModelError(
                f"{loaded.source} reads {extra}, which mptk cannot make; give --inputs (docs/kinds.md)", name=extra
            )
        # More shapes than inputs: some input has several.
        if len({tuple(one[name].shape) for one in made for name in names}) > len(names):
            raise DataError(
                f"the image processor of {loaded.source} gives several sizes; give images of one size",
                name=loaded.source,
            )
        return {name: torch.cat([one[name] for one in made]).to(example[name].dtype) for name in names}


def make_patches(vision: Any) -> Named:
    """Square images of normal noise as patches float32 [n, patches, numbers], a mask, and their shapes int64 [n, 2]."""
    side = math.isqrt(vision.num_patches)
    width = vision.num_channels * vision.patch_size**2
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(EXAMPLES, side * side, width, generator=generator),
        "pixel_attention_mask": torch.ones(EXAMPLES, side * side, dtype=torch.int64),
        SHAPES: torch.full((EXAMPLES, 2), side),
    }


def open_image(path: Path) -> Any:
    """The picture as a PIL image, RGB. Raises MptkError if it cannot be read, or is as large as only bombs are."""
    try:
        # Pillow is an extra: only images need it.
        from PIL import Image
    except ImportError as error:
        raise PackageError(
            "pillow is not installed, and it reads images; run: pip install 'mptk[images]'", name="pillow"
        ) from error
    try:
        with (
            warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
            Image.open(path) as image,
        ):
            return image.convert("RGB")
    except Exception as error:  # each format's reader has errors of its own
        raise FileError(
            f"{path} is not a readable image ({error}); remove it or give another folder", name=path
        ) from error


def count_frames(model: nn.Module) -> int | None:
    """The frames of a video that a model of a type in transformers' list reads; None if it reads pictures."""
    config: Any = model.config
    return config.num_frames if config.model_type in MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES else None


class Videos(Images):
    """``pixel_values`` [samples, frames, channels, height, width]."""

    what = "folders of frames"

    def make_example(self, model: nn.Module) -> Named:
        frames = count_frames(model)
        assert frames is not None
        pixels = super().make_example(model)["pixel_values"]
        # Frames that differ, as a moving picture's do.
        return {"pixel_values": torch.stack([pixels.roll(shift, -1) for shift in range(frames)], 1)}

    def find(self, data: str) -> list[Path]:
        """The folders below ``data`` that hold pictures, in the order of their paths."""
        return list(dict.fromkeys(file.parent for file in super().find(data)))

    def prepare(self, loaded: Loaded, files: Sequence[Path], progress: Count) -> Named:
        """The first frames of each folder, in the order of their names."""
        processor, frames = load_preprocessor(loaded, AutoImageProcessor, "image processor"), count_frames(loaded.model)
        made = []
        for done, folder in enumerate(files, 1):
            pictures = sorted(file for file in folder.iterdir() if file.suffix.lower() in self.suffixes)[:frames]
            if len(pictures) != frames:
                raise DataError(
                    f"{folder} has {len(pictures)} frames, and the model reads {frames}; give more", name=folder
                )
            found = processor(images=[open_image(file) for file in pictures], return_tensors="pt")["pixel_values"]
            made.append(found.reshape(1, frames, *found.shape[-3:]))
            progress(done, len(files))
        return {"pixel_values": torch.cat(made)}
