"""ONNX of encoder-decoders: two graphs, of which the second has both caches. It also reaches for their form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
from inside import Inside

import mptk
from mptk import MptkError, Settings
from mptk.api.graphs import export_folder
from mptk.ort.generation import TextGenerator

SETTINGS = {"data": "random", "align": 2, "samples": 4, "length": 16, "eval_windows": 3, "eval_length": 16}


@pytest.mark.parametrize("kind", ["encoder-decoder", "speech"])
def test_keys_of_what_the_encoder_gave_are_made_only_of_what_the_cache_lacks(
    pruned_folder: Callable[[str], Path], kind: str
) -> None:
    graph = onnx.load(pruned_folder(kind) / "onnx" / "decoder_model_merged.onnx", load_external_data=False).graph
    readers = {node.op_type for node in graph.node if "encoder_hidden_states" in node.input}
    assert readers - {"Shape"} == {"Slice"}
    with pytest.raises(MptkError, match="reads an encoder's output; generate with transformers"):
        TextGenerator(pruned_folder(kind))


def test_a_model_whose_caches_change_its_logits_gets_no_onnx(folders: Path, tmp_path: Path, inside: Inside) -> None:
    inside.gives("mptk.features.encoder_decoder.form.is_same_output", False)
    settings = mptk.Settings(sparsity=0.3, tolerance=0.3, method="random", **SETTINGS)
    report = mptk.prune(str(folders / "encoder-decoder"), tmp_path / "out", settings).report
    assert any("no ONNX" in note and "with its own cache computes other logits" in note for note in report.notes)


def test_a_plan_may_cut_what_the_encoder_hands_on(folders: Path, tmp_path: Path) -> None:
    dense = folders / "encoder-decoder"
    options = {"sparsity": 0.3, "tolerance": 0.3, "method": "magnitude", "families": ("hidden",), "target": "graph"}
    report = mptk.prune(str(dense), tmp_path / "out", mptk.Settings(**options, **SETTINGS)).report
    assert [row["stage"] for row in report.proof][-3:] == ["ONNX Runtime", "ONNX Runtime steps", "ONNX Runtime padded"]
    width = report.families["hidden"]["width"]
    session = ort.InferenceSession(tmp_path / "out" / "onnx" / "encoder_model.onnx")
    assert session.get_outputs()[0].shape[2] == width < 24


@pytest.mark.parametrize("family", ["encoder_layers", "decoder_layers"])
def test_blocks_are_cut_with_their_caches(folders: Path, tmp_path: Path, family: str) -> None:
    settings = mptk.Settings(widths={family: 1}, families=(family,), tolerance=1.0, method="random", **SETTINGS)
    report = mptk.prune(str(folders / "encoder-decoder"), tmp_path / "out", settings).report
    assert [row["stage"] for row in report.proof][-3:] == ["ONNX Runtime", "ONNX Runtime steps", "ONNX Runtime padded"]
    graph = onnx.load(tmp_path / "out" / "onnx" / "decoder_model_merged.onnx", load_external_data=False).graph
    layers = 1 if family == "decoder_layers" else 2
    assert sum(value.name.startswith("past_key_values.") for value in graph.input) == 4 * layers


def test_an_encoder_decoder_is_exported_in_float32(folders: Path, tmp_path: Path) -> None:
    dense = folders / "encoder-decoder"
    out = export_folder(str(dense), tmp_path / "export")
    names = ["decoder_model_merged.onnx", "encoder_model.onnx"]
    assert sorted(path.name for path in (out / "onnx").iterdir()) == sorted(
        [*names, *(f"{name}_data" for name in names)]
    )
    with pytest.raises(MptkError, match="are written in float32; leave out onnx_dtype, or give quantize"):
        export_folder(str(dense), tmp_path / "half", Settings(onnx_dtype="float16"))
    with pytest.raises(MptkError, match="only a decoder's int4 needs text"):
        export_folder(str(dense), tmp_path / "text", text="README.md")
