"""Vision-language models, from a folder of captions to a proven smaller folder.

It reaches for mptk.tasks: what the loss counts, and whether a trace computes what the class does.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from commands import done
from inside import Stopped
from pictures import COLOURS, PATCHES, llava, processor, write_captions, write_chats, write_llava, write_qwen
from PIL import Image
from stops import stop_at

import mptk
from benchmarks.tiny_models import tiny_model
from benchmarks.tiny_wrappers import PICTURED
from mptk import Samples
from mptk.compile.trace import trace_as_example, trace_loaded
from mptk.config import Settings
from mptk.errors import AnalysisError, DataError, FileError, InputError
from mptk.features.image_text.task import ImageText
from mptk.io import Loaded, load
from mptk.ir import IGNORED, read_alignment, resolve_plan, transfer_cut
from mptk.methods.division.selection import expand_parts
from mptk.staged.staged import EXECUTOR
from mptk.targets.stock import StockTarget
from mptk.tasks import bind_task
from mptk.tasks.inputs.chats import has_images
from mptk.testing import expect_error
from passes.analysis.group import analyze_program
from passes.verify import TOLERANCE, compare_outputs

ASKED = {"method": "wanda", "samples": 4, "length": 12, "eval_windows": 4, "eval_length": 12, "align": 1}
PLAIN = {"messages": [{"role": "user", "content": "hello"}]}


def write_world(root: Path) -> None:
    write_llava(root / "llava")
    write_captions(root / "pictures")
    write_chats(root / "chats.jsonl", root / "pictures")
    (root / "plain.jsonl").write_text(json.dumps(PLAIN))
    (root / "column.jsonl").write_text(json.dumps({**PLAIN, "images": ["red.png"]}))
    (root / "text").mkdir()
    (root / "text" / "text.md").write_text("is a picture that is all blue of a grey or all black picture that " * 60)
    Image.new("RGB", (8, 8)).save(root / "text" / "figure.png")
    (root / "empty").mkdir()


@pytest.fixture
def world(laboratory):
    """``llava``, ``pictures``, ``chats.jsonl``, and other data, of which ``text`` holds text and a picture."""
    return laboratory.keep("vision/world", write_world)


def settings(world: Path, **more: Any) -> Settings:
    given = {"sparsity": 0.1, "tolerance": 0.1, "data": str(world / "pictures"), "onnx": False, **ASKED, **more}
    return Settings(**{"eval_data": given["data"], **given})  # a few pictures are for both


@pytest.fixture
def tower(world, laboratory):
    """The model with a smaller vision tower."""
    asked = settings(world, families=("vision_tower",))
    return laboratory.keep("vision/tower", lambda out: mptk.prune(str(world / "llava"), out, asked))


@pytest.mark.always
def test_a_tower_is_cut_proven_and_loads_as_a_stock_folder(tower):
    report = mptk.Report.read(tower)
    assert report.task == "image-text-to-text"
    assert report.quality["metric"] == "perplexity"
    assert "4 samples, each with an image (3 x 32 x 32)" in report.quality["protocol"]
    small = t.AutoModelForImageTextToText.from_pretrained(tower)
    assert small.config.vision_config.intermediate_size < 80
    unused = small.model.vision_tower.encoder.layers[-1]  # the class reads the last layer but one
    assert unused.mlp.fc1.out_features == small.config.vision_config.intermediate_size
    assert small.config.text_config.intermediate_size == 96
    stages = [row["stage"] for row in report.proof]
    assert stages[-2:] == ["reloaded checkpoint", "reloaded without images"]
    assert [d.stage for d in mptk.verify(tower)] == stages


def test_a_model_of_a_smaller_tower_writes_and_is_measured_as_its_report_says(world, tower):
    small = t.AutoModelForImageTextToText.from_pretrained(tower)
    inputs = t.AutoProcessor.from_pretrained(tower)(
        text="<image> a", images=torch.zeros(3, 32, 32), return_tensors="pt"
    )
    assert small.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2
    measured = mptk.evaluate(tower, str(world / "pictures"), windows=4, length=12)
    assert measured["model"] == pytest.approx(mptk.Report.read(tower).quality["pruned"], rel=1e-4)


def test_a_run_whose_pictures_have_another_size_than_the_example_s_is_resumed(tmp_path):
    write_qwen(tmp_path / "qwen")
    write_captions(tmp_path / "pictures", width=48)
    asked = replace(settings(tmp_path, families=("vision_tower",)), resume=True, samples=2, eval_windows=2)
    with pytest.raises(Stopped):
        mptk.prune(str(tmp_path / "qwen"), tmp_path / "out", asked, progress=stop_at("write stock"))
    stages = []
    mptk.prune(str(tmp_path / "qwen"), tmp_path / "out", asked, progress=lambda stage, *_: stages.append(stage))
    assert "write stock" in stages
    assert not any(stage.startswith("score") for stage in stages)
    report = mptk.Report.read(tmp_path / "out")
    assert "an image (24 x 384)" in report.quality["protocol"]
    assert report.proof[-1]["stage"] == "reloaded with images of another size"
    assert not (tmp_path / "out.run").exists()


def test_the_loss_is_the_class_s_own_on_the_text(world):
    """Tokens of the image, and those that fill up a short caption, are not counted."""
    loaded = load(str(world / "llava"))
    task = bind_task(loaded)
    samples = task.draw_samples(loaded, settings(world), 2, lambda done, total: None)
    ids, targets = samples.inputs["input_ids"], samples.targets
    assert ids.shape[1] == PATCHES + 12
    caption = ids[0, PATCHES : PATCHES + 6]
    assert targets[0].tolist() == [IGNORED] * (PATCHES - 1) + [*caption.tolist()] + [IGNORED] * 7
    assert set(ids[0, PATCHES + 6 :].tolist()) <= set(caption.tolist())
    with torch.no_grad():
        found = loaded.model(**{name: x[:, : PATCHES + 6] if x.ndim == 2 else x for name, x in samples.inputs.items()})
        logits = found.logits[:, PATCHES - 1 : -1]
        own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, PATCHES : PATCHES + 6].flatten())
        loss = task.compute_loss(task.compute_output(loaded.model, samples), samples) / task.count_predictions(samples)
    assert float(loss) == pytest.approx(float(own), rel=1e-5)


def test_chats_name_images_in_turns_or_beside_them(world):
    loaded = load(str(world / "llava"))
    found = bind_task(loaded).draw_evaluation(loaded, settings(world, data=str(world / "chats.jsonl"), eval_windows=6))
    pictures = [Image.open(world / "pictures" / f"{colour}.png") for colour in COLOURS]
    shown = [processor()(text="<image>", images=picture, return_tensors="pt") for picture in pictures]
    assert torch.equal(found.inputs["pixel_values"], torch.cat([one["pixel_values"] for one in shown]))


def test_analyze_lists_the_parts_and_what_they_weigh(world, tmp_path):
    done("analyze", str(world / "llava"), "--json", str(tmp_path / "a.json"), "-q")
    parts = {row["name"]: row for row in json.loads((tmp_path / "a.json").read_text())["parts"]}
    modules = {"vision_tower": "vision_tower", "projector": "multi_modal_projector", "language_model": "language_model"}
    for name, module in modules.items():
        assert parts[name]["parameters"] == sum(p.numel() for p in getattr(llava().model, module).parameters())
    assert {"ffn.1", "vision_tower_layers"} <= set(parts["vision_tower"]["families"])
    assert {"ffn.2", "q_heads"} <= set(parts["language_model"]["families"])


def test_a_part_stands_for_its_families_that_can_be_cut():
    parts = ImageText().name_parts(llava())
    analysis = analyze_program(trace_loaded(Loaded(llava(), None, "llava", Path()), ImageText(), EXECUTOR))
    legal = StockTarget().find_legal(analysis, llava(), read_alignment("1"))
    assert expand_parts(("vision_tower",), analysis, legal, parts) == ("ffn.1",)
    found = expand_parts(("language_model", "ffn.1"), analysis, legal, parts)
    assert set(found) == {"kv_groups", "q_heads", "ffn.2", "ffn.1"}
    refused = replace(legal, ladders={**legal.ladders, "ffn.1": (80,)})
    with expect_error(AnalysisError, name="vision_tower"):
        expand_parts(("vision_tower",), analysis, refused, parts)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl", "idefics3"])
def test_a_trace_computes_what_the_class_does_at_any_text_length(model_type):
    """Sizes of images are numbers in it; images that could be blank are there; text may have another length."""
    model = tiny_model(PICTURED, model_type).model
    task = ImageText()
    loaded = Loaded(model, None, model_type, Path())
    program = trace_loaded(loaded, task, EXECUTOR)
    longer = task.find_inputs(model).draw_calibration(
        loaded, Settings(data="random", length=19), len(task.make_example(model)), lambda done, total: None
    )
    with torch.no_grad():
        expected = task.compute_output(model, Samples(longer))
        found = program(*longer.values())
    assert compare_outputs(model_type, found, expected, TOLERANCE).ok
    assert expected.shape[1] > 19


def test_a_cut_is_found_again_in_a_program_without_images():
    model = tiny_model(PICTURED, "llava").model
    task, loaded = ImageText(), Loaded(model, None, "llava", Path())
    whole = analyze_program(trace_loaded(loaded, task, EXECUTOR))
    ids = Samples({"input_ids": torch.arange(14).reshape(2, 7) + 20})
    text = analyze_program(trace_as_example(loaded, task, ids))
    family = next(f for f in whole.families if f.name == "ffn.2")
    keep = {g.layer: (tuple(range(i, 30 + i)),) for i, g in enumerate(family.groups)}
    plan = mptk.Plan({"ffn.2": mptk.FamilyPlan(30, 40, keep)})
    found = transfer_cut(resolve_plan(whole, plan), whole, text)
    own = next(f for f in text.families if f.name == "ffn")
    assert [found.list_units(g.axis) for g in own.groups] == [list(range(i, 30 + i)) for i in range(len(own.groups))]


def test_text_prunes_the_language_model_and_the_proof_shows_it_images(world, tmp_path):
    """The tower stays as it is, and the graphs of all parts are written."""
    text = str(world / "text")
    mptk.prune(str(world / "llava"), tmp_path / "out", settings(world, data=text, onnx=True, strict=True))
    report = mptk.Report.read(tmp_path / "out")
    assert "perplexity of the text of 4 samples, without images, 44 tokens predicted" in report.quality["protocol"]
    stages = [row["stage"] for row in report.proof]
    assert stages[-2:] == ["reloaded with images", "ONNX Runtime with images"]
    assert "ONNX Runtime decode" in stages
    dense, small = (
        t.AutoModelForImageTextToText.from_pretrained(folder).state_dict()
        for folder in (world / "llava", tmp_path / "out")
    )
    narrower = {name for name, weight in small.items() if weight.shape != dense[name].shape}
    assert narrower
    assert all("language_model" in name for name in narrower)
    assert all(torch.equal(weight, dense[n]) for n, weight in small.items() if "language_model" not in n)


def test_data_are_images_if_they_have_captions_or_chats_name_them(world):
    data = ("pictures", "empty", "chats.jsonl", "column.jsonl", "text", "plain.jsonl")
    assert [has_images(str(world / name)) for name in data] == [True] * 4 + [False] * 2


def test_a_run_on_text_goes_on_with_text():
    examples = ImageText().make_examples(llava())
    for example, names in zip(examples, (["input_ids", "pixel_values"], ["input_ids"]), strict=True):
        found = Samples.from_tensors(example.to_tensors("training"), examples, "training")
        assert [*found.inputs] == names


def test_text_reaches_no_tower_and_is_not_mixed_with_images(world):
    model, text = str(world / "llava"), str(world / "text")
    with expect_error(DataError, name="vision_tower"):
        mptk.prune(model, settings=settings(world, data=text, families=("vision_tower",)))
    with expect_error(InputError, name="eval_data"):
        mptk.prune(model, settings=settings(world, data=text, eval_data=str(world / "pictures")))


@pytest.mark.parametrize(
    ("spoil", "data", "kind", "about"),
    [
        (lambda at: (at / "pictures/metadata.csv").unlink(), "pictures", DataError, "pictures"),
        (lambda at: (at / "pictures/red.png").unlink(), "pictures", FileError, "red.png"),
        (lambda at: (at / "chats.jsonl").open("a").write(json.dumps(PLAIN)), "chats.jsonl", DataError, "chats.jsonl"),
        (lambda at: (at / "text.txt").write_text("a picture <image> is all " * 200), "text.txt", DataError, ""),
        (lambda at: processor(additional=3).save_pretrained(at / "llava"), "pictures", FileError, "processor_config"),
    ],
    ids=["no captions", "a picture less", "a chat without image", "marked text", "another processor"],
)
def test_wrong_data_is_refused(tmp_path, spoil, data, kind, about):
    write_llava(tmp_path / "llava")
    write_chats(tmp_path / "chats.jsonl", write_captions(tmp_path / "pictures"))
    spoil(tmp_path)
    loaded = load(str(tmp_path / "llava"))
    asked = replace(settings(tmp_path), data=str(tmp_path / data), samples=6)
    with expect_error(kind) as refused:
        bind_task(loaded).draw_samples(loaded, asked, 8, lambda done, total: None)
    assert about in refused.value.name


def test_an_encoder_decoder_and_a_decoder_are_other_kinds():
    task = ImageText()
    assert task.explain_refusal(t.LlamaConfig(), {t.LlamaForCausalLM}) is not None
    assert task.explain_refusal(t.T5Config(), {t.T5ForConditionalGeneration}) is not None
    assert task.explain_refusal(llava().config, {t.LlavaForConditionalGeneration}) is None
    blind = tiny_model("causal-lm", "gemma4").model
    assert blind.config.vision_config is None
    assert task.explain_refusal(blind.config, {type(blind)}) is not None
