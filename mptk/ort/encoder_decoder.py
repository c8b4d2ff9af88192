"""encoder_decoder: an encoder–decoder in ONNX Runtime: the encoder once, then the decoder with its caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mptk.ort.decoder import MERGED_FILE, PAST_KEYS
from mptk.ort.sessions import CPU, OrtGraph

ENCODER_FILE = "encoder_model.onnx"
HIDDEN = "last_hidden_state"
DECODER_IDS = "decoder_input_ids"
DECODER_NAMES = {"attention_mask": "encoder_attention_mask", DECODER_IDS: "input_ids", HIDDEN: "encoder_hidden_states"}
"""Name in the model → optimum's name of the decoder's input, in the order of these inputs."""


class OrtEncoderDecoder:
    """The two graphs of ``mptk/tasks/encoder_decoder_form.py``.

    Args:
        file: the decoder's graph. The encoder's is beside it and of the same scheme.
        device: as of ``OrtDecoder``.

    Raises:
        MptkError: a graph is missing, or ONNX Runtime refuses it.
    """

    def __init__(self, file: Path, device: torch.device = CPU) -> None:
        ending = file.stem.removeprefix(Path(MERGED_FILE).stem)
        beside = file.with_name(ENCODER_FILE)
        self.encoder, self.decoder = OrtGraph(beside.with_stem(beside.stem + ending), device), OrtGraph(file, device)

    def __call__(self, inputs: Mapping[str, Tensor], calls: Sequence[int] | None = None) -> Tensor:
        """Logits [rows, tokens, vocabulary] of the text in ``inputs``.

        ``calls``: how many tokens the decoder reads in each call; None: all at once.
        """
        made = {**inputs, HIDDEN: self.encoder(inputs)}
        given = {new: made[name] for name, new in DECODER_NAMES.items() if name in made}
        ids, cache, logits = inputs[DECODER_IDS], self.decoder.empty(PAST_KEYS, len(inputs[DECODER_IDS])), []
        for part in ids.split(list(calls or [ids.shape[1]]), 1):
            found, *present = self.decoder.all({**given, "input_ids": part, **cache})
            cache = dict(zip(cache, present, strict=True))
            logits.append(found)
        return torch.cat(logits, 1)
