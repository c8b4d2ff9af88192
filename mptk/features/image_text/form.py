"""image_text_form: a vision-language model as ONNX, in the three graphs that transformers.js reads.

A program of one decoding step takes images, token ids and the cache. Its graph is divided at three values: the features
of the images, the embeddings of the tokens, and these with the features at the tokens of images. Who runs the graphs
puts them there. As all are of one program, they follow one plan, which may cut the channels of these values.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mptk.errors import TargetError
from mptk.features.image_text.image_forms import GRIDS, IMAGE_SIZES, AnyImages, arrange_inputs, make_grid_function
from mptk.features.image_text.inputs import ImagesWithText, find_image_token
from mptk.ir import Program, Samples
from mptk.ort.decoder import EMBEDDING_FILE, EMBEDDINGS, IMAGE_TOKEN, VISION_FILE, OrtDecoder
from mptk.ort.graph_files import MERGED_FILE
from mptk.progress import step
from mptk.protocols import Dense, GraphCase, Part, Traced, Use
from mptk.staged.staged import Executor
from mptk.tasks.decoder_form import DECODER_FORM
from mptk.tasks.inputs.base import PIXELS, POSITIONS
from mptk.tasks.onnx_export import is_same_output
from mptk.tasks.padding import IDS, MASK
from passes.frontend.trace_decoder import (
    CacheLayerShape,
    DecoderStep,
    LogitsScope,
    cache_shapes,
    export_step,
    list_first_positions,
    make_zero_cache,
    step_inputs,
)
from passes.targets.onnx.emit import TOKEN_AXES, make_decoder_interface
from passes.targets.onnx.names import Axes

IMAGE_FEATURES, MERGED = "image_features", "merged_embeds"
"""Names of values at which the graph is divided, beside the embeddings."""
TRACED_IMAGES = 3
"""Images to trace with."""
WITH_SEVERAL = 5
"""The rank of ``pixel_values`` if samples may have several images."""
TILES = 3
"""How often the stage of sizes gives its images to the vision encoder: then there are three and nine."""
LAST = 2
"""Tokens of the second call with which a trace is checked."""
IMAGE_AXES: Axes = ("num_images", "num_channels", "height", "width")
AXES_FIRST: Axes = (None, *TOKEN_AXES)
"""The axes of positions that are on several axes."""


class PicturedStep(DecoderStep):
    """One decoding step of a model that reads images.

    Inputs: those of images, by ``names``, then a ``DecoderStep``'s. Returns its outputs, then the features of all
    images [tokens, hidden], the embeddings [B, S, hidden], and the embeddings with the features in them.
    """

    def __init__(self, module: PreTrainedModel, images: Mapping[str, Tensor], logits: LogitsScope = "all") -> None:
        super().__init__(module, logits)
        self.names, self.token = tuple(images), find_image_token(module)
        self.computed = make_grid_function(module, images[GRIDS]) if GRIDS in images else None

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        images, (ids, *others) = inputs[: len(self.names)], inputs[len(self.names) :]
        features = self.encode_images(dict(zip(self.names, images, strict=True)))
        embedding: Any = self.module.get_input_embeddings()
        # The image's token may have no row in the table. Its embedding is replaced anyway.
        known = torch.where(ids == self.token, 0, ids) if self.token >= embedding.num_embeddings else ids
        embeds = embedding(known)
        merged = embeds.masked_scatter((ids == self.token)[..., None], features.to(embeds.dtype))
        return (*self.step({EMBEDDINGS: merged}, *others), features, embeds, merged)

    def encode_images(self, images: Mapping[str, Tensor]) -> Tensor:
        """A row for each token of an image, [tokens, hidden]."""
        module: Any = self.module
        more = {} if self.computed is None else self.computed(images[GRIDS], images[PIXELS])
        with AnyImages():
            output = module.get_image_features(**images, **more, return_dict=True)
            # Such features enter the decoder in later layers, and its graph has no input for them.
            if getattr(output, "deepstack_features", None):
                raise TargetError(
                    f"{type(self.module).__name__} adds features of images to layers of its decoder",
                    name=type(self.module).__name__,
                )
            found = getattr(output, "pooler_output", output)
            joined = found if isinstance(found, Tensor) else torch.cat(list(found))
            return joined.flatten(0, -2)


def trace_with_images(dense: Dense, samples: Samples | None) -> Traced:
    """One decoding step with images, which also gives the values at which its graph is divided."""
    model, settings = dense.loaded.model, dense.settings
    shapes, shown = cache_shapes(model), Samples(ImagesWithText().make_example(model))
    # The trace is checked on these: whole samples, since a cut could divide an image's tokens.
    given = shown if samples is None else add_shown_images(shown, samples.shorten(2, sys.maxsize))
    step(0, 0, "trace a decoding step")
    program, images = trace_image_step(dense, given, shapes)
    positions = AXES_FIRST if POSITIONS in given.inputs else TOKEN_AXES
    axes = {**name_image_axes(images), **make_decoder_interface(program, positions, before=len(images)).inputs}
    about = {"objective": settings.objective, IMAGE_TOKEN: str(find_image_token(model))}
    return Traced(program, list(axes), axes, about=about)


def select_image_inputs(samples: Samples) -> dict[str, Tensor]:
    """The inputs of images, as the class takes them. Sizes in pixels are left out: a graph would hold them."""
    return {name: x for name, x in arrange_inputs(samples.inputs).items() if name not in (IDS, POSITIONS, IMAGE_SIZES)}


def run_with_images(case: GraphCase, tiles: int, decoder: OrtDecoder, use: Use, samples: Samples) -> Any:
    """What a decoder's ``case`` gives for the embeddings of samples with images.

    ``tiles``: how many times the graphs of embeddings get all samples at once; the last ones' are taken.
    """
    assert decoder.embeddings is not None
    tiled = samples.repeat(tiles)
    # Several times as many images at once show whether the vision encoder takes any number; the last copy is compared.
    read = {EMBEDDINGS: decoder.embeddings(tiled.inputs[IDS], select_image_inputs(tiled))[-len(samples) :]}
    numbered = {name: x for name, x in samples.inputs.items() if name == POSITIONS}
    return case.run(decoder, use, Samples(read | numbered))


def can_encode_images(decoder: OrtDecoder, samples: Samples) -> bool:
    """Whether the vision encoder runs on the images of samples, if these have any."""
    assert decoder.embeddings is not None
    images = select_image_inputs(samples)
    return not images or decoder.embeddings.takes(images)


def name_image_axes(images: Mapping[str, Tensor]) -> dict[str, Axes]:
    """The names of the axes of the inputs of images."""
    rank = images[PIXELS].ndim
    if GRIDS in images:
        return {PIXELS: ("num_patches", *[None] * (rank - 1)), GRIDS: ("num_images", None)}
    return {PIXELS: ("image_batch_size", *IMAGE_AXES) if rank == WITH_SEVERAL else IMAGE_AXES}


def trace_image_step(
    dense: Dense, samples: Samples, shapes: Sequence[CacheLayerShape]
) -> tuple[Program, dict[str, Tensor]]:
    """The program of a ``PicturedStep`` with the weights of the dense model, and an example of its inputs of images."""
    model = dense.loaded.model
    name, images = type(model).__name__, select_image_inputs(take_several_images(samples))
    reads: Any = model
    # A class that needs the sizes in pixels computes with them in Python, and a graph would hold them as numbers.
    sizes = signature(reads.get_image_features).parameters.get(IMAGE_SIZES)
    if sizes is not None and sizes.default is Parameter.empty:
        raise TargetError(f"{name} divides images by {IMAGE_SIZES}, which a graph would hold as numbers", name=name)
    made = PicturedStep(model, images, dense.settings.logits)
    inputs = step_inputs(shapes)
    if POSITIONS in samples.inputs:
        axes = samples.inputs[POSITIONS].shape[1]
        inputs = (*inputs[:2], inputs[2].expand(axes, -1, -1).contiguous(), *inputs[3:])
    given = [(x, (0, 1) if x.ndim == WITH_SEVERAL else (0,)) for x in images.values()]
    assert dense.program is not None
    expected = dense.compute_first(Samples({name: samples.inputs[name] for name in dense.program.inputs}))[:, -1:]

    # Some classes count positions from another number than 0: the first one with which a step gives the whole
    # sequence's logits is right.
    for first in list_first_positions(made):
        made.first_position = first
        program = dense.put_weights(export_step(made, inputs, given))
        check_open(program, name)
        if is_same_output(compute_last_logits(program, dense.executor, samples, shapes), expected):
            return program, images
    raise TargetError(
        f"one decoding step of {name} with its own cache computes other logits than the whole sequence", name=name
    )


def add_shown_images(shown: Samples, samples: Samples) -> Samples:
    """Samples with images: texts without any get the images of ``shown``, and no token that stands for them."""
    if PIXELS in samples.inputs:
        return samples
    ids, inputs = samples.inputs[IDS], dict(shown.inputs)
    if POSITIONS in inputs:
        inputs[POSITIONS] = torch.arange(ids.shape[1]).expand(len(ids), inputs[POSITIONS].shape[1], -1)
    return Samples({**inputs, IDS: ids})


def take_several_images(samples: Samples) -> Samples:
    """``TRACED_IMAGES`` of the samples, to trace with; several images in each if samples may have several."""
    few = samples[torch.arange(TRACED_IMAGES) % len(samples)]
    if GRIDS in few.inputs:
        return few
    return few.map(lambda x: torch.cat([x] * TRACED_IMAGES, 1) if x.ndim == WITH_SEVERAL else x)


def check_open(program: Program, name: str) -> None:
    """Raise MptkError if a step takes only one number of images."""
    values = {node.name: node.meta["val"] for node in program.list_placeholders()}
    count = str(values[program.user_inputs[0]].shape[0])
    if count.isdigit():
        raise TargetError(f"the trace of {name} runs only on {count} images", name=name)


def compute_last_logits(
    program: Program, executor: Executor, samples: Samples, shapes: Sequence[CacheLayerShape]
) -> Tensor:
    """The last position's logits [rows, 1, vocab] of a step, in two calls."""
    ids, images = samples.inputs[IDS], select_image_inputs(samples)
    rows, length = ids.shape
    counted = torch.arange(length).expand(rows, -1)
    positions = arrange_inputs(samples.inputs).get(POSITIONS, counted)
    cache, logits = make_zero_cache(shapes, rows, 0), ids
    for new in (slice(0, length - LAST), slice(length - LAST, length)):
        given = (*images.values(), ids[:, new], torch.ones_like(ids[:, : new.stop]), positions[..., new], *cache)
        logits, *found = next(executor.run_programs([program], [given]))
        cache = found[: len(cache)]
    return logits[:, -1:]


