"""Encoder-decoders: models that write a text after another text or sound, as T5, BART and Whisper.

``mptk prune MODEL`` cuts both sides together, and writes the graphs of both. docs/kinds.md lists what they read.

``task``: the kind of model. ``form``: its graphs.
"""

from mptk.protocols import Feature

FEATURE = Feature(
    "encoder_decoder",
    "cut models with an encoder and a decoder, as T5 and Whisper",
    page="docs/kinds.md",
    tasks={"seq2seq": "mptk.features.encoder_decoder.task:ENCODER_DECODER"},
)
