"""Graphs that are wrong only in one use: at a size, behind a cache, for a token.

It reaches for passes.targets.onnx: graphs that are compared without a run.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from mptk import ProofError
from mptk.targets import ONNX
from mptk.tasks.decoder_form import SEVERAL_NEW, draw_size_cases
from mptk.tasks.onnx_proof import MOST_ROWS
from mptk.testing import expect_error
from passes.targets.onnx.names import ONNX_FILE
from passes.targets.onnx.structure import compare_structures, compare_with_weights, find_differing_row
from passes.targets.onnx.tensors import read_lazily
from tests.broken.graphs import CONDITIONS, FLOAT, GRAPHS, WRITTEN, at, with_constant

IN_RUNS = {
    "wrong at batch 5": "ONNX Runtime sizes",
    "wrong with 17 new tokens": "ONNX Runtime sizes",
    "wrong with a cache of 1": "ONNX Runtime sizes",
    "wrong if a row is only padding": "ONNX Runtime padded left",
}
"""What the proof of a run finds by itself, as an exporter's fault."""


@pytest.mark.always
@pytest.mark.parametrize("name", IN_RUNS)
def test_a_graph_that_is_wrong_in_one_use(lab, name):
    with expect_error(ProofError, name=IN_RUNS[name]):
        lab.prove(lab.copy(at(FLOAT, CONDITIONS[name]), forged=False), None, ONNX)


@pytest.mark.always
def test_two_rows_of_the_embedding_swapped(lab):
    """Of tokens that the proof need not hold."""
    swapped = with_constant(lambda name, array: array.shape == (97, 40), lambda array: array[[*range(95), 96, 95]])
    with expect_error(ProofError, name=ONNX_FILE):
        lab.prove(lab.copy(at(FLOAT, swapped), forged=False), None, ONNX)


@pytest.mark.always
@pytest.mark.parametrize("name", ["ignores the mask", "a rotary frequency is 0.1 % larger"])
def test_an_int8_graph_that_is_not_what_quantising_gives(lab, name):
    change = WRITTEN[name] if name in WRITTEN else GRAPHS[name][0]
    with expect_error(ProofError, name="int8 weights"):
        lab.prove(lab.copy(at("int8 decoder", change), forged=False), None, ONNX)


@pytest.mark.parametrize("name", ["wrong from position 600", "logits of noise 1e-6"])
def test_a_graph_that_computes_more_has_another_structure(lab, name):
    change = (CONDITIONS | WRITTEN)[name]
    found, sound = (folder / "onnx" / ONNX_FILE for folder in (lab.copy(at(FLOAT, change), forged=False), lab.folder))
    assert compare_structures(read_lazily(found), read_lazily(sound))
    assert not compare_structures(read_lazily(sound), read_lazily(sound))


def test_verify_writes_the_graphs_again(lab):
    with expect_error(ProofError, name=ONNX_FILE):
        lab.verify(lab.copy(at(FLOAT, CONDITIONS["wrong from position 600"]), forged=True))


def test_what_another_exporter_wrote_is_not_called_wrong(lab):
    def edit(folder: Path) -> None:
        file = folder / "onnx" / ONNX_FILE
        model = onnx.load(file, load_external_data=False)
        next(each for each in model.metadata_props if each.key == "exporter").value = "torch 9"
        model.graph.initializer.append(numpy_helper.from_array(np.arange(3), "more"))
        onnx.save(model, file)

    note = ONNX.compare_remade(lab.compiled, lab.copy(edit, forged=False), lab.batches)
    assert note.startswith("model.onnx is not what this exporter writes")


def test_every_length_of_the_cache_every_number_of_rows_and_of_new_tokens_is_met():
    cases = list(draw_size_cases("a plan", 48))
    assert {rows for rows, _ in cases} == set(range(1, MOST_ROWS + 1))
    assert {count for _, calls in cases for count in calls} == {1, *SEVERAL_NEW}
    assert all(sum(calls) <= 48 for _, calls in cases)
    assert cases[0] == (1, [1] * 48)
    assert list(draw_size_cases("another plan", 48)) != cases
    ((_, long),) = draw_size_cases("", 192)
    assert {63, 64, 65, 127, 128, 129} <= set(np.cumsum(long))


def graph(name: str = "a", second: str = "b", more: float = 1.0) -> ir.Model:
    """``y = table[ids] + more``, whose values are named otherwise."""
    table = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3) + 1, "table")
    scale = numpy_helper.from_array(np.array(more, dtype=np.float32), f"{name}_scale")
    nodes = [
        helper.make_node("Gather", ["table", "ids"], [name]),
        helper.make_node("Add", [name, f"{name}_scale"], [second]),
        helper.make_node("Relu", [second], ["y"]),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    return ir.from_proto(helper.make_model(helper.make_graph(nodes, "g", [ids], [y], [table, scale])))


def test_names_of_values_do_not_matter_and_numbers_of_scalars_do():
    assert compare_structures(graph(), graph("c", "d")) == ""
    assert "the constant FLOAT [] of [1.5]" in compare_structures(graph(more=1.5), graph())


def test_a_swapped_row_of_a_table_is_found_and_named():
    found = graph()
    weight = found.graph.initializers["table"].const_value.numpy()
    assert compare_with_weights(found, [("w", weight)]) == ""
    said = compare_with_weights(found, [("w", weight[[0, 1, 3, 2]])])
    assert said == "row 2 of the constant table is not the one of w"
    assert compare_with_weights(found, [("w", 2 * weight)]) == ""
    assert find_differing_row(weight, weight * np.float32(1 + 1e-7)) is None
    assert find_differing_row(weight, weight[[0, 2, 1, 3]]) == 1
