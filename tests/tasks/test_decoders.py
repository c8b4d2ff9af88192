"""What is no decoder is refused in one line before any work, by each command that needs one.

It reaches for mptk.tasks: it asks whether a model is a decoder without a command.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import refused
from inside import Inside
from transformers import BertConfig, BertLMHeadModel

from mptk import MptkError
from mptk.io import models
from mptk.tasks import load_decoder
from mptk.testing import Laboratory
from mptk.testing.kinds import ENCODER

SAYS = {
    "encoder": "BertModel does not predict the next token",
    "masked language model": "BertForMaskedLM does not predict the next token",
    "encoder-decoder": "has an encoder and a decoder",
    "image classifier": "ViTForImageClassification does not predict the next token",
}


@pytest.mark.parametrize("kind", SAYS)
def test_tasks_that_only_a_decoder_can_do_are_refused_in_one_line(
    laboratory: Laboratory, kind: str, inside: Inside
) -> None:
    inside.forbid("mptk.io.models.load_pretrained")
    line = refused("eval", laboratory.open_model(kind), "--tasks", "arc_easy")
    assert re.search(f"is no decoder: .*{SAYS[kind]}.*; `mptk analyze` shows what can be cut", line)


def test_a_class_for_decoders_that_looks_at_later_tokens_is_none(tmp_path: Path) -> None:
    BertLMHeadModel(BertConfig(**ENCODER)).save_pretrained(tmp_path)
    with pytest.raises(MptkError, match="BertLMHeadModel looks at later tokens"):
        load_decoder(str(tmp_path))
    BertLMHeadModel(BertConfig(**ENCODER, is_decoder=True)).save_pretrained(tmp_path)
    assert load_decoder(str(tmp_path))


@pytest.mark.parametrize("kind", SAYS)
def test_other_uses_of_such_a_model_stay(laboratory: Laboratory, kind: str) -> None:
    assert models.load(str(laboratory.open_model(kind))).model
