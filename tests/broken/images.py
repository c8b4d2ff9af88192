"""Broken models of images: a classifier (ViT), and a vision-language model of three graphs (LLaVA)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from graph_damage import exchanged
from pictures import IMAGE, write_captions, write_llava

import mptk
from mptk.testing import Laboratory
from tests.broken import Broken, Published
from tests.broken.graphs import (
    NEW,
    Change,
    attribute,
    edited,
    floats,
    less_exact,
    metadata,
    noise,
    off,
    one_more,
    payload,
    reading,
    remember,
    with_constant,
)
from tests.broken.pairs import size

VIT, LLAVA = "ViT", "LLaVA"
GRAPH, VISION, EMBED, DECODER = (
    "model.onnx",
    "vision_encoder.onnx",
    "embed_tokens.onnx",
    "decoder_model_merged.onnx",
)


def publish(kind: str, place: Path) -> Published:
    remember()
    if kind == VIT:
        return Published(Laboratory(place).prune("image classifier", place / "out", onnx=True), mptk.verify)
    dense = place / "dense"
    write_llava(dense)
    widths = {"ffn.1": 64, "ffn.2": 96}
    settings = mptk.Settings(
        method="magnitude", samples=4, length=12, eval_windows=2, eval_length=12, align=1,
        widths=widths, families=tuple(widths), data=str(write_captions(place / "pictures")),
    )  # fmt: skip
    mptk.prune(str(dense), place / "out", settings)
    return Published(place / "out", mptk.verify)


IMAGES = size("pixel_values", 0)
FEATURES, EMBEDS = "image_features", "inputs_embeds"
PAST = size("past_key_values.0.key", 2)
LARGE = ("most = ReduceMax<keepdims=0>(pixel_values)", "wrong = Greater(most, 5.5)")
DARK = ("most = ReduceMax<keepdims=0>(pixel_values)", "wrong = Less(most, -2.0)")
BLANK = (
    "most = ReduceMax<keepdims=0>(pixel_values)",
    "least = ReduceMin<keepdims=0>(pixel_values)",
    "wrong = Equal(most, least)",
)

CHANGES: dict[str, dict[str, tuple[str, Change]]] = {
    VIT: {
        "values above 5.5": (GRAPH, off(*LARGE)),
        "an image that is dark throughout": (GRAPH, off(*DARK)),
        "an image of one colour": (GRAPH, off(*BLANK)),
        "three images": (GRAPH, off(*IMAGES, "wrong = Equal(size, 3)")),
        "seven images": (GRAPH, off(*IMAGES, "wrong = Equal(size, 7)")),
        "more than 16 images": (GRAPH, off(*IMAGES, "wrong = Greater(size, 16)")),
        "values are cut off at 3": (GRAPH, reading("pixel_values", "damaged = Min(pixel_values, 3.0)")),
        "colours in another order": (
            GRAPH, reading("pixel_values", "damaged = Slice(pixel_values, [-1], [-999], [1], [-1])"),
        ),
        "logits are 0.01 % larger": (GRAPH, reading("logits", "damaged = Mul(logits, 1.0001)")),
        "a number of a matrix is 0.1 % larger": (GRAPH, with_constant(floats(500), noise)),
        "a whole number is one larger": (GRAPH, one_more(1)),
        "a norm's epsilon is 1 % larger": (GRAPH, attribute("epsilon", less_exact)),
        "a constant more": (GRAPH, edited(payload)),
        "another type in the metadata": (GRAPH, metadata("dtype", "float16")),
    },
    LLAVA: {
        "three images": (VISION, off(*IMAGES, "wrong = Equal(size, 3)", output=FEATURES)),
        "one image": (VISION, off(*IMAGES, "wrong = Equal(size, 1)", output=FEATURES)),
        "more than 9 images": (VISION, off(*IMAGES, "wrong = Greater(size, 9)", output=FEATURES)),
        "values above 5.5": (VISION, off(*LARGE, output=FEATURES)),
        "features of the first image for all": (
            VISION,
            reading(
                FEATURES, "head = Slice(image_features, [0], [1], [0])", "all = Shape(image_features)",
                "damaged = Expand(head, all)",
            ),
        ),
        "a number of the vision encoder is 0.1 % larger": (VISION, with_constant(floats(500), noise)),
        "another image token in the metadata": (EMBED, metadata("image_token", str(IMAGE + 1))),
        "two tokens in each other's place": (
            EMBED,
            reading(
                "input_ids", "is_one = Equal(input_ids, 12)", "is_other = Equal(input_ids, 14)",
                "half = Where(is_one, 14, input_ids)", "damaged = Where(is_other, 12, half)",
            ),
        ),
        "embeddings of 5 tokens": (EMBED, off(*NEW, "wrong = Equal(new, 5)", output=EMBEDS)),
        "a number of an embedding is 0.1 % larger": (EMBED, with_constant(floats(500), noise)),
        "a cache of 17": (DECODER, off(*PAST, "wrong = Equal(size, 17)")),
        "a cache above 90": (DECODER, off(*PAST, "wrong = Greater(size, 90)")),
        "keys for values": (DECODER, lambda file: exchanged(file, "present.1.key", "present.1.value")),
        "logits are 0.01 % larger": (DECODER, reading("logits", "damaged = Mul(logits, 1.0001)")),
        "a whole number is one larger": (DECODER, one_more(2)),
    },
}  # fmt: skip


def rows() -> Iterator[Broken]:
    for kind, changes in CHANGES.items():
        for name, (file, change) in changes.items():
            yield Broken(kind, name, lambda folder, f=file, c=change: c(folder / "onnx" / f) and None)  # type: ignore[misc]


ROWS = list(rows())
