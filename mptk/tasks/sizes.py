"""sizes: samples of other sizes and values than the proof's own, drawn by a seed, for graphs without a cache.

What such a graph computes for a text depends on the whole text, so each length needs a run of the reference. The stages
of a decoder run other sizes by themselves: a position's logits are the same however its text goes on.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from mptk.ir.samples import Samples, is_tokens
from mptk.tasks.inputs.image_forms import PIXELS

OTHER_LENGTHS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 20, 31, 32, 33)
"""Tokens of a text: about powers of two, at which kernels and exporters change."""
MOST_ROWS = 9
TOKENS_TRIED = 96
"""Tokens of one batch, so that these cost little."""
TEXTS_TRIED = 4
"""Batches of texts."""
LARGEST = (6.0, 0.5, 16.0, 1.0, 64.0, 2.0, 255.0, 4.0, 0.0)
"""The largest value of each image of a batch: of normalised ones, of ones that a program forgot to normalise, of black
ones."""
DECODER = "decoder_"
"""What the names of inputs of a decoder start with: their lengths are another text's."""


def draw_texts(samples: Samples, seed: str) -> Iterator[Samples]:
    """Samples with other numbers of rows and of tokens; none if it is not clear which inputs belong to the tokens."""
    read = {name for name, x in samples.inputs.items() if is_tokens(x) and not name.startswith(DECODER)}
    lengths = {samples.inputs[name].shape[1] for name in read}
    others = [x for name, x in samples.inputs.items() if name not in read and not name.startswith(DECODER)]
    if len(lengths) != 1 or samples.together is not None or any(x.shape[1:2] == (min(lengths),) for x in others):
        return
    draw = random.Random(seed)
    known = [length for length in OTHER_LENGTHS if length < min(lengths)]
    for length in draw.sample(known, min(TEXTS_TRIED, len(known))):
        count = draw.randint(1, min(MOST_ROWS, max(1, TOKENS_TRIED // length)))
        cut = {name: x[:, :length] if name in read else x for name, x in samples.inputs.items()}
        yield Samples(cut)[torch.arange(count) % len(samples)]


def draw_row_counts(samples: Samples, seed: str) -> Iterator[Samples]:
    """The samples, more of them at once."""
    if samples.together is None:
        yield samples[torch.arange(random.Random(seed).randint(4, MOST_ROWS)) % len(samples)]


def scale_pixels(samples: Samples) -> Samples:
    """Images whose values are smaller and larger than the samples' own: each row has another largest value."""
    pixels = samples.inputs[PIXELS].clone()
    for row, largest in zip(pixels, LARGEST, strict=False):
        row *= largest / max(float(row.abs().max()), torch.finfo(torch.float32).tiny)
    return Samples({**samples.inputs, PIXELS: pixels})
