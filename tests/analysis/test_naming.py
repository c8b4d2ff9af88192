"""Names of axes: what people read in `mptk analyze`, and name in --keep and --families."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

import mptk
from mptk import testing
from mptk.config import Settings
from mptk.errors import InputError
from mptk.methods.division.selection import tie_layers
from mptk.testing import MODEL_KINDS, expect_error


def test_an_axis_that_stays_has_the_name_of_what_it_is() -> None:
    encoder, classifier = (mptk.analyze(MODEL_KINDS[kind].make()) for kind in ("encoder", "text classifier"))
    found = {weight: axis.name for axis in encoder.blocked for weight in axis.weights}
    table = "embeddings.word_embeddings.weight"
    assert (found[f"{table}[0]"], found[f"{table}[1]"]) == ("vocab", "hidden")
    others = [f"embeddings.{name}_embeddings.weight[0]" for name in ("position", "token_type")]
    assert [found[name] for name in others] == ["rows", "rows"]  # looked up, but no words
    assert {w: axis.name for axis in classifier.blocked for w in axis.weights}["classifier.weight[0]"] == "output"
    # The size of embeddings is the model's output: it is no family, so to keep it is refused.
    with expect_error(InputError, name="hidden"):
        tie_layers(encoder, Settings(keep=("hidden",)))


@pytest.mark.parametrize("tied", [True, False])
def test_the_rows_of_a_table_are_the_vocabulary_of_a_tied_head_too(tied: bool) -> None:
    model: Callable[..., nn.Module] = testing.make_llama
    found = {w: axis.name for axis in mptk.analyze(model(tied=tied, layers=1)).blocked for w in axis.weights}
    rows = [found[weight] for weight in ("model.embed_tokens.weight[0]", "lm_head.weight[0]") if weight in found]
    assert rows == (["vocab"] if tied else ["vocab", "output"])
