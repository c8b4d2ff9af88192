"""Names of axes and families: what people read in `mptk analyze`, and name in --keep and --families."""

from __future__ import annotations

import ast
import inspect

import pytest

import mptk
from mptk import testing
from mptk.config import Settings
from mptk.errors import InputError
from mptk.ir import BLOCKED_NAMES, FAMILY_NAMES
from mptk.methods.division.selection import tie_layers
from mptk.testing import MODEL_KINDS, expect_error
from passes.analysis import group


def list_results(value: ast.expr | None) -> list[str]:
    """The names that an expression may give; of a pair, its first."""
    match value:
        case ast.Constant(value=str(name)):
            return [name]
        case ast.Tuple(elts=[first, *_]):
            return list_results(first)
        case ast.IfExp(body=one, orelse=other):
            return [*list_results(one), *list_results(other)]
    return []


def test_the_list_has_all_names_that_the_analysis_gives():
    given = {"layers"}
    for function in ast.walk(ast.parse(inspect.getsource(group))):
        if not isinstance(function, ast.FunctionDef) or function.name == "_name_op":  # which names no axis
            continue
        if function.name.startswith(("name_", "_name_")):
            returns = [node for node in ast.walk(function) if isinstance(node, ast.Return)]
            given |= {name for found in returns for name in list_results(found.value)}
    assert given == {*FAMILY_NAMES, *BLOCKED_NAMES}


@pytest.mark.parametrize(
    ("name", "meant"), [("fnn", "ffn"), ("kv_group", "kv_groups"), ("fnn.3", "ffn.3"), ("layer", "layers")]
)
def test_a_misspelt_family_is_found_before_the_model_is_opened(name, meant):
    with pytest.raises(InputError) as error:
        mptk.prune("no/such", widths={name: 8})
    assert (error.value.name, error.value.nearest) == (name, (meant,))


@pytest.mark.parametrize("name", ["encoder_layers", "ffn.7", "vocab", "hidden.1", "of_my_own"])
def test_other_names_are_left_to_the_analysis(name):
    with pytest.raises(mptk.MptkError) as error:
        mptk.prune("no/such", widths={name: 8})
    assert error.value.name != name


def test_an_axis_that_stays_has_the_name_of_what_it_is():
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
def test_the_rows_of_a_table_are_the_vocabulary_of_a_tied_head_too(tied):
    found = {
        w: axis.name for axis in mptk.analyze(testing.make_llama(tied=tied, layers=1)).blocked for w in axis.weights
    }
    rows = [found[weight] for weight in ("model.embed_tokens.weight[0]", "lm_head.weight[0]") if weight in found]
    assert rows == (["vocab"] if tied else ["vocab", "output"])
