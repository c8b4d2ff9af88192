"""Every kind of model from its folder and its users' data to a proven smaller folder: text, images and sound.

It reaches for mptk.tasks: a kind is found before any command runs.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as t
from huggingface_hub import ModelCard
from PIL import Image

import mptk
from benchmarks import zoo_end_to_end, zoo_training
from benchmarks.tiny_models import tiny_model
from mptk import Samples
from mptk.api.graphs import export_folder
from mptk.compile.trace import has_same_sizes, trace_loaded
from mptk.config import Learning, Training
from mptk.errors import DataError, FileError, ModelError, TargetError, TraceError
from mptk.features.encoder_decoder.task import mask_after_end
from mptk.features.kinds.classifier import Classifier
from mptk.features.kinds.masked_lm import FIRST, STRIDE, MaskedLM, mask_tokens
from mptk.io import Loaded, load
from mptk.ir import IGNORED
from mptk.staged.staged import EXECUTOR
from mptk.tasks import bind_task
from mptk.tasks.encoder import Encoder
from mptk.tasks.inputs import choose_inputs
from mptk.tasks.inputs.images import open_image
from mptk.tasks.inputs.text import TEXT_LENGTH
from mptk.testing import MODEL_KINDS, expect_error

TAGS = {
    "encoder": "feature-extraction",
    "text classifier": "text-classification",
    "masked language model": "fill-mask",
    "encoder-decoder": "text2text-generation",
    "image classifier": "image-classification",
    "speech": "automatic-speech-recognition",
}


@pytest.mark.always
@pytest.mark.parametrize("name", TAGS)
def test_it_is_pruned_proven_and_measured_in_its_own_terms(laboratory, go_to, name):
    out, kind = laboratory.open_pruned(name), MODEL_KINDS[name]
    go_to(out)
    report = mptk.Report.read(out)
    assert (report.task, report.quality["metric"]) == (kind.task, kind.metric)
    assert any(f["width"] < f["of"] for f in report.families.values())
    assert math.isfinite(report.quality["pruned"])
    assert report.quality["protocol"].startswith(str(laboratory.open_data(name)))
    assert ("one token in 7 masked" in report.quality["protocol"]) == (name == "masked language model")
    stages = [row["stage"] for row in report.proof]
    assert {"stored weights", "rewritten graph", "reloaded checkpoint"} <= set(stages)
    padded = name not in ("image classifier", "speech")
    steps = ["ONNX Runtime steps"] if name in ("encoder-decoder", "speech") else []
    assert stages[4:] == ["ONNX Runtime", *steps, *(["ONNX Runtime padded"] if padded else [])]
    assert [note for note in report.notes if "breaks programs" not in note] == []
    assert [d.stage for d in mptk.verify(out)] == stages
    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == TAGS[name]
    assert report.quality["protocol"] in card.text
    for block in re.findall(r"```python\n(.*?)```", card.text, re.DOTALL):
        exec(block, {})  # noqa: S102
    for file in ("preprocessor_config.json", "tokenizer.json"):
        assert (out / file).is_file() == (laboratory.open_model(name) / file).is_file()


@pytest.mark.parametrize(("name", "method"), [("encoder", "taylor"), ("speech", "flap")])
def test_units_are_scored_by_the_loss_of_the_kind(laboratory, tmp_path, name, method):
    assert all(row["ok"] for row in mptk.Report.read(laboratory.prune(name, tmp_path / "out", method=method)).proof)


def test_a_model_that_is_not_cut_is_at_no_distance_and_its_gradients_do_not_vanish(laboratory):
    """Features and classes are compared with the dense model's own."""
    samples = Samples({"input_ids": torch.arange(24).reshape(2, 12)})
    for task, folder in ((Encoder(), "encoder"), (Classifier(), "text classifier")):
        model = load(str(laboratory.open_model(folder))).model
        output = task.compute_output(model, samples)
        judged = Samples(samples.inputs, output.detach())
        assert float(task.compute_loss(output.detach(), judged)) == pytest.approx(0, abs=1e-5)
        assert float(task.compute_loss(output.detach() + torch.randn(output.shape), judged)) > 0.01
        task.compute_sensitivity(output, judged).backward()
        assert model.get_input_embeddings().weight.grad.abs().max() > 1e-6