def add_images(case: GraphCase, tiles: int = 1) -> GraphCase:
    """A decoder's case for samples with images."""
    return replace(case, run=partial(run_with_images, case, tiles))


*TEXT_CASES, SIZES_CASE = DECODER_FORM.cases
IMAGE_TEXT_FORM = replace(
    DECODER_FORM,
    trace=trace_with_images,
    cases=(
        *map(add_images, TEXT_CASES),
        add_images(SIZES_CASE, TILES),
        # Images of another size run only if the vision encoder takes them: its trace may hold one size.
        replace(add_images(TEXT_CASES[-1]), stage="ONNX Runtime", takes=can_encode_images),
    ),
    parts=(
        Part(VISION_FILE, {name: name for name in (PIXELS, GRIDS)}, (IMAGE_FEATURES,)),
        Part(EMBEDDING_FILE, {IDS: IDS}, (EMBEDDINGS,)),
        Part(MERGED_FILE, {MERGED: EMBEDDINGS, MASK: MASK, POSITIONS: POSITIONS}),
    ),
    between=(IMAGE_FEATURES, EMBEDDINGS, MERGED),
    float_only="a vision-language model",
    described={},
)
"""``vision_encoder.onnx``, ``embed_tokens.onnx``, and ``decoder_model_merged.onnx`` with its KV cache."""
