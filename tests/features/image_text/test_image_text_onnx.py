"""Vision-language models as ONNX: three graphs that give, put together as others put them, what the stock class gives.

It reaches for mptk.tasks, for what a graph computes of the sizes of images and what transformers.js is told; for the
decoder of mptk.ort, and for the windows of mptk.proof.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from commands import done
from lab import fields, remove
from pictures import IMAGE, PATCHES, processor, write_captions, write_llava, write_qwen
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from typer.testing import CliRunner

import mptk
from benchmarks.tiny_models import tiny_model
from benchmarks.tiny_wrappers import PICTURED
from mptk import ProofError, Samples, Settings
from mptk.api.graphs import export_folder
from mptk.cli.main import app
from mptk.compat.transformers import compute_vision_inputs
from mptk.errors import DataError, FileError, InputError, TargetError
from mptk.features.image_text.form import IMAGE_TEXT_FORM
from mptk.features.image_text.image_forms import FORMULAS, make_grid_function
from mptk.ort.decoder import OrtDecoder
from mptk.proof.proof import find_windows
from mptk.publish.manifest import write_manifest
from mptk.tasks.onnx_export import check_form
from mptk.tasks.runtimes import build_js_config
from mptk.testing import expect_error

NODE = shutil.which("node")
TRANSFORMERS_JS = Path(os.environ.get("MPTK_NODE_MODULES", "build/node_modules")) / "@huggingface" / "transformers"
ASKED = {"method": "magnitude", "samples": 4, "length": 12, "eval_windows": 2, "eval_length": 12, "align": 1}
ROWS = ["batch_size", "sequence_length"]
PAST = ["batch_size", 2, "past_sequence_length", 16]
GRAPHS = {
    "vision_encoder.onnx": ({"pixel_values": ["num_images", 3, 32, 32]}, "image_features"),
    "embed_tokens.onnx": ({"input_ids": ROWS}, "inputs_embeds"),
    "decoder_model_merged.onnx": (
        {
            "inputs_embeds": [*ROWS, 64],
            "attention_mask": ["batch_size", "total_sequence_length"],
            "position_ids": ROWS,
            "past_key_values.0.key": PAST,
            "past_key_values.0.value": PAST,
        },
        "logits",
    ),
}
STAGES = ["prefill", "padded left", "padded right", "decode", "sizes", "without images"]


@dataclass
class Graphs:
    """The graphs of a folder, put together as transformers.js does it."""

    folder: Path

    @cached_property
    def sessions(self) -> dict[str, ort.InferenceSession]:
        return {name: ort.InferenceSession(self.folder / "onnx" / name) for name in GRAPHS}

    def __call__(self, name: str, **inputs: Any) -> list[Any]:
        return self.sessions[name].run(None, {n: np.asarray(x) for n, x in inputs.items()})

    def embeddings(self, ids: Tensor, pixels: Tensor | None) -> Any:
        (embeds,) = self("embed_tokens.onnx", input_ids=ids)
        if pixels is not None:
            (features,) = self("vision_encoder.onnx", pixel_values=pixels)
            embeds[ids.numpy() == IMAGE] = features
        return embeds

    def logits(self, ids: Tensor, mask: Tensor, pixels: Tensor | None, steps: int) -> Tensor:
        """The last position's logits after a prompt of all tokens but ``steps``, and after each of these."""
        past = ["past_key_values.0.key", "past_key_values.0.value"]
        cache = {name: np.zeros((len(ids), 2, 0, 16), np.float32) for name in past}
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        embeds, found, start = self.embeddings(ids, pixels), [], 0
        for end in range(ids.shape[1] - steps, ids.shape[1] + 1):
            given = {"inputs_embeds": embeds[:, start:end], "attention_mask": mask[:, :end]}
            logits, *present = self("decoder_model_merged.onnx", **given, position_ids=positions[:, start:end], **cache)
            cache, start = dict(zip(past, present, strict=True)), end
            found.append(torch.from_numpy(logits[:, -1]))
        return torch.stack(found, 1)


def prune_llava(root: Path) -> None:
    widths = {"ffn.1": 64, "ffn.2": 64, "language_model_layers": 1}
    asked = {**ASKED, "widths": widths, "families": tuple(widths), "quantize": ("int8", "fp16")}
    dense = write_llava(root / "llava")
    mptk.prune(str(dense), root / "out", data=str(write_captions(root / "pictures")), **asked)


