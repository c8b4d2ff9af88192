"""Broken encoder–decoders: a T5 whose texts are of any length, and a BART with a table of positions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from graph_damage import exchanged
from transformers import BartConfig, BartForConditionalGeneration

import mptk
from mptk.testing import Laboratory, save_model, write_kind
from mptk.testing.kinds import TOKEN_COUNT
from tests.broken import Broken, Published
from tests.broken.graphs import (
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

ENCODER, DECODER = "encoder_model.onnx", "decoder_model_merged.onnx"
T5, BART = "T5", "BART"


def publish(kind: str, place: Path) -> Published:
    remember()
    laboratory = Laboratory(place)
    asked = laboratory.make_settings("encoder-decoder", onnx=True, length=40)
    dense = place / "dense"
    if kind == BART:
        sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in HALVES.items()}
        torch.manual_seed(0)
        model = BartForConditionalGeneration(
            BartConfig(
                vocab_size=TOKEN_COUNT,
                d_model=24,
                max_position_embeddings=64,
                pad_token_id=1,
                bos_token_id=0,
                eos_token_id=2,
                decoder_start_token_id=2,
                forced_eos_token_id=2,
                **sizes,
            )
        )
        save_model(model, dense)
    else:
        write_kind("encoder-decoder", dense)
    mptk.prune(str(dense), place / "out", asked)
    return Published(place / "out", mptk.verify)


HALVES = {"layers": 2, "attention_heads": 3, "ffn_dim": 40}


def size(value: str, axis: int, name: str = "size") -> tuple[str, str]:
    """The lines that give a size of an input."""
    return f"all_{name} = Shape({value})", f"{name} = Gather(all_{name}, {axis})"


HIDDEN = "last_hidden_state"
SOURCE, BATCH = size("input_ids", 1), size("input_ids", 0)
READ = size("encoder_hidden_states", 1)
PAST = size("past_key_values.0.decoder.key", 2)


def token(value: int, output: str) -> Change:
    return off(
        f"is = Equal(input_ids, {value})",
        "each = Cast<to=7>(is)",
        "most = ReduceMax<keepdims=0>(each)",
        "wrong = Equal(most, 1)",
        output=output,
    )


CHANGES: dict[str, tuple[str, Change]] = {
    "encoder, wrong at 20 tokens of the source": (ENCODER, off(*SOURCE, "wrong = Equal(size, 20)", output=HIDDEN)),
    "encoder, wrong at 1 token of the source": (ENCODER, off(*SOURCE, "wrong = Equal(size, 1)", output=HIDDEN)),
    "encoder, wrong above 200 tokens": (ENCODER, off(*SOURCE, "wrong = Greater(size, 200)", output=HIDDEN)),
    "encoder, wrong at batch 5": (ENCODER, off(*BATCH, "wrong = Equal(size, 5)", output=HIDDEN)),
    "encoder, wrong above batch 8": (ENCODER, off(*BATCH, "wrong = Greater(size, 8)", output=HIDDEN)),
    "encoder, a token that the samples lack": (ENCODER, token(3, HIDDEN)),
    "encoder, ignores the mask": (
        ENCODER,
        reading("attention_mask", "none = Mul(attention_mask, 0)", "damaged = Add(none, 1)"),
    ),
    "encoder, a number of a matrix is 0.1 % larger": (ENCODER, with_constant(floats(500), noise)),
    "encoder, a whole number is one larger": (ENCODER, one_more(1)),
    "encoder, another plan in the metadata": (ENCODER, metadata("plan_sha256", "0" * 64)),
    "encoder, padding by another token in the metadata": (ENCODER, metadata("padding_token", "5")),
    "decoder, wrong at 20 positions of the source": (DECODER, off(*READ, "wrong = Equal(size, 20)")),
    "decoder, wrong with a cache of 4": (DECODER, off(*PAST, "wrong = Equal(size, 4)")),
    "decoder, wrong with a cache above 100": (DECODER, off(*PAST, "wrong = Greater(size, 100)")),
    "decoder, wrong at 2 new tokens": (DECODER, off(*SOURCE, "wrong = Equal(size, 2)")),
    "decoder, wrong at batch 7": (DECODER, off(*BATCH, "wrong = Equal(size, 7)")),
    "decoder, a token that the samples lack": (DECODER, token(3, "logits")),
    "decoder, ignores the source's mask": (
        DECODER,
        reading("encoder_attention_mask", "none = Mul(encoder_attention_mask, 0)", "damaged = Add(none, 1)"),
    ),
    "decoder, keys of the source for keys of the text": (
        DECODER,
        lambda file: exchanged(file, "present.0.decoder.key", "present.0.decoder.value"),
    ),
    "decoder, the source's keys for its values": (
        DECODER,
        lambda file: exchanged(file, "present.1.encoder.key", "present.1.encoder.value"),
    ),
    "decoder, logits are 0.01 % larger": (DECODER, reading("logits", "damaged = Mul(logits, 1.0001)")),
    "decoder, a norm's epsilon is 1 % larger": (DECODER, attribute("epsilon", less_exact)),
    "decoder, a number of a matrix is 0.1 % larger": (DECODER, with_constant(floats(500), noise)),
    "decoder, a whole number is one larger": (DECODER, one_more(2)),
    "decoder, a constant more": (DECODER, edited(payload)),
}


def rows() -> Iterator[Broken]:
    for kind in (T5, BART):
        for name, (file, change) in CHANGES.items():
            yield Broken(kind, name, lambda folder, f=file, c=change: c(folder / "onnx" / f) and None)  # type: ignore[misc]


ROWS = list(rows())
