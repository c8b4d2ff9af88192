"""videos: folders of pictures, the frames of a video each, as the model's image processor makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES

from mptk.errors import MptkError
from mptk.io.models import Loaded
from mptk.progress import Count
from mptk.tasks.inputs.base import Named, load_preprocessor
from mptk.tasks.inputs.images import Images, open_image


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
        return {"pixel_values": torch.stack([pixels.roll(shift, -1) for shift in range(frames)], 1)}

    def find(self, data: str) -> list[Path]:
        """The folders below ``data`` that hold pictures, in the order of their paths."""
        return list(dict.fromkeys(file.parent for file in super().find(data)))

    def prepared(self, loaded: Loaded, files: Sequence[Path], progress: Count) -> Named:
        """The first frames of each folder, in the order of their names.

        Raises:
            MptkError: the model has no processor, or a folder has too few pictures.
        """
        processor, frames = load_preprocessor(loaded, AutoImageProcessor, "image processor"), count_frames(loaded.model)
        made = []
        for done, folder in enumerate(files, 1):
            pictures = sorted(file for file in folder.iterdir() if file.suffix.lower() in self.suffixes)[:frames]
            if len(pictures) != frames:
                raise MptkError(f"{folder} has {len(pictures)} frames, and the model reads {frames}; give more")
            found = processor(images=[open_image(file) for file in pictures], return_tensors="pt")["pixel_values"]
            made.append(found.reshape(1, frames, *found.shape[-3:]))
            progress(done, len(files))
        return {"pixel_values": torch.cat(made)}
