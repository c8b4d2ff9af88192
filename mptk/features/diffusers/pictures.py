"""pictures: what an autoencoder of diffusers reads: pictures of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mptk.features.diffusers.parts import import_diffusers
from mptk.io import Loaded
from mptk.progress import Count
from mptk.tasks.inputs.base import EXAMPLES, FileInputs, Named
from mptk.tasks.inputs.images import Images, open_image


class Pictures(FileInputs):
    """``sample``, float32 [n, channels, size, size], from -1 to 1, as diffusers' own processor makes them."""

    what, suffixes = Images.what, Images.suffixes

    def make_example(self, model: nn.Module) -> Named:
        config: Any = model.config
        generator = torch.Generator().manual_seed(0)
        shape = (EXAMPLES, config.in_channels, config.sample_size, config.sample_size)
        return {"sample": torch.randn(shape, generator=generator)}

    def prepare(self, loaded: Loaded, files: Sequence[Path], progress: Count) -> Named:
        size = loaded.model.config.sample_size
        processor, made = import_diffusers().image_processor.VaeImageProcessor(resample="bilinear"), []
        for done, file in enumerate(files, 1):
            made.append(processor.preprocess(open_image(file), height=size, width=size, resize_mode="crop"))
            progress(done, len(files))
        return {"sample": torch.cat(made)}


PICTURES = Pictures()
