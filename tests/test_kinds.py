"""Every kind of model from its folder and its users' data to a proven smaller folder: text, images and sound."""

from __future__ import annotations

import math
import re
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_checkpoints as toys
from huggingface_hub import ModelCard
from PIL import Image
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

import mptk
from benchmarks import zoo_end_to_end
from mptk.errors import MptkError
from mptk.io.models import load
from mptk.ir.samples import IGNORED, Samples
from mptk.run.settings import Learning, Training
from mptk.tasks import task_of
from mptk.tasks.classifier import Classifier
from mptk.tasks.encoder import Encoder
from mptk.tasks.seq2seq import until_end

VOCAB = len(toys.tokenizer())
SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
}
SPEECH = {"d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 44}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "encoder": lambda: BertModel(BertConfig(**SIZE, max_position_embeddings=64)),
    "text classifier": lambda: BertForSequenceClassification(BertConfig(**SIZE, max_position_embeddings=64)),
    "encoder-decoder": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3, decoder_start_token_id=0)
    ),
    "image classifier": lambda: ViTForImageClassification(
        ViTConfig(**{**SIZE, "image_size": 16, "patch_size": 4, "num_labels": 7})
    ),
    "speech": lambda: WhisperForConditionalGeneration(
        WhisperConfig(
            **SPEECH,
            vocab_size=97,
            encoder_attention_heads=3,
            decoder_attention_heads=3,
            max_source_positions=50,
            max_target_positions=64,
            num_mel_bins=8,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each kind, with what prepares its inputs, and data for each."""
    root = tmp_path_factory.mktemp("kinds")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(root / name)
    for name in ("encoder", "text classifier", "encoder-decoder"):
        toys.tokenizer().save_pretrained(root / name)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(root / "image classifier")
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(root / "speech")
    (root / "text.txt").write_text("the quick brown fox jumps over a lazy dog. " * 200)
    rng = np.random.default_rng(0)
    for i in range(6):
        path = root / "images" / f"{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path)
    (root / "sounds").mkdir()
    for i in range(6):
        with wave.open(str(root / "sounds" / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes(rng.integers(-9000, 9000, 16_000, dtype=np.int16).tobytes())
    return root


DATA = {"image classifier": "images", "speech": "sounds"}
METRICS = {
    "encoder": ("encoder", "cosine"),
    "text classifier": ("classification", "agreement"),
    "encoder-decoder": ("seq2seq", "perplexity"),
    "image classifier": ("classification", "agreement"),
    "speech": ("seq2seq", "perplexity"),
}
TAGS = {
    "encoder": "feature-extraction",
    "text classifier": "text-classification",
    "encoder-decoder": "text2text-generation",
    "image classifier": "image-classification",
    "speech": "automatic-speech-recognition",
}


def settings(folders: Path, name: str, **more: object) -> mptk.Settings:
    return mptk.Settings(
        **{
            "method": "wanda",
            "data": str(folders / DATA.get(name, "text.txt")),
            "samples": 4,
            "length": 12,
            "eval_windows": 3,
            "eval_length": 12,
            "multiple": 2,
            "sparsity": 0.3,
            "tolerance": 0.2,
            "onnx": False,
            **more,
        }
    )


@pytest.mark.parametrize("name", MODELS)
def test_it_is_pruned_proven_and_measured_in_its_own_terms(folders: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    mptk.prune(str(folders / name), out, settings(folders, name))
    report = mptk.Report.read(out)
    assert (report.task, report.quality["metric"]) == METRICS[name]
    assert any(f["width"] < f["of"] for f in report.families.values())
    assert math.isfinite(report.quality["pruned"])
    assert report.quality["protocol"].startswith(f"{folders / DATA.get(name, 'text.txt')}: ")
    assert {"stored weights", "rewritten graph", "reloaded checkpoint"} <= {row["stage"] for row in report.proof}
    assert [d.stage for d in mptk.verify(out)] == [row["stage"] for row in report.proof]
    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == TAGS[name]
    assert report.quality["protocol"] in card.text
    for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        exec(block.replace('"."', repr(str(out))), {})  # noqa: S102
    for file in ("preprocessor_config.json", "tokenizer.json"):
        assert (out / file).is_file() == (folders / name / file).is_file()


@pytest.mark.parametrize(
    ("name", "method"), [("encoder", "taylor"), ("image classifier", "taylor"), ("speech", "flap")]
)
def test_units_are_scored_by_the_loss_of_the_kind(folders: Path, tmp_path: Path, name: str, method: str) -> None:
    mptk.prune(str(folders / name), tmp_path / "out", settings(folders, name, method=method))
    assert all(row["ok"] for row in mptk.Report.read(tmp_path / "out").proof)


@pytest.mark.parametrize("name", ["encoder", "image classifier"])
def test_masks_are_learned_and_it_recovers(folders: Path, tmp_path: Path, name: str) -> None:
    learning = Learning(steps=6, rank=2, training=Training(batch=4, micro=2))
    mptk.prune(str(folders / name), tmp_path / "out", settings(folders, name, method="maskprune", learning=learning))
    report = mptk.Report.read(tmp_path / "out")
    assert {"learned masks", "trained model"} <= {row["stage"] for row in report.proof}


def test_quality_of_the_dense_model_is_perfect_agreement(folders: Path) -> None:
    """Features and classes are compared with the dense model's own, so a model that is not cut is at no distance."""
    samples = Samples({"input_ids": torch.arange(24).reshape(2, 12)})
    for task, folder in ((Encoder(), "encoder"), (Classifier(), "text classifier")):
        model = load(str(folders / folder)).model
        with torch.no_grad():
            output = task.output(model, samples)
        judged = Samples(samples.inputs, output)
        assert float(task.loss(output, judged)) == pytest.approx(0, abs=1e-5)
        assert float(task.loss(output + torch.randn(output.shape), judged)) > 0.01


def test_gradients_do_not_vanish_at_the_dense_model(folders: Path) -> None:
    samples = Samples({"input_ids": torch.arange(24).reshape(2, 12)})
    for task, folder in ((Encoder(), "encoder"), (Classifier(), "text classifier")):
        model = load(str(folders / folder)).model
        output = task.output(model, samples)
        task.sensitivity(output, Samples(samples.inputs, output.detach())).backward()
        assert model.get_input_embeddings().weight.grad.abs().max() > 1e-6


def test_targets_end_with_the_text() -> None:
    ids = torch.tensor([[9, 5, 2, 0, 0], [9, 5, 6, 7, 8]])
    assert until_end(ids, 2).tolist() == [[5, 2, IGNORED, IGNORED], [5, 6, 7, 8]]
    assert until_end(ids, [7, 2])[1].tolist() == [5, 6, 7, IGNORED]
    assert until_end(ids, None).tolist() == ids[:, 1:].tolist()


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("image classifier", "self", "this model reads images, and self is no folder of them"),
        ("image classifier", "text.txt", "is no folder of them; give one with --data, or random"),
        ("image classifier", "sounds", "holds no images"),
        ("speech", "images", "holds no WAV files"),
        ("encoder", "self", "cannot write text to calibrate on"),
        ("encoder-decoder", "self", "cannot write text to calibrate on"),
    ],
)
def test_data_of_another_kind_is_said(folders: Path, tmp_path: Path, name: str, data: str, line: str) -> None:
    given = data if data == "self" else str(folders / data)
    with pytest.raises(MptkError, match=line):
        mptk.prune(str(folders / name), tmp_path / "out", settings(folders, name, data=given))


def test_files_that_are_no_image_and_no_sound(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    for name, line in (("image classifier", "no image that can be read"), ("speech", "no WAV file that can be read")):
        with pytest.raises(MptkError, match=line):
            mptk.prune(str(folders / name), tmp_path / "out", settings(folders, name, data=str(tmp_path)))


def test_random_inputs_are_said_in_the_protocol(folders: Path, tmp_path: Path) -> None:
    mptk.prune(
        str(folders / "image classifier"), tmp_path / "out", settings(folders, "image classifier", data="random")
    )
    assert mptk.Report.read(tmp_path / "out").quality["protocol"].startswith("random inputs")


def test_a_kind_is_found_by_the_class(folders: Path) -> None:
    assert {name: task_of(load(str(folders / name))).name for name in MODELS} == {n: k for n, (k, _) in METRICS.items()}


def test_a_type_of_the_zoo_passes_the_command_line() -> None:
    row = zoo_end_to_end.run_type("masked-lm", "albert")
    assert row["stage"] == "verified", row["reason"]
