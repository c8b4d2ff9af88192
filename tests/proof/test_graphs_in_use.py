"""Graphs that are wrong only in one use: at a size, behind a cache, for a token. Nobody publishes them, and verify refuses them.

It reaches for passes.targets.onnx: graphs that are compared without a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from inside import Inside
from lab import Lab, after, remembered
from onnx import TensorProto, helper, numpy_helper

import mptk
from mptk import MptkError
from mptk.publish.manifest import write_manifest
from mptk.tasks.decoder_form import SEVERAL_NEW, draw_size_cases
from mptk.tasks.onnx_proof import MOST_ROWS
from passes.targets.onnx.structure import compare_structures, compare_with_weights, find_differing_row
from tests.broken import Published, check
from tests.broken.graphs import CONDITIONS, FLOAT, ROWS, at


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with remembered():
        yield Lab(tmp_path_factory.mktemp("lab"), quantize=("int8",))


IN_RUNS = {
    "wrong at batch 5": "sizes",
    "wrong with 17 new tokens": "sizes",
    "wrong with a cache of 1": "sizes",
    "wrong if a row is only padding": "padded left",
}
"""What the cases of ``prune`` find by themselves, as an exporter's fault."""


@pytest.mark.parametrize("name", IN_RUNS)
def test_prune_publishes_no_graph_that_is_wrong_in_one_use(lab: Lab, inside: Inside, name: str) -> None:
    edit = at(FLOAT, CONDITIONS[name])
    after("mptk.tasks.onnx_export.emit_onnx", lambda graphs: edit(graphs.parent), 1)(inside)
    with pytest.raises(MptkError, match=f"the proof fails at 'ONNX Runtime {IN_RUNS[name]}'"):
        lab.prune(strict=True, quantize=())


REFUSED = [
    (FLOAT, "two rows of the embedding swapped"),
    (FLOAT, "wrong from position 600"),
    (FLOAT, "logits of noise 1e-6"),
    ("int8 decoder", "ignores the mask"),
    ("int8 decoder", "wrong with a cache"),
    ("int8 decoder", "keys for values"),
    ("int8 decoder", "a rotary frequency is 0.1 % larger"),
]


@pytest.mark.parametrize(("kind", "name"), REFUSED)
def test_verify_refuses_it(lab: Lab, kind: str, name: str) -> None:
    (row,) = [row for row in ROWS if (row.kind, row.name) == (kind, name)]
    assert check(row, Published(lab.folder, mptk.verify)).startswith(("the proof fails at", "ONNX Runtime cannot load"))


def test_the_folder_that_they_damage_is_whole(lab: Lab) -> None:
    assert mptk.verify(lab.folder).notes == []


def test_every_length_of_the_cache_every_number_of_rows_and_of_new_tokens_is_met() -> None:
    cases = list(draw_size_cases("a plan", 48))
    assert {rows for rows, _ in cases} == set(range(1, MOST_ROWS + 1))
    assert {count for _, calls in cases for count in calls} == {1, *SEVERAL_NEW}
    assert all(sum(calls) <= 48 for _, calls in cases)
    assert cases[0] == (1, [1] * 48)
    assert list(draw_size_cases("another plan", 48)) != cases
    ((_, long),) = draw_size_cases("", 192)
    assert {63, 64, 65, 127, 128, 129} <= set(np.cumsum(long))


# ---- graphs that are compared without a run ----


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
    model = helper.make_model(helper.make_graph(nodes, "g", [ids], [y], [table, scale]))
    assert isinstance(model, onnx.ModelProto)
    return ir.from_proto(model)


def test_names_of_values_do_not_matter_and_numbers_of_scalars_do() -> None:
    assert compare_structures(graph(), graph("c", "d")) == ""
    assert "the constant FLOAT [] of [1.5]" in compare_structures(graph(more=1.5), graph())


def test_a_swapped_row_of_a_table_is_found_and_named() -> None:
    found = graph()
    weight = found.graph.initializers["table"].const_value.numpy()
    assert compare_with_weights(found, [("w", weight)]) == ""
    assert (
        compare_with_weights(found, [("w", weight[[0, 1, 3, 2]])]) == "row 2 of the constant table is not the one of w"
    )
    assert compare_with_weights(found, [("w", 2 * weight)]) == ""
    assert find_differing_row(weight, weight * np.float32(1 + 1e-7)) is None
    assert find_differing_row(weight, weight[[0, 2, 1, 3]]) == 1


def test_what_another_exporter_wrote_is_not_called_wrong(lab: Lab) -> None:
    def edit(folder: Path) -> None:
        file = folder / "onnx" / "model.onnx"
        model = onnx.load(file, load_external_data=False)
        next(each for each in model.metadata_props if each.key == "exporter").value = "torch 9"
        model.graph.initializer.append(numpy_helper.from_array(np.arange(3), "more"))
        onnx.save(model, file)

    folder = lab.prune(quantize=())
    edit(folder)
    write_manifest(folder)
    (note,) = mptk.verify(folder).notes
    assert note.startswith("model.onnx is not what this exporter writes")
