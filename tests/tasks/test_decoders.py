"""What is no decoder is refused before any work by each command that needs one."""

from __future__ import annotations

import pytest
from transformers import BertConfig, BertLMHeadModel
from typer.testing import CliRunner

from mptk.cli.main import app
from mptk.errors import ModelError
from mptk.tasks import load_decoder
from mptk.testing import expect_error
from mptk.testing.kinds import ENCODER


@pytest.mark.features
@pytest.mark.parametrize("kind", ["encoder", "masked language model", "encoder-decoder", "image classifier"])
def test_tasks_that_only_a_decoder_can_do_are_refused(laboratory, kind):
    source = str(laboratory.open_model(kind))
    with expect_error(ModelError, name=source):
        CliRunner().invoke(app, ["eval", source, "--tasks", "arc_easy"], catch_exceptions=False)


def test_a_class_for_decoders_that_looks_at_later_tokens_is_none(tmp_path):
    BertLMHeadModel(BertConfig(**ENCODER)).save_pretrained(tmp_path)
    with expect_error(ModelError, name=tmp_path):
        load_decoder(str(tmp_path))
    BertLMHeadModel(BertConfig(**ENCODER, is_decoder=True)).save_pretrained(tmp_path)
    assert load_decoder(str(tmp_path))
