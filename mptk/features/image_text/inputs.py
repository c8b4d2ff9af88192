"""image_text: text with an image in it. The class says how many tokens an image becomes, its processor where they are.

All samples have as many tokens: the image's, and ``length`` of text. A shorter text is filled with its own tokens,
which no loss counts. At the end: the prompt with images that an exported model is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, PreTrainedModel

from mptk.config import Settings
from mptk.errors import DataError, FileError, InputError, ModelError, take_first_line
from mptk.features.image_text.image_forms import (
    GRIDS,
    KNOWN_SIZES,
    compute_image_positions,
    count_image_tokens,
    make_image_inputs,
)
from mptk.io import (
    RANDOM_DATA,
    ChatTemplate,
    Loaded,
    check_ids,
    check_positions,
    find_position_limit,
    models,
    name_data,
)
from mptk.io.data import SELF
from mptk.ort.decoder import OrtDecoder
from mptk.ort.generation import PromptImages
from mptk.ort.graph_files import find_model_folder
from mptk.progress import Count
from mptk.tasks.inputs.base import PIXELS, POSITIONS, Inputs, Named, count_measured_only, load_preprocessor
from mptk.tasks.inputs.chats import Chat, has_images, read_chats
from mptk.tasks.inputs.images import open_image
from mptk.tasks.inputs.text import TextWindows, count_vocabulary, make_example_ids
from mptk.tasks.padding import IDS
from mptk.trust import NO_CODE

START = 1
"""Tokens of text before the image, if no processor says where it is."""
FILLED = "text_tokens"
"""Beside the inputs of read data: how many tokens of each sample are its own, int64 [samples]."""


class ImagesWithText(Inputs):
    """``input_ids`` with an image in each sample, ``pixel_values``, and sizes and positions if the class reads them."""

    def make_example(self, model: nn.Module) -> Named:
        return with_images(model, make_example_ids(), torch.Generator().manual_seed(0))

    def draw_calibration(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Named:
        seed = settings.seed
        if settings.data in (RANDOM_DATA, SELF):
            text = TextWindows().draw_calibration(loaded, settings, count, progress)[IDS]
            return with_images(loaded.model, text, torch.Generator().manual_seed(seed))
        if not has_images(settings.data):
            return without_images(loaded, TextWindows().draw_calibration(loaded, settings, count, progress))
        chats = read_chats(settings.data)
        chats = chats[count_measured_only(len(chats), settings) :]
        order = torch.randperm(len(chats), generator=torch.Generator().manual_seed(seed))
        return self.prepare(loaded, [chats[i] for i in order[:count]], settings.length, progress)

    def draw_evaluation(self, loaded: Loaded, settings: Settings) -> Named:
        data, count, length = settings.eval_data or settings.data, settings.eval_windows, settings.eval_length
        if data in (RANDOM_DATA, SELF):
            asked = replace(settings, data=data, length=length, seed=settings.seed + 1)
            return self.draw_calibration(loaded, asked, count, lambda done, total: None)
        if not has_images(data):
            return without_images(loaded, TextWindows().draw_evaluation(loaded, settings))
        chats = read_chats(data)
        measured = chats[: count_measured_only(len(chats), settings) or count]
        return self.prepare(loaded, measured, length, lambda done, total: None)

    def name_data(self, data: str) -> str:
        return super().name_data(data) if data in (RANDOM_DATA, SELF) or has_images(data) else name_data(data)

    def prepare(self, loaded: Loaded, chats: Sequence[Chat], length: int, progress: Count) -> Named:
        """The chats as the model's processor prepares them, each with ``length`` tokens beside its image's."""
        packages = " install pillow and torchvision if they are missing,"
        processor, made = load_preprocessor(loaded, AutoProcessor, "processor", packages), []
        names = list(self.make_example(loaded.model))
        # The template came with the checkpoint: it runs in a process of its own, within bounds.
        with ChatTemplate(processor) as template:
            texts = [chat.render(processor, template) for chat in chats]
        for done, (chat, text) in enumerate(zip(chats, texts, strict=True), 1):
            made.append(prepare_sample(loaded.model, processor, chat, text, names, length))
            progress(done, len(chats))
        # All samples go through one trace, which holds the sizes of images.
        sizes = {
            str([[x.shape for x in one.values()], [x.tolist() for n, x in one.items() if n in KNOWN_SIZES]])
            for one in made
        }
        if len(sizes) > 1:
            raise DataError(
                f"the processor of {loaded.source} makes samples of {len(sizes)} sizes; give images of one size, and "
                "as many in each chat",
                name=loaded.source,
            )
        found = {name: torch.cat([one[name] for one in made]) for name in made[0]}
        check_ids(loaded.model, found[IDS])
        _check_marks(loaded, {name: tensor[:1] for name, tensor in found.items()})
        return found


def prepare_sample(
    model: PreTrainedModel, processor: Any, chat: Chat, text: str, names: Sequence[str], length: int
) -> Named:
    """A chat, whose text the processor reads, as tensors: one sample in the first dimension, with ``FILLED``.

    ``names``: of the model's inputs.
    """
    token = find_image_token(model)
    images = [open_image(path) for path in chat.images]
    try:
        found = processor(text=[text], images=images, return_tensors="pt")
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise DataError(
            f"the processor does not take {chat.where}: {take_first_line(error)}; check its images", name=chat.where
        ) from error
    if missing := [name for name in names if name not in (*found, POSITIONS)]:
        raise ModelError(
            f"the processor gives no {missing[0]}, which the model reads; give --inputs (docs/kinds.md)",
            name=missing[0],
        )
    ids = found[IDS]
    marks = int((ids == token).sum())
    # Cut or fill up the text, so that all samples have as many tokens. No image may be cut off with it.
    total = marks + limit_text(model, marks, length)
    if total < ids.shape[1] and int((ids[:, total:] == token).sum()):
        raise DataError(f"{chat.where} has an image after {length} tokens of text; give more --length", name=chat.where)
    # A short text is filled with its own tokens, without the image's.
    plain = ids[ids != token]
    own = min(total, ids.shape[1])
    filled = torch.cat([ids, plain.repeat(-(-total // len(plain)))[None]], 1)[:, :total]
    inputs = {name: found[name] for name in names if name not in (IDS, POSITIONS)}
    if GRIDS in inputs:
        inputs[PIXELS] = inputs[PIXELS][None]
    given = {IDS: filled, **inputs}
    return {**given, **compute_image_positions(model, given, filled == token), FILLED: torch.tensor([own])}


def with_images(model: Any, text: Tensor, generator: torch.Generator, example: Named | None = None) -> Named:
    """Text, int64 [samples, length], with an image of normal noise in each sample. ``example``: one of its size."""
    # Of the text no token may stand for an image; then the image's own tokens go in after the first one.
    example, token = make_image_inputs(model) if example is None else example, find_image_token(model)
    count = count_image_tokens(model, example)
    text = torch.where(text == token, shift_tokens(model, text), text)
    marks = torch.full((len(text), count), token)
    ids = torch.cat([text[:, :START], marks, text[:, START : limit_text(model, count, text.shape[1])]], 1)
    inputs = {name: _draw_like(x, len(text), generator) for name, x in example.items()}
    given = {IDS: ids, **inputs}
    return {**given, **compute_image_positions(model, given, ids == token)}


def without_images(loaded: Loaded, text: Named) -> Named:
    """The text. Raises MptkError if a token in it stands for an image."""
    if int((text[IDS] == find_image_token(loaded.model)).sum()):
        raise DataError(
            "the text holds the token of images, and there are none; give a .jsonl of chats with images", name="data"
        )
    return text


def _check_marks(loaded: Loaded, sample: Named) -> None:
    """Raise MptkError unless the processor leaves as many places for an image as the class fills."""
    marks = int((sample[IDS] == find_image_token(loaded.model)).sum())
    features = count_image_tokens(loaded.model, {n: x for n, x in sample.items() if n in (PIXELS, *KNOWN_SIZES)})
    if marks != features:
        raise FileError(
            f"the processor of {loaded.source} leaves {marks} tokens for its images, and the class has {features} "
            "features for them; correct processor_config.json (patch_size, vision_feature_select_strategy, …)",
            name="processor_config.json",
        )


def shift_tokens(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """For each token another one, which does not stand for an image."""
    size, token = count_vocabulary(model), find_image_token(model)
    following = (ids + 1) % size
    return torch.where(following == token, (ids + 2) % size, following)


def find_image_token(model: nn.Module) -> int:
    """The token in whose places an image's features stand. Raises MptkError if the config names none."""
    config = model.config
    for name in ("image_token_id", "image_token_index"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    raise ModelError(
        f"{type(config).__name__} names no token for images; give --inputs (docs/kinds.md)", name=type(config).__name__
    )


def _draw_like(example: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Noise for ``count`` samples in the shape of an example; sizes stay."""
    if not example.is_floating_point():
        return example[:1].repeat(count, *[1] * (example.ndim - 1))
    return torch.randn((count, *example.shape[1:]), generator=generator)


def limit_text(model: PreTrainedModel, images: int, length: int) -> int:
    """``length``, or the positions beside ``images`` tokens if these are fewer. Raises MptkError if there are none."""
    positions = find_position_limit(model.config)
    check_positions(positions, images + 2, f"samples of {images} tokens for the image and 2 of text")
    return length if positions is None else min(length, positions - images)


# ---- a prompt for an exported model ----

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
        raise InputError(f"{place} reads no images; leave out --image", name="image")
    # Write the prompt as the processor's template does, and prepare the images.
    folder = find_model_folder(place)
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    chat = Chat([{"role": "user", "content": parts}], list(images), "the prompt")
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=NO_CODE.allows_code)
        opened = [open_image(path) for path in images]
        with ChatTemplate(processor) as template:
            text = chat.render(processor, template, asks=True)
        made = processor(text=[text], images=opened, return_tensors="pt")
    except (OSError, ValueError, ImportError, TypeError, KeyError, IndexError) as error:
        raise FileError(
            f"the processor of {folder} does not take the prompt: {take_first_line(error)}; copy the files of the "
            "dense "
            "model's processor into it",
            name=folder,
        ) from error

    # The graph reads only some of what the processor makes.
    given = {name: made[name] for name in decoder.embeddings.images.inputs}
    if not decoder.embeddings.takes(given):
        height, width = given["pixel_values"].shape[-2:]
        raise DataError(
            f"the vision encoder takes no images of {height} x {width}; give images of the data's size", name="data"
        )
    return made[IDS][0].tolist(), PromptImages(given, _compute_positions(folder, decoder, {IDS: made[IDS], **given}))


def _compute_positions(folder: Path, decoder: OrtDecoder, inputs: Mapping[str, Tensor]) -> Any:
    """The positions of the tokens on several axes, int64 [axes, 1, length]; None if the decoder has one axis."""
    if len(decoder.inputs["position_ids"].shape) < SEVERAL_AXES:
        return None
    model = models.build_skeleton(str(folder))
    found = compute_image_positions(model, inputs, inputs[IDS] == find_image_token(model))
    return torch.transpose(found[POSITIONS], 0, 1).numpy()
