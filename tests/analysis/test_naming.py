"""Names of axes: what people read in `mptk analyze`, and name in --keep and --families."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn
from traces import remembered

import mptk
from mptk import MptkError, testing
from mptk.config import Settings
from mptk.methods.division.selection import tie_layers

NAMES = {
    "encoder": {"embeddings.word_embeddings.weight[0]": "vocab", "embeddings.word_embeddings.weight[1]": "hidden"},
    "text classifier": {"classifier.weight[0]": "output"},
}


@pytest.mark.parametrize("kind", NAMES)
def test_an_axis_that_stays_has_the_name_of_what_it_is(kind: str) -> None:
    with remembered():
        analysis = mptk.analyze(testing.MODEL_KINDS[kind].make())
    found = {weight: axis.name for axis in analysis.blocked for weight in axis.weights}
    assert {weight: found[weight] for weight in NAMES[kind]} == NAMES[kind]


@pytest.mark.parametrize("tied", [True, False])
def test_the_rows_of_a_table_are_the_vocabulary_of_a_tied_head_too(tied: bool) -> None:
    model: Callable[..., nn.Module] = testing.make_llama
    found = {w: axis.name for axis in mptk.analyze(model(tied=tied)).blocked for w in axis.weights}
    rows = [found[weight] for weight in ("model.embed_tokens.weight[0]", "lm_head.weight[0]") if weight in found]
    assert rows == (["vocab"] if tied else ["vocab", "output"])


def test_to_keep_the_size_of_embeddings_is_refused_as_it_stays_anyway() -> None:
    with pytest.raises(MptkError, match=r"^hidden is no family, and keeps its \d+ channels: it is the model's output;"):
        tie_layers(mptk.analyze(testing.MODEL_KINDS["encoder"].make()), Settings(keep=("hidden",)))
