"""Models with other heads through files of their kind: tokens, CTC, segmentation, depth, series, videos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t
from PIL import Image

import mptk
from mptk import Samples, testing
from mptk.errors import DataError, FileError
from mptk.features.kinds import FEATURE
from mptk.features.kinds.classifier import CTC, SEGMENTATION, Classifier, sum_agreement, sum_divergence
from mptk.features.kinds.numbers import DEPTH, FORECASTS, MASKS
from mptk.features.kinds.series import read_series
from mptk.io import load
from mptk.ort.sessions import OrtGraph
from mptk.plugins import load_parts
from mptk.tasks.inputs.images import Images
from mptk.testing import expect_error
from mptk.testing.kinds import ENCODER, ENCODER_SIZES

CLASSES, SIDE, FRAMES, STEPS, CHANNELS = 5, 32, 4, 32, 3
SIZES = {**ENCODER_SIZES, "num_hidden_layers": 1}
TEXT_SIZES = {**ENCODER, "num_hidden_layers": 1}
WAVES = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2}
WAVES |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0}
SEGMENTS = {"depths": [1, 1], "num_encoder_blocks": 2, "sr_ratios": [2, 1], "hidden_sizes": [16, 24]}
SEGMENTS |= {"num_attention_heads": [1, 2], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
SEGMENTS |= {"image_size": SIDE}
NECK = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 12, 16, 20], "fusion_hidden_size": 16}
NECK |= {"is_hybrid": False}
PIXELS, FILM = {"image_size": SIDE, "patch_size": 8}, {"num_frames": FRAMES, "tubelet_size": 2}
SERIES_SIZES = {"num_input_channels": CHANNELS, "context_length": STEPS, "patch_length": 8, "patch_stride": 8}
SERIES_SIZES |= {"d_model": 24, "num_attention_heads": 3, "ffn_dim": 40, "num_hidden_layers": 1, "loss": "mse"}
SQUARE = {"height": SIDE, "width": SIDE}
NAMED = {"num_labels": CLASSES}
BOXES = {**ENCODER_SIZES, **NAMED, "image_size": [SIDE, SIDE], "patch_size": 8, "num_detection_tokens": 5}
MODELS = {
    "token-classification": (t.BertForTokenClassification, {**TEXT_SIZES, **NAMED}),
    "question-answering": (t.BertForQuestionAnswering, TEXT_SIZES),
    "object-detection": (t.YolosForObjectDetection, BOXES),
    "ctc": (t.Wav2Vec2ForCTC, {**SIZES, **WAVES, "vocab_size": 29}),
    "semantic-segmentation": (t.SegformerForSemanticSegmentation, {**SEGMENTS, **NAMED, "decoder_hidden_size": 20}),
    "depth-estimation": (t.DPTForDepthEstimation, {**SIZES, **PIXELS, **NECK, "num_hidden_layers": 4}),
    "time-series-prediction": (t.PatchTSTForPrediction, {**SERIES_SIZES, "prediction_length": 6, "scaling": "std"}),
    "classification": (t.VideoMAEForVideoClassification, {**SIZES, **PIXELS, **NAMED, **FILM}),
}
PROCESSORS = {
    "token-classification": testing.make_tokenizer,
    "question-answering": testing.make_tokenizer,
    "object-detection": lambda: t.YolosImageProcessor(size=SQUARE, do_pad=False),
    "ctc": t.Wav2Vec2FeatureExtractor,
    "semantic-segmentation": lambda: t.SegformerImageProcessor(size=SQUARE),
    "depth-estimation": lambda: t.DPTImageProcessor(size=SQUARE),
    "classification": lambda: t.VideoMAEImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE),
}
OUTPUTS = {"classification": ["logits"], "time-series-prediction": ["prediction_outputs"]}
OUTPUTS |= {"question-answering": ["start_logits", "end_logits"], "object-detection": ["logits", "pred_boxes"]}
"""Task → the outputs of its ONNX graph, if the tests write it."""
DATA = {"ctc": "sounds", "object-detection": "images", "semantic-segmentation": "images", "depth-estimation": "images"}
DATA |= {"time-series-prediction": "series", "classification": "frames"}
SMALL = {"sparsity": 0.2, "tolerance": 0.15, "method": "magnitude", "samples": 2, "length": 12, "align": 2}
SMALL |= {"eval_windows": 2, "eval_length": 12, "progress": None}


@pytest.fixture(scope="module")
def files(laboratory, tmp_path_factory):
    """Series, and frames of videos; the folders of other kinds beside them."""
    root, rng = tmp_path_factory.mktemp("heads"), np.random.default_rng(0)
    for name in ("images", "sounds", "text.txt"):
        (root / name).symlink_to(laboratory.open_data("speech").parent / name)
    (root / "series").mkdir()
    for i in range(3):
        rows = [",".join(f"{x:.3e}" for x in row) for row in rng.normal(size=(STEPS + 4, CHANNELS))]
        (root / "series" / f"{i}.csv").write_text("\n".join(["temperature,load,hour", *rows]))
        (root / "frames" / f"{i}").mkdir(parents=True)
        for frame in range(FRAMES + 1):
            pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "frames" / f"{i}" / f"{frame}.png")
    return root


def test_a_mask_of_images_without_padding_is_left_out(files, tmp_path):
    """Processors of detectors mark the pixels that fill up a batch; images of one size have none."""
    backbone = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    sizes = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 4}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "use_timm_backbone": False}
    t.DetrForObjectDetection(t.DetrConfig(backbone_config=backbone, **sizes, **heads)).save_pretrained(tmp_path)
    t.DetrImageProcessor(size=SQUARE).save_pretrained(tmp_path)
    pictures = sorted((files / "images").rglob("*.png"))[:2]
    found = Images().prepare(load(str(tmp_path)), pictures, lambda done, total: None)
    assert {name: tensor.shape for name, tensor in found.items()} == {"pixel_values": (2, 3, SIDE, SIDE)}


def test_finders_of_masks_have_a_task():
    assert MASKS.explain_refusal(t.Mask2FormerConfig(), {t.Mask2FormerForUniversalSegmentation}) is None
    assert MASKS.explain_refusal(t.MaskFormerConfig(), {t.MaskFormerForInstanceSegmentation}) is None
    assert MASKS.explain_refusal(t.DetrConfig(), {t.DetrForObjectDetection}) is not None
    assert {name: load_parts("tasks")[name].name for name in FEATURE.tasks} == {name: name for name in FEATURE.tasks}


def save(name: str, folder: Path) -> t.PreTrainedModel:
    model_class, sizes = MODELS[name]
    model = model_class(model_class.config_class(**sizes))
    model.save_pretrained(folder)
    if name in PROCESSORS:
        PROCESSORS[name]().save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_head_is_pruned_from_files_and_keeps_its_class(name, files, tmp_path):
    model, onnx = save(name, tmp_path / "dense"), name in OUTPUTS
    data = str(files / DATA.get(name, "text.txt"))
    found = mptk.prune(str(tmp_path / "dense"), tmp_path / "out", data=data, onnx=onnx, **SMALL)
    report = found.report
    assert report.task == name
    assert report.quality["dense"] == (1 if report.quality["metric"] == "agreement" else 0)
    assert any(f["width"] < f["of"] for f in report.families.values())
    stages = [row["stage"] for row in report.proof]
    assert {"reloaded checkpoint", *(["ONNX Runtime"] if onnx else [])} <= set(stages)
    assert type(found.model) is type(model)
    if onnx:
        session = OrtGraph(tmp_path / "out" / "onnx" / "model.onnx").session
        assert [output.name for output in session.get_outputs()] == OUTPUTS[name]
    if name == "classification":
        assert session.get_inputs()[0].shape[1:3] == [FRAMES, 3]


@pytest.mark.parametrize(
    ("task", "shape"),
    [
        (Classifier(), (3, 5)),
        (CTC, (3, 7, 5)),
        (SEGMENTATION, (3, 5, 4, 6)),
        (DEPTH, (3, 4, 6)),
        (FORECASTS, (3, 6, 2)),
    ],
)
def test_what_counts_is_the_distance_from_the_dense_model(task, shape):
    dense, other = torch.randn(shape), torch.randn(shape, requires_grad=True)
    samples = Samples({"x": torch.zeros(3, 1)}, dense)
    assert float(task.compute_loss(dense, samples)) == pytest.approx(0, abs=1e-6)
    assert float(task.compute_loss(other, samples)) > 0.1
    at = dense.clone().requires_grad_()
    task.compute_sensitivity(at, samples).backward()
    assert at.grad.abs().min() > 0


def test_figures_are_means_over_positions():
    logits, reference = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)

    def each(figure):
        pairs = [(logits[:, :, i, j], reference[:, :, i, j]) for i in range(3) for j in range(4)]
        return sum(float(figure(*pair)) for pair in pairs) / 12

    assert float(sum_agreement(logits, logits, 1)) == len(logits)
    assert float(sum_agreement(logits, reference, 1)) == pytest.approx(each(sum_agreement))
    assert float(sum_divergence(logits, reference, 1)) == pytest.approx(each(sum_divergence), rel=1e-5)


@pytest.mark.parametrize("text", ["1,2\n3,4", "1,2,3\n4,5,6", "a,b,c\n1,2,3\n4,5", "1,2,x", ""])
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_a_wrong_series_is_refused(text, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    with expect_error(FileError, name=tmp_path / "a.csv"):
        read_series(tmp_path / "a.csv", 3, 3)


def test_a_video_of_too_few_frames_is_refused(files, tmp_path):
    save("classification", tmp_path / "dense")
    (tmp_path / "frames" / "short").mkdir(parents=True)
    (tmp_path / "frames" / "short" / "0.png").write_bytes((files / "frames" / "0" / "0.png").read_bytes())
    with expect_error(DataError, name=tmp_path / "frames" / "short"):
        mptk.prune(str(tmp_path / "dense"), data=str(tmp_path / "frames"), **SMALL)
