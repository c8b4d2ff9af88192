"""Broken emissions: what another program would read of a folder, broken in one way, and where the proof says so.

Each is put into a published folder, which is proven as a run proves what it has just written. The rows of graphs are
those of ``tests/broken``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from graph_damage import damaged
from lab import Edit, all_of, fields, remove

from mptk import ProofError
from mptk.files import write_json
from mptk.ir import Log
from mptk.protocols import Dense
from mptk.run.prune import prove_outputs, write_report
from mptk.targets import ONNX
from mptk.tasks.onnx_export import write_quantized_graphs
from mptk.testing import expect_error
from tests.broken.graphs import FLOAT, GRAPHS, at


@pytest.mark.always
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_is_wrong(lab, name):
    change, stage = GRAPHS[name]
    with expect_error(ProofError, name=stage):
        lab.prove(lab.copy(at(FLOAT, change), forged=False), None, ONNX)


def swap_ids(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    one, other = sorted(ids, key=ids.__getitem__)[10:12]
    ids[one], ids[other] = ids[other], ids[one]
    write_json(folder / "tokenizer.json", content)


def add(name: str, content: str) -> Edit:
    return lambda folder: (folder / name).write_text(content) and None


TOKENIZER, GENAI = "tokenizer_config.json", "genai_config.json"
FILES: dict[str, tuple[Edit, tuple[object, ...] | None]] = {
    "end of a text": (fields(TOKENIZER, eos_token="w1"), ("</s>",)),
    "padding side": (fields(TOKENIZER, padding_side="left"), ()),
    "class of the tokenizer": (fields(TOKENIZER, tokenizer_class="LlamaTokenizer"), None),
    "two ids in each other's place": (swap_ids, (10,)),
    "a token more": (add("added_tokens.json", '{"<x>": 96}'), ()),
    "a chat template": (add("chat_template.jinja", "{{ messages }}"), ()),
    "a processor": (add("preprocessor_config.json", "{}"), ()),
    "genai: end of a text": (fields(GENAI, model__eos_token_id=7), (1,)),
    "genai: layers": (fields(GENAI, model__decoder__num_hidden_layers=3), (2,)),
    "genai: graph": (fields(GENAI, model__decoder__filename="onnx/model_q4.onnx"), ("onnx/model.onnx",)),
}
"""Damage, and the value that the field should have; none if it should not be there, or if transformers decides."""


@pytest.mark.always
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_wrong(lab, name):
    edit, right = FILES[name]
    with expect_error(ProofError, name="config", nearest=right):
        lab.prove(lab.copy(edit, forged=False))


def scales_doubled(scheme_file: str) -> Edit:
    return lambda folder: damaged(folder / scheme_file, "_scales", lambda scales: 2 * scales) and None


INT8, INT4 = "onnx/model_quantized.onnx", "onnx/model_q4.onnx"
OPTIONAL: dict[str, tuple[Edit, str]] = {
    "int8": (scales_doubled(INT8), INT8),
    "int4": (scales_doubled(INT4), INT4),
    "genai": (fields(GENAI, model__vocab_size=5), GENAI),
}


@pytest.mark.always
@pytest.mark.parametrize("name", OPTIONAL)
def test_an_optional_file_that_fails_is_left_out_with_a_note(lab, name):
    edit, file = OPTIONAL[name]
    folder, run = lab.copy(all_of(edit, remove("proof")), forged=False), lab.make_run()
    proven = prove_outputs(lab.compiled, lab.sets, folder, [], run)
    (note,) = proven.left_out
    assert note.startswith(f"{file} was left out: ")
    assert not list(folder.glob(f"{file}*"))
    assert not [d for d in proven.differences if d.stage.startswith(name)]
    report = write_report(lab.compiled, proven, lab.sets, [], folder, run)
    assert note in report.notes
    assert not [path for path in report.files if path.startswith(file)]
    assert set(report.quantized) == {"int8", "int4"} - {name}
    assert Path(file).name not in (folder / "README.md").read_text().replace(note, "")
    assert prove_outputs(lab.compiled, lab.sets, folder, [], run).left_out == ()


def test_a_strict_run_refuses_the_whole_for_an_optional_file(lab):
    prepared = lab.compiled.prepared
    strict = replace(lab.compiled, prepared=replace(prepared, settings=replace(prepared.settings, strict=True)))
    with expect_error(ProofError, name="int8 weights"):
        prove_outputs(strict, lab.sets, lab.copy(OPTIONAL["int8"][0], forged=False), [], lab.make_run())


def test_a_scheme_is_made_of_all_graphs_or_of_none(lab):
    folder = lab.copy(lambda folder: None, forged=False) / "onnx"
    good, bad = folder / "model.onnx", folder / "bad.onnx"
    model = onnx.load(good)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, bad)
    prepared = lab.compiled.prepared
    settings = replace(prepared.settings, quantize=("fp16",), strict=False)
    dense = Dense(prepared.loaded, settings, prepared.analysis.program, prepared.executor)
    (note,) = write_quantized_graphs(dense, [good, bad], None, Log())
    assert note.startswith("onnx/model_fp16.onnx was left out: ")
    assert not list(folder.glob("*_fp16*"))
