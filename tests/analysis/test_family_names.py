"""Names of families: the list that finds a misspelt one early has what the analysis gives."""

from __future__ import annotations

import ast
import inspect

import pytest

import mptk
from mptk.errors import InputError
from mptk.ir import BLOCKED_NAMES, FAMILY_NAMES
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
def test_a_misspelt_family_is_found_before_the_model_is_opened(name: str, meant: str):
    with pytest.raises(InputError) as error:
        mptk.prune("no/such", widths={name: 8})
    assert (error.value.name, error.value.nearest) == (name, (meant,))


@pytest.mark.parametrize("name", ["encoder_layers", "ffn.7", "vocab", "hidden.1", "of_my_own"])
def test_other_names_are_left_to_the_analysis(name: str):
    with pytest.raises(mptk.MptkError) as error:
        mptk.prune("no/such", widths={name: 8})
    assert error.value.name != name