@pytest.fixture(scope="module")
def pruned(laboratory):
    """A LLaVA whose language model, of one block with its cache, and vision tower are cut."""
    return laboratory.keep("vision/pruned", prune_llava) / "out"


@pytest.fixture(scope="module")
def stock(pruned):
    return AutoModelForImageTextToText.from_pretrained(pruned).eval()


def prompts() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and pictures: three rows, of which the last has padding on the left and no picture."""
    text = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10], [4, 3, 6, 5, 8, 7, 10, 9]])
    pictured = torch.cat([text[:, :1], torch.full((2, PATCHES), IMAGE), text[:, 1:]], 1)
    plain = torch.cat([torch.full((1, 5), 1), torch.arange(3, 22)[None] % 13 + 3], 1)
    mask = torch.ones(3, pictured.shape[1], dtype=torch.long)
    mask[2, :5] = 0
    return torch.cat([pictured, plain]), mask, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_graphs_have_the_names_that_transformers_js_reads(pruned, stock):
    assert (stock.config.vision_config.intermediate_size, stock.config.text_config.intermediate_size) == (64, 64)
    for name, session in Graphs(pruned).sessions.items():
        inputs, output = GRAPHS[name]
        assert {value.name: value.shape for value in session.get_inputs()} == inputs
        assert session.get_outputs()[0].name == output
        assert (pruned / "onnx" / f"{name}_data").is_file()
    presents = [value.name for value in Graphs(pruned).sessions["decoder_model_merged.onnx"].get_outputs()[1:]]
    assert presents == ["present.0.key", "present.0.value"]


def test_the_report_proves_the_graphs_with_and_without_images(pruned):
    report = mptk.Report.read(pruned)
    assert not report.notes
    stages = {row["stage"]: row["ok"] for row in report.proof if "ONNX" in row["stage"]}
    assert stages == {f"ONNX Runtime {stage}": True for stage in STAGES}


def test_a_vision_tower_whose_class_leaves_out_the_last_block_keeps_it(pruned, tmp_path):
    """The graphs' own trace cannot follow."""
    asked = {**ASKED, "widths": {"vision_tower_layers": 1}, "families": ("vision_tower_layers",)}
    root = pruned.parent
    report = mptk.prune(str(root / "llava"), tmp_path / "out", data=str(root / "pictures"), **asked).report
    assert report.proof[-1]["stage"] == "reloaded without images"
    assert report.notes


@pytest.mark.parametrize("pictures", [True, False])
def test_the_graphs_compute_what_the_stock_class_does(pruned, stock, pictures):
    """Rows with a picture and one without, padding, then steps with the cache."""
    ids, mask, pixels = prompts()
    if not pictures:
        ids = ids.masked_fill(ids == IMAGE, 5)
    given = {"pixel_values": pixels} if pictures else {}
    with torch.no_grad():
        expected = stock(input_ids=ids, attention_mask=mask, **given).logits[:, -4:]
    found = Graphs(pruned).logits(ids, mask, given.get("pixel_values"), steps=3)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_generate_continues_text_as_the_stock_class_does(pruned, stock):
    words = AutoTokenizer.from_pretrained(pruned)
    given = words("a picture that", return_tensors="pt")
    written = stock.generate(**given, max_new_tokens=4, do_sample=False)[0, given["input_ids"].shape[1] :]
    expected = words.decode(written, skip_special_tokens=True)
    assert mptk.generate(pruned, "a picture that", max_new_tokens=4) == [expected]


@pytest.mark.parametrize(("ending", "stage"), [("", "ONNX Runtime prefill"), ("_quantized", "int8 weights")])
def test_verify_finds_a_wrong_vision_encoder(pruned, tmp_path, ending, stage):
    shutil.copytree(pruned, tmp_path / "out")
    data = tmp_path / "out" / "onnx" / f"vision_encoder{ending}.onnx_data"
    np.roll(np.fromfile(data, np.float32), 1).tofile(data)
    write_manifest(tmp_path / "out")
    with expect_error(ProofError, name=stage):
        mptk.verify(tmp_path / "out")


