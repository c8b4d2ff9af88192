"""ONNX of models that are no decoders: pruned, written under optimum's names, proven, and equal to the stock model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from graph_damage import damaged, rewired
from torch import Tensor
from transformers import PreTrainedModel

import mptk
from mptk import ProofError, Settings
from mptk.api.graphs import export_folder
from mptk.errors import ModelError
from mptk.files.outputs import check_file
from mptk.publish.manifest import write_manifest
from mptk.testing import MODEL_KINDS, expect_error
from mptk.testing.kinds import CLASSES, TOKEN_COUNT

ROWS = ["batch_size", "sequence_length"]
READ = ["batch_size", "encoder_sequence_length"]
WROTE = ["batch_size", "decoder_sequence_length"]
CLASSED = ["batch_size", CLASSES]
TOKENS = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), ROWS)
Shapes = dict[str, list[object]]
PAST = ("past_decoder_sequence_length", "past_encoder_sequence_length")
UNNAMED = 0


def caches(prefix: str, layers: int, *lengths: object) -> Shapes:
    """The shapes of both caches of each layer: of the text and of what is read, of these ``lengths``."""
    return {
        f"{prefix}.{layer}.{side}.{part}": ["batch_size", 3, length, 8]
        for layer in range(layers)
        for side, length in zip(("decoder", "encoder"), lengths, strict=True)
        for part in ("key", "value")
    }


def two_graphs(given: Shapes, read: list[object], width: int, layers: int, tokens: int, **mask: object) -> Any:
    """Of an encoder that is given ``given`` and gives ``read``, and of a decoder with caches."""
    decoder = {**mask, "input_ids": WROTE, "encoder_hidden_states": [*read, width]}
    decoder |= {**caches("past_key_values", layers, *PAST), "logits": [*WROTE, tokens]}
    return {
        "encoder_model.onnx": {**given, "last_hidden_state": [*read, width]},
        "decoder_model_merged.onnx": {**decoder, **caches("present", layers, UNNAMED, read[1])},
    }


MASKED = {"input_ids": READ, "attention_mask": READ}
NAMES = {
    "encoder": lambda width: {"model.onnx": {**TOKENS, "last_hidden_state": [*ROWS, width]}},
    "text classifier": lambda _: {"model.onnx": {**TOKENS, "logits": CLASSED}},
    "masked language model": lambda _: {"model.onnx": {**TOKENS, "logits": [*ROWS, TOKEN_COUNT + 1]}},
    "image classifier": lambda _: {"model.onnx": {"pixel_values": ["batch_size", 3, 16, 16], "logits": CLASSED}},
    "encoder-decoder": lambda width: two_graphs(MASKED, READ, width, 2, TOKEN_COUNT, encoder_attention_mask=READ),
    "speech": lambda width: two_graphs({"input_features": ["batch_size", 8, 100]}, ["batch_size", 50], width, 1, 97),
}


@dataclass
class Pruned:
    kind: str
    folder: Path

    def stock(self) -> PreTrainedModel:
        (name,) = transformers.AutoConfig.from_pretrained(self.folder).architectures
        return getattr(transformers, name).from_pretrained(self.folder).eval()

    def run(self, file: str, **inputs: Tensor) -> Tensor:
        return self.all(file, **inputs)[0]

    def all(self, file: str, **inputs: Tensor) -> list[Tensor]:
        """Every output. A cache that is not given is empty."""
        session = ort.InferenceSession(self.folder / "onnx" / file)
        given = {name: tensor.numpy() for name, tensor in inputs.items()}
        for value in session.get_inputs():
            if value.name.startswith("past"):
                empty = np.zeros((len(inputs["input_ids"]), value.shape[1], 0, value.shape[3]), np.float32)
                given.setdefault(value.name, empty)
        return [torch.from_numpy(found) for found in session.run(None, given)]

    def steps(self, parts: Sequence[Tensor], read: dict[str, Tensor]) -> Tensor:
        """The logits of a text in several calls, each given what the call before returned."""
        graph = onnx.load(self.folder / "onnx" / "decoder_model_merged.onnx", load_external_data=False).graph
        names = [value.name for value in graph.input if value.name.startswith("past")]
        logits, cache = [], dict[str, Tensor]()
        for part in parts:
            found, *present = self.all("decoder_model_merged.onnx", input_ids=part, **read, **cache)
            logits.append(found)
            cache = dict(zip(names, present, strict=True))
        return torch.cat(logits, 1)


@pytest.fixture(params=list(NAMES))
def pruned(request, laboratory):
    return Pruned(request.param, laboratory.open_pruned(request.param))


def test_names_and_axes_are_optimums(pruned):
    width = getattr(pruned.stock().config, "d_model", None) or pruned.stock().config.hidden_size
    found = {}
    for file in sorted((pruned.folder / "onnx").glob("*.onnx"), reverse=True):
        graph = onnx.load(file, load_external_data=False).graph
        found[file.name] = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.output)
        }
    assert found == NAMES[pruned.kind](width)
    assert [list(found[file]) for file in found] == [list(names) for names in NAMES[pruned.kind](width).values()]


@torch.no_grad()
def test_it_computes_what_the_stock_model_does(pruned):
    """Also for other numbers of samples and tokens than those of the trace; a padded row as without padding."""
    torch.manual_seed(1)
    model, ids, mask = pruned.stock(), torch.randint(3, 61, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    ids[1, 5:], mask[1, 5:] = 0, 0
    if pruned.kind == "image classifier":
        pixels = torch.randn(3, 3, 16, 16)
        assert_equal(pruned.run("model.onnx", pixel_values=pixels), model(pixels).logits)
    elif pruned.kind in ("encoder", "text classifier", "masked language model"):
        types = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1]).expand(3, 9).contiguous()
        found = pruned.run("model.onnx", input_ids=ids, attention_mask=mask, token_type_ids=types)
        for row, length in enumerate((9, 5, 9)):
            part = slice(row, row + 1), slice(length)
            alone = model(input_ids=ids[part], token_type_ids=types[part])[0][0]
            assert_equal(found[row] if pruned.kind == "text classifier" else found[row, :length], alone)
    else:
        words = torch.randint(3, 61, (3, 6))
        text = pruned.kind != "speech"
        given = {"input_ids": ids, "attention_mask": mask} if text else {"input_features": torch.randn(3, 8, 100)}
        hidden = pruned.run("encoder_model.onnx", **given)
        of_text = {"encoder_attention_mask": mask} if text else {}
        read = {"encoder_hidden_states": hidden, **of_text}
        logits = pruned.run("decoder_model_merged.onnx", input_ids=words, **read)
        expected = model(**given, decoder_input_ids=words)
        shown = mask.bool() if text else slice(None)
        assert_equal(hidden[shown], expected.encoder_last_hidden_state[shown])
        assert_equal(logits, expected.logits)
        assert_equal(pruned.steps([words[:, :2], words[:, 2:3], words[:, 3:]], read), expected.logits)
        if text:
            alone = model(input_ids=ids[1:2, :5], decoder_input_ids=words[1:2])
            assert_equal(logits[1:2], alone.logits)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def roll_largest(file: Path) -> None:
    weights = onnx.load(file, load_external_data=False).graph.initializer
    largest = max(weights, key=lambda weight: np.prod(weight.dims)).name
    damaged(file, largest, lambda array: np.roll(array, 1, -1))


def rewire(value: str, *lines: str) -> Callable[[Path], None]:
    return lambda file: rewired(file, value, *lines)


ONE_ROW = ("shape = Shape(pixel_values)", "rows = Gather(shape, 0)", "wrong = Equal(rows, 1)")
ONE_TOKEN = ("shape = Shape(input_ids)", "many = Gather(shape, 1)", "wrong = Equal(many, 1)")
ADDED = ("by = Cast<to=1>(wrong)", "damaged = Add(logits, by)")
FIRST_MASK = ("first = Gather(attention_mask, [0])", "size = Shape(attention_mask)", "damaged = Expand(first, size)")
PADDED = "ONNX Runtime padded"
DECODER = "decoder_model_merged.onnx"
WRONG = {
    "weight of an encoder": ("encoder", "model.onnx", roll_largest, "ONNX Runtime"),
    "weight of the first graph": ("encoder-decoder", "encoder_model.onnx", roll_largest, "ONNX Runtime"),
    "weight of the second graph": ("speech", DECODER, roll_largest, "ONNX Runtime"),
    "mask ignored": (
        *("encoder", "model.onnx"),
        rewire("attention_mask", "nothing = Mul(attention_mask, 0)", "damaged = Add(nothing, 1)"),
        PADDED,
    ),
    "first row's mask for all": ("encoder", "model.onnx", rewire("attention_mask", *FIRST_MASK), PADDED),
    "one row": ("image classifier", "model.onnx", rewire("logits", *ONE_ROW, *ADDED), "ONNX Runtime"),
    "one token": ("speech", DECODER, rewire("logits", *ONE_TOKEN, *ADDED), "ONNX Runtime steps"),
}
"""What is wrong → the kind, the graph, its damage, and the stage of the proof that finds it."""


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_graph_fails_the_proof(laboratory, tmp_path, name):
    kind, file, damage, stage = WRONG[name]
    folder = shutil.copytree(laboratory.open_pruned(kind), tmp_path / "out")
    damage(folder / "onnx" / file)
    write_manifest(folder)
    with expect_error(ProofError, name=stage):
        mptk.verify(folder)


def test_a_graph_without_a_mask_is_not_said_to_take_padding(laboratory, tmp_path, inside):
    inside.bound("mptk.tasks.padding.MASK", "no mask")
    out = laboratory.prune("encoder", tmp_path / "out", method="random", data="random", onnx=True)
    stages = [row["stage"] for row in mptk.Report.read(out).proof]
    assert "ONNX Runtime" in stages
    assert "ONNX Runtime padded" not in stages


@pytest.mark.parametrize("kind", ["speech", "image classifier"])
def test_each_graph_of_a_kind_is_quantised(laboratory, tmp_path, kind):
    """The graphs of a scheme have one ending, and int8 and int4 are as near as their bits allow."""
    asked = Settings(quantize=("int8", "int4", "fp16"))
    out = export_folder(str(laboratory.open_model(kind)), tmp_path / "export", asked)
    graphs = [file for file in (out / "onnx").glob("*.onnx") if not file.stem.endswith(ENDINGS)]
    assert len(list((out / "onnx").glob("*.onnx"))) == len(graphs) * (1 + len(ENDINGS))
    for file in graphs:
        sessions = [ort.InferenceSession(file.with_stem(file.stem + ending)) for ending in ("", *ENDINGS)]
        runs = [session.run(None, random_inputs(session))[0] for session in sessions]
        assert {run.dtype for run in runs} == {np.dtype(np.float32)}
        halved, int8, int4 = (float(np.linalg.norm(run - runs[0]) / np.linalg.norm(runs[0])) for run in runs[1:])
        assert 0 < halved < 1e-3, file.name
        assert 0 < int8 < min(int4, 0.02), file.name
        assert int4 < 0.4, file.name


ENDINGS = ("_fp16", "_quantized", "_q4")


def random_inputs(session: ort.InferenceSession) -> dict[str, Any]:
    """Two rows of nine positions, and empty caches."""
    rng, found = np.random.default_rng(0), {}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            kind = np.float16 if "16" in value.type else np.float32
            found[value.name] = np.zeros((2, value.shape[1], 0, value.shape[3]), kind)
            continue
        shape = [size if isinstance(size, int) else 2 if "batch" in size else 9 for size in value.shape]
        whole = {"input_ids": rng.integers(3, 61, shape), "token_type_ids": np.zeros(shape, np.int64)}
        plain = whole.get(value.name, np.ones(shape, np.int64))
        found[value.name] = plain if value.type == "tensor(int64)" else rng.standard_normal(shape, np.float32)
    return found


def test_a_wrong_weight_of_one_quantised_graph_fails_the_proof(laboratory, tmp_path):
    asked = {"method": "random", "data": "random", "onnx": True, "quantize": ("int8",)}
    report = mptk.Report.read(laboratory.prune("speech", tmp_path / "out", **asked))
    assert [row["stage"] for row in report.proof][-3:] == ["int8 weights", "int8 logits", "int8 in use"]
    graphs = tmp_path / "out" / "onnx"
    sizes = [file.stat().st_size for file in graphs.glob("*_quantized.onnx*")]
    assert report.quantized["int8"]["file"] == "onnx/decoder_model_merged_quantized.onnx"
    assert (report.quantized["int8"]["bytes"], len(sizes)) == (sum(sizes), 4)
    damaged(graphs / "encoder_model_quantized.onnx", "_scales", lambda scales: 2 * scales)
    write_manifest(tmp_path / "out")
    with expect_error(ProofError, name="int8 weights"):
        mptk.verify(tmp_path / "out")


def test_an_image_model_in_float16_takes_the_processors_own_numbers(laboratory, tmp_path):
    asked = {"method": "random", "data": "random", "onnx": True, "onnx_dtype": "float16"}
    report = mptk.Report.read(laboratory.prune("image classifier", tmp_path / "out", **asked))
    assert report.quality["protocol"].startswith("random inputs")
    assert [row["stage"] for row in report.proof][4:] == ["ONNX Runtime", "fp16 weights", "fp16 logits"]
    session = ort.InferenceSession(tmp_path / "out" / "onnx" / "model.onnx")
    assert [value.type for value in (*session.get_inputs(), *session.get_outputs())] == ["tensor(float)"] * 2


def test_a_live_model_is_exported(tmp_path):
    model = MODEL_KINDS["encoder"].make().eval()
    mptk.export(model, tmp_path, run="mine")
    check_file(tmp_path / "model.onnx", "graph")
    session = ort.InferenceSession(tmp_path / "model.onnx")
    ids = torch.randint(3, 61, (1, 12))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        assert_equal(torch.from_numpy(found), model(**inputs).last_hidden_state)
    assert session.get_modelmeta().custom_metadata_map["run"] == "mine"
    with expect_error(ModelError, name="BertModel"):
        mptk.export(model.bfloat16(), tmp_path / "b")
