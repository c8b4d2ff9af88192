"""images: pictures of a folder, as the model's image processor makes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor

from mptk.config.settings import Settings
from mptk.errors import MptkError
from mptk.io.images import find_images, open_image
from mptk.io.models import Loaded
from mptk.io.text.sources import RANDOM
from mptk.progress import Count
from mptk.tasks.inputs.base import Inputs, Named, accepted, random_inputs

SIZE, CHANNELS = 224, 3
"""Size of an image if neither processor nor config says one."""
BATCH = 2


class Images(Inputs):
    """``pixel_values`` and whatever else the model's image processor makes of pictures."""

    def example(self, model: nn.Module) -> Named:
        vision = getattr(model.config, "vision_config", model.config)
        size, channels = getattr(vision, "image_size", None) or SIZE, getattr(vision, "num_channels", None) or CHANNELS
        height, width = size if isinstance(size, Sequence) else (size, size)
        generator = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(BATCH, channels, height, width, generator=generator)}

    def calibration(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Named:
        if settings.data == RANDOM:
            return random_inputs(self.example(loaded.model), count, {}, settings.seed)
        files = find_images(settings.data)
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(settings.seed))
        return _prepared(loaded, [files[i] for i in order[:count]], progress)

    def evaluation(self, loaded: Loaded, settings: Settings) -> Named:
        data = settings.eval_data or settings.data
        if data == RANDOM:
            return random_inputs(self.example(loaded.model), settings.eval_windows, {}, settings.seed + 1)
        return _prepared(loaded, find_images(data)[: settings.eval_windows], lambda done, total: None)


def _prepared(loaded: Loaded, files: Sequence[Path], progress: Count) -> Named:
    """The files as the model's image processor prepares them.

    Raises:
        MptkError: the model has no processor, or it gives images of several sizes.
    """
    processor = _processor(loaded)
    made = []
    for done, file in enumerate(files, 1):
        found = processor(images=open_image(file), return_tensors="pt")
        made.append(accepted(loaded.model, {n: x for n, x in found.items() if isinstance(x, torch.Tensor)}))
        progress(done, len(files))
    names = list(Images().example(loaded.model))
    if any(set(names) != set(one) for one in made):
        extra = ", ".join(sorted(set(made[0]) ^ set(names)))
        raise MptkError(f"{loaded.source} reads {extra}, which mptk cannot make; give --inputs (docs/kinds.md)")
    if len({tuple(one[name].shape) for one in made for name in names}) > len(names):
        raise MptkError(f"the image processor of {loaded.source} gives several sizes; give images of one size")
    return {name: torch.cat([one[name] for one in made]) for name in names}


def _processor(loaded: Loaded) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(loaded.path, trust_remote_code=loaded.trusted)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MptkError(
            f"{loaded.source} has no image processor that transformers can load ({reason}); add its "
            "preprocessor_config.json, install pillow and torchvision if they are missing, or give --data random"
        ) from error
