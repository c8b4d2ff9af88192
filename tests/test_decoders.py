"""What is no decoder is refused in one line before any work, by each command that needs one.

It reaches for mptk.tasks: it asks whether a model is a decoder without a command.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from inside import Inside
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from typer.testing import CliRunner

from mptk import MptkError
from mptk.cli.main import app
from mptk.io import models
from mptk.tasks import load_decoder

SMALL = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "num_hidden_layers": 1}
BERT = BertConfig(**SMALL, vocab_size=99)
MODELS = {
    "BertModel": lambda: BertModel(BERT),
    "BertForMaskedLM": lambda: BertForMaskedLM(BERT),
    "T5": lambda: T5ForConditionalGeneration(
        T5Config(d_model=24, d_kv=8, d_ff=40, num_layers=1, num_heads=3, vocab_size=99)
    ),
    "ViT": lambda: ViTForImageClassification(ViTConfig(**SMALL, image_size=8, patch_size=4)),
}
SAYS = {
    "BertModel": "BertModel does not predict the next token",
    "BertForMaskedLM": "BertForMaskedLM does not predict the next token",
    "T5": "has an encoder and a decoder",
    "ViT": "ViTForImageClassification does not predict the next token",
}


@pytest.fixture(scope="module", params=list(MODELS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    path = tmp_path_factory.mktemp("model")
    MODELS[request.param]().save_pretrained(path)
    return request.param, str(path)


def test_tasks_that_only_a_decoder_can_do_are_refused_in_one_line(folder: tuple[str, str], inside: Inside) -> None:
    kind, path = folder
    inside.forbid("mptk.io.models._from_pretrained")
    run = CliRunner().invoke(app, ["eval", path, "--tasks", "arc_easy"])
    assert isinstance(run.exception, MptkError), run.output
    line = str(run.exception)
    assert re.search(f"is no decoder: .*{SAYS[kind]}.*; `mptk analyze` shows what can be cut", line)
    assert "\n" not in line


def test_a_class_for_decoders_that_looks_at_later_tokens_is_none(tmp_path: Path) -> None:
    BertLMHeadModel(BERT).save_pretrained(tmp_path)
    with pytest.raises(MptkError, match="BertLMHeadModel looks at later tokens"):
        load_decoder(str(tmp_path))
    BertLMHeadModel(BertConfig(**SMALL, vocab_size=99, is_decoder=True)).save_pretrained(tmp_path)
    assert load_decoder(str(tmp_path))


def test_other_uses_of_such_a_model_stay(folder: tuple[str, str]) -> None:
    assert models.load(folder[1]).model
