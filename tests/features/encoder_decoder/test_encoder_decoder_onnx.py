"""ONNX of encoder-decoders: two graphs, of which the second has both caches. It also reaches for their form."""

from __future__ import annotations

import onnx
import onnxruntime as ort
import pytest

import mptk
from mptk import Settings
from mptk.api.graphs import export_folder
from mptk.errors import FileError, InputError, TargetError
from mptk.ort.generation import TextGenerator
from mptk.testing import expect_error

KIND = "encoder-decoder"
ASKED = {"data": "random", "method": "magnitude", "onnx": True}


@pytest.mark.parametrize("kind", [KIND, "speech"])
def test_keys_of_what_the_encoder_gave_are_made_only_of_what_the_cache_lacks(laboratory, kind):
    file = laboratory.open_pruned(kind) / "onnx" / "decoder_model_merged.onnx"
    graph = onnx.load(file, load_external_data=False).graph
    readers = {node.op_type for node in graph.node if "encoder_hidden_states" in node.input}
    assert readers - {"Shape"} == {"Slice"}
    with expect_error(FileError, name=file):
        TextGenerator(laboratory.open_pruned(kind))


def test_a_model_whose_caches_change_its_logits_gets_no_onnx(laboratory, tmp_path, inside):
    inside.gives("mptk.features.encoder_decoder.form.is_same_output", False)
    with expect_error(TargetError):
        export_folder(str(laboratory.open_model(KIND)), tmp_path / "out")


def test_blocks_are_cut_with_their_caches_and_what_the_encoder_hands_on(laboratory, tmp_path):
    widths = {"encoder_layers": 1, "decoder_layers": 1, "hidden": 16}
    asked = {**ASKED, "method": "random", "widths": widths, "families": (*widths,), "tolerance": 1.0, "target": "graph"}
    report = mptk.Report.read(laboratory.prune(KIND, tmp_path / "out", **asked))
    assert [row["stage"] for row in report.proof][-3:] == ["ONNX Runtime", "ONNX Runtime steps", "ONNX Runtime padded"]
    graph = onnx.load(tmp_path / "out" / "onnx" / "decoder_model_merged.onnx", load_external_data=False).graph
    assert sum(value.name.startswith("past_key_values.") for value in graph.input) == 4
    session = ort.InferenceSession(tmp_path / "out" / "onnx" / "encoder_model.onnx")
    assert session.get_outputs()[0].shape[2] == 16


def test_an_encoder_decoder_is_exported_in_float32_and_without_text(laboratory, tmp_path):
    dense = str(laboratory.open_model(KIND))
    with expect_error(InputError, name="onnx_dtype"):
        export_folder(dense, tmp_path / "half", Settings(onnx_dtype="float16"))
    with expect_error(InputError, name="data"):
        export_folder(dense, tmp_path / "text", text="README.md")