@pytest.mark.skipif(not (NODE and TRANSFORMERS_JS.is_dir()), reason="Node or transformers.js is not installed")
@pytest.mark.parametrize("dtype", ["fp32", "q8"])
def test_transformers_js_writes_what_transformers_writes(pruned, stock, tmp_path, dtype):
    ids, mask, pixels = (x[:2] for x in prompts())
    written = stock.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=6, do_sample=False)
    asked = {"ids": ids.tolist(), "pixels": pixels.flatten().tolist(), "dims": [*pixels.shape], "tokens": 6}
    (tmp_path / "asked.json").write_text(json.dumps({**asked, "dtype": dtype}))
    script = Path(__file__).with_name("transformers_js_images.mjs")
    command = [str(NODE), str(script), str(TRANSFORMERS_JS), str(pruned), str(tmp_path / "asked.json")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert torch.tensor(json.loads(run.stdout)).shape == written.shape
    assert dtype != "fp32" or json.loads(run.stdout) == written.tolist()


@pytest.mark.parametrize(("scheme", "ending", "near"), [("int8", "_quantized", 0.05), ("fp16", "_fp16", 1e-3)])
def test_the_graphs_of_a_scheme_are_run_together(pruned, scheme, ending, near):
    row = mptk.Report.read(pruned).quantized[scheme]
    files = [file for name in GRAPHS for file in (pruned / "onnx").glob(f"{Path(name).stem}{ending}.onnx*")]
    assert (len(files), row["bytes"]) == (2 * len(GRAPHS), sum(file.stat().st_size for file in files))
    decoder, whole = OrtDecoder(pruned / row["file"]), OrtDecoder(pruned)
    ids, _, pixels = prompts()
    given = ids[:2], {"pixel_values": pixels}
    embeds, expected = decoder.embeddings(*given), whole.embeddings(*given)
    assert 0 < (embeds - expected).norm() < near * expected.norm()
    found, logits = (made.prefill(e.numpy())[0] for made, e in ((decoder, embeds), (whole, expected)))
    assert 0 < np.linalg.norm(found - logits) < near * np.linalg.norm(logits)


@pytest.mark.usefixtures("quick_bench")
def test_the_vision_encoder_is_timed_beside_the_decoder(pruned):
    result = mptk.bench([str(pruned)], lengths=(8,), rounds=2)
    cases = ["prefill 8", "decode 8", "vision encoder"]
    assert [str(row.case) for row in result.rows] == [case for case in cases for _ in result.graphs]
    assert [graph.name for graph in result.graphs] == [str(pruned), f"{pruned} int8", f"{pruned} fp16"]


def test_browsers_take_int8_only_if_each_graph_has_it(pruned, tmp_path):
    """They load the int8 graphs unless the config names another type."""
    config = json.loads((pruned / "config.json").read_text())["transformers.js_config"]
    assert config == {"use_external_data_format": True, "kv_cache_dtype": {"fp16": "float16"}}
    shutil.copytree(pruned / "onnx", tmp_path / "onnx")
    (tmp_path / "onnx" / "embed_tokens_quantized.onnx").unlink()
    assert build_js_config(tmp_path / "onnx")["dtype"] == "fp32"


def test_a_vision_encoder_takes_several_images_of_any_size_at_once(exported):
    model = AutoModelForImageTextToText.from_pretrained(exported / "qwen")
    encoder = ort.InferenceSession(exported / "out" / "onnx" / "vision_encoder.onnx")
    for sizes in ([[1, 4, 4]], [[1, 2, 6], [1, 12, 10], [1, 4, 2]]):
        grids = torch.tensor(sizes)
        pixels = torch.randn(int(grids.prod(1).sum()), encoder.get_inputs()[0].shape[1] or 384)
        with torch.no_grad():
            expected = torch.cat(list(model.get_image_features(pixels, grids, return_dict=True).pooler_output))
        found = encoder.run(None, {"pixel_values": pixels.numpy(), "image_grid_thw": grids.numpy()})[0]
        assert np.abs(found - expected.numpy()).max() < 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_sizes_of_images_become_what_transformers_makes_of_them(model_type):
    encoder = tiny_model(PICTURED, model_type).model.model.visual
    for sizes in ([[1, 4, 4]], [[1, 2, 6], [1, 12, 10], [1, 30, 26]], [[1, 8, 8], [1, 8, 8]]):
        grids = torch.tensor(sizes)
        wanted = {n: x for n, x in compute_vision_inputs(encoder, grids).items() if isinstance(x, Tensor)}
        assert {"position_ids", "cu_seqlens"} <= wanted.keys()
        for name, expected in wanted.items():
            found = FORMULAS[name](encoder, grids, int(grids.prod(1).sum()))
            lengths = found.unique_consecutive() if name.startswith("cu_") else found
            assert torch.equal(lengths, expected.long()), name


def test_an_encoder_that_makes_something_else_of_sizes_is_refused_and_so_is_float16_without_float32():
    with expect_error(InputError, name="onnx_dtype"):
        check_form(IMAGE_TEXT_FORM, Settings(onnx_dtype="float16"))
    model = tiny_model(PICTURED, "qwen3_vl").model
    with expect_error(TargetError, name="Qwen3VLForConditionalGeneration"):
        make_grid_function(model, torch.tensor([[1, 4, 4]]))


def test_a_proof_knows_the_windows_that_its_samples_and_their_padding_reach():
    """Padding between prompt and answer counts in a window: only the prompt of such rows can be compared."""
    model = tiny_model(PICTURED, "aya_vision").model
    model.config.text_config.sliding_window = 20
    compiled = SimpleNamespace(prepared=SimpleNamespace(loaded=SimpleNamespace(model=model)))
    found = {n: find_windows(compiled, Samples({"input_ids": torch.ones(1, n).long()})) for n in (12, 17, 30)}
    assert found == {12: (), 17: (20,), 30: (20,)}


def export_qwen(root: Path) -> None:
    export_folder(str(write_qwen(root / "qwen")), root / "out", Settings())
    write_captions(root / "small")
    write_captions(root / "wide", width=64)


@pytest.fixture
def exported(laboratory):
    """A Qwen2-VL whose texts depend on the picture, its graphs, and pictures of two sizes."""
    return laboratory.keep("vision/exported", export_qwen)


@pytest.mark.parametrize("pictures", [("small/red.png",), ("wide/grey.png",), ("wide/blue.png", "small/white.png")])
def test_generate_writes_after_images_what_transformers_writes(exported, pictures):
    """In the chat template, with positions on three axes, and images of several sizes."""
    places = [exported / name for name in pictures]
    options = [word for place in places for word in ("--image", str(place))]
    words = ["generate", str(exported / "out"), "a picture", "--max-new-tokens", "8", *options]
    run = done(*words)
    reader = AutoProcessor.from_pretrained(exported / "qwen")
    turn = {"role": "user", "content": [*({"type": "image"} for _ in places), {"type": "text", "text": "a picture"}]}
    text = reader.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    asked = reader(text=[text], images=[Image.open(place) for place in places], return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(exported / "qwen")
    found = model.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert run.stdout.strip() == reader.tokenizer.decode(found, skip_special_tokens=True).strip()
    assert f"{asked['input_ids'].shape[1]} prompt tokens" in run.stderr


def test_without_a_template_the_token_of_the_image_comes_first(pruned, stock):
    picture = pruned.parent / "pictures" / "blue.png"
    words = ["generate", str(pruned), "a picture", "--image", str(picture), "--max-new-tokens", "6"]
    run = done(*words)
    asked = processor()(text="<image>\na picture", images=Image.open(picture), return_tensors="pt")
    found = stock.generate(**asked, max_new_tokens=6, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert run.stdout.strip() == processor().decode(found, skip_special_tokens=True).strip()


def read_text_only(folder: Path) -> None:
    """Put the graph of a decoder that reads token ids in place of the others."""
    shutil.rmtree(folder / "onnx")
    shutil.copytree(folder.parent / "text", folder, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("spoil", "kind", "about"),
    [
        (fields("processor_config.json", image_processor__crop_size={"height": 48, "width": 48}), DataError, "data"),
        (read_text_only, InputError, "image"),
        (remove("processor_config.json"), FileError, "out"),
        (lambda folder: processor(additional=3).save_pretrained(folder), FileError, "processor_config.json"),
    ],
    ids=["of another size", "of text", "without processor", "of other places"],
)
def test_images_that_cannot_be_read_are_refused(laboratory, pruned, tmp_path, spoil, kind, about):
    shutil.copytree(pruned, tmp_path / "out")
    laboratory.copy(laboratory.open_pruned(), tmp_path / "text")
    spoil(tmp_path / "out")
    command = ["generate", str(tmp_path / "out"), "a", "--image", str(pruned.parent / "pictures" / "blue.png")]
    with expect_error(kind) as refused:
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert Path(refused.value.name).name == about
