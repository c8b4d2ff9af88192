"""Dual encoders (CLIP, SigLIP), from a folder of captions to a proven smaller folder and its graph.

It reaches for mptk.tasks: what captions become, what the quality is, and which classes are of this kind.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from commands import done
from lab import fields
from pictures import COLOURS, clip, clip_processor, write_captions, write_chats
from PIL import Image
from torch import Tensor

import mptk
from benchmarks.tiny_models import tiny_model
from benchmarks.tiny_wrappers import PAIRED
from mptk import Samples, Settings
from mptk.errors import DataError, FileError, InputError
from mptk.features.dual_encoder.captioned import encode_texts
from mptk.features.dual_encoder.task import DUAL_ENCODER
from mptk.io import Loaded, load
from mptk.progress import show_nothing
from mptk.protocols import SampleSets
from mptk.tasks import bind_task
from mptk.tasks.inputs.images import Images
from mptk.testing import expect_error

ASKED = {"method": "wanda", "samples": 4, "eval_windows": 6, "align": 1, "sparsity": 0.1, "tolerance": 0.1}
NODE = shutil.which("node")
TRANSFORMERS_JS = Path(os.environ.get("MPTK_NODE_MODULES", "build/node_modules")) / "@huggingface" / "transformers"
EMBEDS, LOGITS = ["text_embeds", "image_embeds"], ["logits_per_image", "logits_per_text"]


def write_world(root: Path) -> None:
    clip().save_pretrained(root / "clip")
    clip_processor().save_pretrained(root / "clip")
    clip_processor().image_processor.save_pretrained(root / "clip")  # a file of its own, as transformers.js reads it
    write_captions(root / "pictures")
    write_chats(root / "chats.jsonl", root / "pictures")


@pytest.fixture(scope="module")
def world(laboratory):
    """``clip``, ``pictures`` and ``chats.jsonl``."""
    return laboratory.keep("pairs/world", write_world)


@pytest.fixture(scope="module")
def pruned(world, laboratory):
    """The model with a smaller vision tower."""
    data = {"data": str(world / "pictures"), "eval_data": str(world / "pictures")}  # a few pictures are for both
    asked = {**ASKED, **data, "families": ("vision_tower",), "quantize": ("int8",)}
    return laboratory.keep("pairs/pruned", lambda out: mptk.prune(str(world / "clip"), out, **asked))


@pytest.mark.always
def test_a_tower_is_cut_proven_and_loads_as_a_stock_folder(pruned):
    report = mptk.Report.read(pruned)
    assert report.task == "dual-encoder"
    small = t.AutoModel.from_pretrained(pruned)
    assert type(small) is t.CLIPModel
    assert small.config.vision_config.intermediate_size < 80
    assert small.config.text_config.intermediate_size == 72
    assert torch.equal(small.logit_scale, clip().logit_scale)
    stages = [row["stage"] for row in report.proof]
    assert stages[3:6] == ["reloaded checkpoint", "ONNX Runtime", "ONNX Runtime padded"]
    assert [d.stage for d in mptk.verify(pruned)] == stages


def test_it_is_measured_as_its_report_says_and_both_show_the_retrieval(world, pruned):
    measured = mptk.evaluate(pruned, str(world / "pictures"), windows=6)
    assert measured["model"] == pytest.approx(mptk.Report.read(pruned).quality["pruned"], abs=1e-5)
    assert measured["dense"] == 1
    for name, words in {"pruned": ["report"], "model": ["eval", "--data", world / "pictures"]}.items():
        assert f"retrieval: 1.0000 dense, 1.0000 {name}" in done(*words, pruned).output


def test_captions_are_padded_as_the_processor_pads_them(world, tmp_path):
    """And the tokenizer that was read with is not changed: the folder gets its file."""
    loaded = load(str(world / "clip"))
    asked = Settings(eval_data=str(world / "chats.jsonl"), eval_windows=6)
    found = bind_task(loaded).draw_evaluation(loaded, asked).inputs
    texts = [f"is a all {colour}" for colour in COLOURS]
    pictures = [Image.open(world / "pictures" / f"{colour}.png") for colour in COLOURS]
    expected = clip_processor()(text=texts, images=pictures, padding=True, return_tensors="pt")
    assert {*found} == {*expected}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    before = json.loads((world / "clip" / "tokenizer.json").read_text())
    loaded.tokenizer.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer.json").read_text()) == before


def test_a_tokenizer_without_a_mask_fills_captions_up():
    """SigLIP reads its padding as text, and was trained on texts of one length."""
    tokenizer = clip_processor().tokenizer
    with_mask = encode_texts(Loaded(clip(), tokenizer, "clip", Path()), ["a picture", "red"], 12)
    assert with_mask["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    tokenizer.model_input_names = ["input_ids"]
    filled = encode_texts(Loaded(clip(), tokenizer, "clip", Path()), ["a picture", "red"], 12)
    assert filled["input_ids"].shape == (2, 12)
    assert filled["attention_mask"].min() == 1


def test_quality_is_of_both_embeddings_and_of_the_nearest_text():
    """The second image moves: its cosine with the dense model's becomes 0.6, and another text is nearest."""
    texts = torch.eye(3)
    images, moved = torch.eye(3) + 0.1, torch.eye(3) + 0.1
    moved[1] = torch.tensor([0.9, 0.3, 0.0])
    outputs = {"dense": (texts, images), "pruned": (2 * texts, moved)}

    def runs(batches, progress):
        for i in range(len(batches)):
            for name, each in outputs.items():
                yield name, i, tuple(x[i : i + 1] for x in each)

    samples = Samples({"input_ids": torch.zeros(3, 4).long()})
    found = DUAL_ENCODER.measure_quality(runs, SampleSets(samples, samples, samples, "pictures"), show_nothing)
    assert found["retrieval"] == {"dense": 1.0, "pruned": round(2 / 3, 6)}
    apart = float(F.cosine_similarity(images[1], moved[1], dim=0))
    assert found["pruned"] == pytest.approx((5 + apart) / 6, abs=1e-5)