def test_targets_end_with_the_text():
    ids = torch.tensor([[9, 5, 2, 0, 0], [9, 5, 6, 7, 8]])
    assert mask_after_end(ids, 2).tolist() == [[5, 2, IGNORED, IGNORED], [5, 6, 7, 8]]
    assert mask_after_end(ids, [7, 2])[1].tolist() == [5, 6, 7, IGNORED]
    assert mask_after_end(ids, None).tolist() == ids[:, 1:].tolist()


@pytest.mark.parametrize(
    ("name", "data", "refusal"),
    [
        ("image classifier", "self", DataError),
        ("image classifier", "text.txt", DataError),
        ("image classifier", "sounds", DataError),
        ("speech", "images", DataError),
        ("encoder", "self", ModelError),
        ("masked language model", "self", ModelError),
        ("encoder-decoder", "self", ModelError),
    ],
)
def test_data_of_another_kind_is_said_before_any_work(laboratory, tmp_path, name, data, refusal):
    stages = []
    place = data if data == "self" else str(laboratory.open_data("speech").parent / data)
    asked = laboratory.make_settings(name, data=place)
    model = str(laboratory.open_model(name))
    about = place if refusal is DataError else type(MODEL_KINDS[name].make()).__name__
    with expect_error(refusal, name=about):
        mptk.prune(model, tmp_path / "out", asked, progress=lambda stage, *_: stages.append(stage))
    assert stages[-1] == "load"


def test_a_file_that_is_no_image_or_no_sound_or_a_small_one_that_unpacks_to_a_huge_picture(laboratory, tmp_path):
    for name, file in (("image classifier", tmp_path / "broken.png"), ("speech", tmp_path / "broken.wav")):
        file.write_bytes(b"neither")
        loaded = load(str(laboratory.open_model(name)))
        with expect_error(FileError, name=file):
            bind_task(loaded).draw_evaluation(loaded, laboratory.make_settings(name, data=str(tmp_path)))
        file.unlink()
    Image.new("1", (20_000, 8_000)).save(tmp_path / "huge.png")
    assert (tmp_path / "huge.png").stat().st_size < 50_000
    with expect_error(FileError, name=tmp_path / "huge.png"):
        open_image(tmp_path / "huge.png")


