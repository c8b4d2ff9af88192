"""prompts: a prompt with images, as the processor of an exported vision-language model writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor

from mptk.errors import MptkError, take_first_line
from mptk.io import models
from mptk.io.chat_templates import ChatTemplate
from mptk.ort.decoder import OrtDecoder, find_model_folder
from mptk.ort.generation import PromptImages
from mptk.tasks.inputs.chats import Chat
from mptk.tasks.inputs.image_forms import POSITIONS, compute_image_positions
from mptk.tasks.inputs.image_text import find_image_token
from mptk.tasks.inputs.images import open_image
from mptk.tasks.padding import IDS
from mptk.trust import NO_CODE

SEVERAL_AXES = 3
"""The rank of a decoder's positions that are on several axes."""


def encode_image_prompt(
    place: str, decoder: OrtDecoder, prompt: str, images: Sequence[Path]
) -> tuple[list[int], PromptImages]:
    """Token ids of a prompt after its images, and these. ``place``: the folder of the graphs, or one of them.

    They are in the processor's chat template. If there is none, each image's token comes before the text.

    Raises:
        MptkError: the model reads no images, or none of this size; it has no processor; or a file is no image.
    """
    if decoder.embeddings is None:
        raise MptkError(f"{place} reads no images; leave out --image")
    folder = find_model_folder(place)
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    chat = Chat([{"role": "user", "content": parts}], list(images), "the prompt")
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=NO_CODE.allows_code)
        opened = [open_image(path) for path in images]
        with ChatTemplate(processor) as template:
            text = chat.text(processor, template, asks=True)
        made = processor(text=[text], images=opened, return_tensors="pt")
    except (OSError, ValueError, ImportError, TypeError, KeyError, IndexError) as error:
        raise MptkError(
            f"the processor of {folder} does not take the prompt: {take_first_line(error)}; copy the files of the "
            "dense "
            "model's processor into it"
        ) from error
    given = {name: made[name] for name in decoder.embeddings.images.inputs}
    if not decoder.embeddings.takes(given):
        height, width = given["pixel_values"].shape[-2:]
        raise MptkError(f"the vision encoder takes no images of {height} x {width}; give images of the data's size")
    return made[IDS][0].tolist(), PromptImages(given, _compute_positions(folder, decoder, {IDS: made[IDS], **given}))


def _compute_positions(folder: Path, decoder: OrtDecoder, inputs: Mapping[str, Tensor]) -> Any:
    """The positions of the tokens on several axes, int64 [axes, 1, length]; None if the decoder has one axis."""
    if len(decoder.inputs["position_ids"].shape) < SEVERAL_AXES:
        return None
    model = models.build_skeleton(str(folder))
    found = compute_image_positions(model, inputs, inputs[IDS] == find_image_token(model))
    return torch.transpose(found[POSITIONS], 0, 1).numpy()