def test_a_graph_gives_similarities_of_any_numbers_of_texts_and_images(world, pruned):
    """As transformers gives them, in optimum's names, with padded texts."""
    graph = ort.InferenceSession(pruned / "onnx" / "model.onnx")
    assert {x.name: x.shape for x in graph.get_inputs()} == {
        "input_ids": ["text_batch_size", "sequence_length"],
        "attention_mask": ["text_batch_size", "sequence_length"],
        "pixel_values": ["image_batch_size", 3, 32, 32],
    }
    assert [x.name for x in graph.get_outputs()] == [*LOGITS, *EMBEDS]
    texts = ["a picture that is all red", "a", "grey picture"]
    for colours in (["red"], ["red", "blue", "white", "black"]):
        images = [Image.open(world / "pictures" / f"{colour}.png") for colour in colours]
        asked = t.AutoProcessor.from_pretrained(pruned)(text=texts, images=images, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = t.AutoModel.from_pretrained(pruned)(**asked)
        found = graph.run(None, {name: x.numpy() for name, x in asked.items()})
        for name, x in zip([*LOGITS, *EMBEDS], found, strict=True):
            assert np.abs(x - expected[name].numpy()).max() < 1e-5 * float(expected[name].abs().max()), name


@pytest.mark.skipif(NODE is None or not TRANSFORMERS_JS.is_dir(), reason="Node and transformers.js are not installed")
def test_transformers_js_classifies_as_transformers_does(world, pruned):
    picture, texts = world / "pictures" / "red.png", ["a picture", "red", "blue grey a"]
    script = Path(__file__).with_name("transformers_js_pairs.mjs")
    command = [str(NODE), str(script), str(TRANSFORMERS_JS), str(pruned), str(picture), *texts]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    read = t.AutoProcessor.from_pretrained(pruned)
    asked = read(text=texts, images=Image.open(picture), padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = t.AutoModel.from_pretrained(pruned)(**asked).logits_per_image.softmax(1)[0]
    assert json.loads(run.stdout) == pytest.approx(expected.tolist(), abs=1e-4)


def siglip() -> t.SiglipModel:
    """Text: hidden 40, 5 heads, ffn 72. Vision: hidden 48, 4 heads, ffn 80. It reads padding as text."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "intermediate_size": 72, "hidden_size": 40, "num_attention_heads": 5}
    text = {**sizes, "vocab_size": 30, "max_position_embeddings": 20, "projection_size": 48}
    vision = {**sizes, "hidden_size": 48, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    ends = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 1}
    return t.SiglipModel(t.SiglipConfig(text_config={**text, **ends}, vision_config=vision)).eval()


def test_a_graph_says_nothing_of_padding_if_the_class_reads_it_as_text(tmp_path, pruned):
    siglip().save_pretrained(tmp_path / "siglip")
    mptk.prune(str(tmp_path / "siglip"), tmp_path / "out", **ASKED, data="random", families=("text_tower",))
    said = [folder / "onnx" / "model.onnx" for folder in (tmp_path / "out", pruned)]
    keys = ["padding_token" in ort.InferenceSession(file).get_modelmeta().custom_metadata_map for file in said]
    assert keys == [False, True]
    report = mptk.Report.read(tmp_path / "out")
    assert [row["stage"] for row in report.proof][-1] == "ONNX Runtime"
    assert any(note.startswith("padding changes what the model computes") for note in report.notes)


def test_images_come_as_patches_if_the_class_reads_these(world, tmp_path):
    """SigLIP 2: images of any shape, in a sequence of patches with a mask, whose type is the graph's."""
    model = tiny_model(PAIRED, "siglip2").model
    example = DUAL_ENCODER.make_example(model).inputs
    assert [*example] == ["input_ids", "attention_mask", "pixel_values", "pixel_attention_mask", "spatial_shapes"]
    found = DUAL_ENCODER.compute_output(model, Samples(example))
    assert all(isinstance(x, Tensor) and len(x) == 2 and x.isfinite().all() for x in found)
    t.Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(tmp_path)
    loaded = Loaded(model, None, "siglip2", tmp_path)
    read = Images().prepare(loaded, [world / "pictures" / "red.png"], lambda done, total: None)
    assert read["pixel_attention_mask"].sum() == read["spatial_shapes"].prod()
    assert {name: x.dtype for name, x in read.items()} == {name: example[name].dtype for name in read}


def test_a_class_is_taken_by_what_it_gives():
    others = ("CLIPTextModelWithProjection", "OwlViTForObjectDetection", "Blip2ForImageTextRetrieval", "FlavaModel")
    for names, taken in ((("CLIPModel", "GroupViTModel"), True), (others, False)):
        for model_class in (getattr(t, name) for name in names):
            assert (DUAL_ENCODER.explain_refusal(t.CLIPConfig(), {model_class}) is None) == taken, model_class


def write_two_images(folder: Path) -> str:
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "red"}]}]
    images = [str(folder / "pictures" / f"{colour}.png") for colour in COLOURS[:2]]
    (folder / "two.jsonl").write_text(json.dumps({"messages": turns, "images": images}))
    return str(folder / "two.jsonl")


def write_no_padding(folder: Path) -> str:
    fields("tokenizer_config.json", pad_token=None)(folder / "clip")
    return str(folder / "pictures")


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [(lambda folder: "self", InputError), (write_two_images, DataError), (write_no_padding, FileError)],
)
def test_wrong_data_is_refused(tmp_path, world, spoil, kind):
    shutil.copytree(world, tmp_path / "world")
    data = spoil(tmp_path / "world")
    loaded = load(str(tmp_path / "world" / "clip"))
    with expect_error(kind):
        bind_task(loaded).draw_samples(loaded, Settings(data=data), 6, lambda done, total: None)


def test_a_graph_of_texts_and_images_is_quantised(pruned):
    assert {"int8 weights", "int8 features", "int8 in use"} <= {row["stage"] for row in mptk.Report.read(pruned).proof}
    whole, rounded = (pruned / "onnx" / f"{name}.onnx_data" for name in ("model", "model_quantized"))
    assert rounded.stat().st_size < whole.stat().st_size / 2