def test_a_class_that_does_both_is_what_its_config_says():
    sizes = {"vocab_size": 40, "emb_dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 32}
    for causal, kind in ((False, "masked-lm"), (True, "causal-lm")):
        model = t.XLMWithLMHeadModel(t.XLMConfig(**sizes, causal=causal))
        assert bind_task(Loaded(model, None, "it", Path())).name == kind


def test_the_quality_of_a_masked_language_model_counts_the_tokens_under_masks(laboratory):
    loaded = load(str(laboratory.open_model("masked language model")))
    task, ids = bind_task(loaded), torch.randint(3, 97, (2, 17))
    hidden = ids.clone()
    hidden[:, FIRST::STRIDE] = loaded.tokenizer.mask_token_id
    with torch.no_grad():
        samples = task.make_samples(loaded, {"input_ids": ids})
        logits = task.compute_output(loaded.model, samples)
        expected = -loaded.model(input_ids=hidden).logits.log_softmax(-1).gather(2, ids[..., None])[:, FIRST::STRIDE]
    assert float(task.compute_loss(logits, samples)) == pytest.approx(float(expected.sum()), rel=1e-5)
    assert task.count_predictions(samples) == expected.numel()
    loaded.tokenizer.mask_token = None
    with expect_error(FileError, name=loaded.source):
        task.draw_evaluation(loaded, laboratory.make_settings("masked language model"))


def test_perceiver_gives_logits_after_a_window_and_has_two_names_for_pictures():
    """The logits do not enter the loss; ``inputs`` may be called ``pixel_values``, too."""
    samples, logits = mask_tokens(torch.arange(24).reshape(2, 12), 3), torch.randn(2, 20, 30)
    assert MaskedLM().compute_loss(logits, samples) == MaskedLM().compute_loss(logits[:, :12], samples)
    model = tiny_model("image-classification", "perceiver").model
    assert list(choose_inputs(model).make_example(model)) == ["pixel_values"]


def test_a_model_whose_trace_holds_one_length_is_cut_at_that_length(tmp_path):
    """Without its kernels a state space model loops over the positions; and it reads the weights of a layer itself."""
    model = t.MambaForCausalLM(
        t.MambaConfig(vocab_size=60, hidden_size=16, state_size=4, num_hidden_layers=1, pad_token_id=0, bos_token_id=1)
    )
    dense, out = str(tmp_path / "dense"), tmp_path / "out"
    model.save_pretrained(dense)
    run = mptk.Settings(data="random", samples=4, length=8, eval_windows=2, sparsity=0.2, align=1, seed=3)
    learning = Learning(steps=4, training=Training(batch=2))
    found = mptk.prune(dense, out, replace(run, method="maskprune", learning=learning))
    assert all(stage["ok"] for stage in found.report.proof)
    assert found.report.notes
    assert {d.stage for d in mptk.verify(out)} >= {"rewritten graph", "reloaded checkpoint"}
    measured = [mptk.evaluate(it, "random", windows=1, length=9) for it in (out, found)]
    assert all("1 windows of 9 tokens" in each["protocol"] for each in measured)
    assert measured[0]["model"] == pytest.approx(measured[1]["model"], rel=1e-4)
    with expect_error(DataError, name="data"):
        mptk.prune(dense, data=torch.ones(4, 9, dtype=torch.int64), sparsity=0.2, length=8, method="wanda", align=1)
    with expect_error(TargetError, name="MambaForCausalLM"):
        mptk.prune(dense, tmp_path / "graph", replace(run, target="graph"))
    with expect_error(TargetError, name=dense):
        export_folder(dense, tmp_path / "onnx")


def test_a_trace_holds_the_size_of_images_if_all_have_it():
    """Height and width are symbolic for images of another size than the config's, and if nobody knows their size."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
    loaded = Loaded(t.ResNetForImageClassification(t.ResNetConfig(**sizes)).eval(), None, "it", Path())
    like = bind_task(loaded).make_example(loaded.model)
    larger = like.map(lambda x: x.repeat(1, 1, 2, 2))
    size = like.inputs["pixel_values"].shape[2]
    traced = [trace_loaded(loaded, bind_task(loaded), EXECUTOR, like=each) for each in (like, larger, None)]
    assert [program.sizes.find_fixed_size(2) for program in traced] == [size, None, None]
    assert has_same_sizes(like, like.repeat(2))
    assert not has_same_sizes(like, larger)


def test_a_model_of_several_inputs_whose_trace_holds_one_length_is_refused(inside):
    inside.bound("mptk.ir.program.Program.length", 7)
    loaded = Loaded(MODEL_KINDS["encoder-decoder"].make().eval(), None, "it", Path())
    with expect_error(TraceError, name="T5ForConditionalGeneration"):
        trace_loaded(loaded, bind_task(loaded), EXECUTOR)


def test_a_model_that_computes_otherwise_on_few_tokens_is_checked_on_enough(tmp_path):
    """Doge takes the best of its keys if there are more than it keeps."""
    model = tiny_model("causal-lm", "doge").model
    assert 2 < model.config.keep_window_size < TEXT_LENGTH
    model.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert trace_loaded(loaded, bind_task(loaded), EXECUTOR).user_inputs


def test_a_type_of_the_zoo_passes_the_command_line():
    row = zoo_end_to_end.run_type("masked-lm", "albert")
    assert row["stage"] == "verified", row["reason"]
    row = zoo_training.run_type("masked-lm", "albert", ["recovery"])  # test_trained_kinds.py learns masks
    assert row["recovery"] == "trained"
