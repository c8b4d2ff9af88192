"""Parts of diffusers pipelines: samples from the pipeline itself, and pruned folders that diffusers loads.

It reaches for mptk.tasks and mptk.features.diffusers: what a pipeline gives its denoiser is seen before any command runs.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from commands import done
from lab import fields
from pictures import VAE
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import mptk
from mptk import ProofError
from mptk.errors import FileError, InputError, ModelError, PackageError
from mptk.features.diffusers.latents import IMAGE_STEPS, record_samples
from mptk.io import load
from mptk.io.text.sources import SELF
from mptk.ir import join_outputs
from mptk.publish.manifest import write_manifest
from mptk.tasks import bind_task
from mptk.testing import expect_error

diffusers = pytest.importorskip("diffusers")

TOKENS, WIDTH, CLASSES = 9, 20, 1000
"""Of the text encoder; the class after the last is no class, as DiT's pipeline takes it."""
DIT = {"num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 3}
DIT |= {"sample_size": 8, "num_embeds_ada_norm": CLASSES, "norm_num_groups": 1}
PIXART = {**DIT, "norm_type": "ada_norm_single", "cross_attention_dim": 24, "caption_channels": WIDTH}
SD3 = {"sample_size": 8, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 6, "in_channels": 4}
SD3 |= {"out_channels": 4, "joint_attention_dim": WIDTH, "caption_projection_dim": 48, "pooled_projection_dim": 28}
SD3 |= {"pos_embed_max_size": 12}
FLUX = {"in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16}
FLUX |= {"num_attention_heads": 3, "joint_attention_dim": WIDTH, "pooled_projection_dim": 28}
FLUX |= {"axes_dims_rope": [4, 4, 8], "guidance_embeds": True}
UNET = {"sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
UNET |= {"attention_head_dim": 2, "cross_attention_dim": WIDTH}
UNET |= {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}
UNET |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}
SDXL = {**UNET, "addition_embed_type": "text_time", "addition_time_embed_dim": 8}
SDXL |= {"projection_class_embeddings_input_dim": 6 * 8 + 14}


WANDA = {"method": "wanda", "onnx": False, "progress": None}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """``classes``, of a DiT, and ``text``, of a UNet with a CLIP text encoder."""
    torch.manual_seed(0)
    folder, vae = tmp_path_factory.mktemp("pipelines"), diffusers.AutoencoderKL(**VAE)
    dit, scheduler = diffusers.DiTTransformer2DModel(**DIT), diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    diffusers.DiTPipeline(dit, vae, scheduler, id2label={0: "zero"}).save_pretrained(folder / "classes")
    words = tokenizer(folder)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(words), "max_position_embeddings": TOKENS, "eos_token_id": words.eos_token_id}
    encoder, unet = CLIPTextModel(CLIPTextConfig(**sizes)), diffusers.UNet2DConditionModel(**UNET)
    safety = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    text = diffusers.StableDiffusionPipeline(vae, encoder, words, unet, scheduler, **safety)
    text.save_pretrained(folder / "text")
    (folder / "prompts.txt").write_text("a cat\n\nthe sea\n")
    return folder


def tokenizer(folder: Path) -> CLIPTokenizer:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    known = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(known)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS)


@pytest.fixture(scope="module")
def shallow(pipelines, tmp_path_factory):
    """The DiT with a layer less, cut on what its own pipeline gives it."""
    out = tmp_path_factory.mktemp("runs") / "shallow"
    asked = {"sparsity": 0.45, "tolerance": 0.1, "families": ("layers",), "samples": 8, "eval_windows": 4}
    mptk.prune(str(pipelines / "classes/transformer"), out, **WANDA, **asked)
    return out


def test_diffusers_loads_the_whole_pipeline_with_the_smaller_part(shallow, pipelines):
    report = mptk.Report.read(shallow)
    assert report.families["layers"] == {"of": 3, "width": 2, "layers": 1}
    assert report.config_changes == {"num_layers": [3, 2]}
    assert {row["stage"] for row in report.proof} >= {"config", "stored weights", "reloaded checkpoint"}
    assert 0 < report.quality["pruned"] < 1
    pipeline = diffusers.DiffusionPipeline.from_pretrained(shallow, use_safetensors=True)
    assert len(pipeline.transformer.transformer_blocks) == 2
    assert pipeline([0], num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    card = (shallow / "README.md").read_text()
    for said in ("library_name: diffusers", "import DiffusionPipeline", "DiffusionPipeline.from_pretrained(folder)"):
        assert said in card


def test_the_part_in_memory_is_a_diffusers_model_that_saves_itself_as_one(shallow, tmp_path):
    model = mptk.Pruned.open(shallow).model
    assert isinstance(model, diffusers.DiTTransformer2DModel)
    model.save_pretrained(tmp_path)
    inputs = bind_task(load(str(shallow))).make_example(model).inputs
    with torch.no_grad():
        found = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)(**inputs)[0]
        assert found.equal(model(**inputs)[0])


def test_verify_compares_the_other_parts_with_the_dense_pipeline(shallow, tmp_path):
    assert all(stage.ok for stage in mptk.verify(shallow))
    copy = shutil.copytree(shallow, tmp_path / "copy")
    fields("scheduler/scheduler_config.json", beta_schedule="scaled_linear")(copy)
    write_manifest(copy)
    with expect_error(ProofError, name="config"):
        mptk.verify(copy)


def test_samples_are_what_the_pipeline_gives_its_denoiser(pipelines):
    loaded = load(str(pipelines / "text/unet"))
    task = bind_task(loaded)
    like = task.make_example(loaded.model).inputs
    found = record_samples(loaded, like, str(pipelines / "prompts.txt"), 2 * IMAGE_STEPS, 0, lambda done, total: None)
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "sample": (2 * IMAGE_STEPS, 4, 8, 8),
        "timestep": (2 * IMAGE_STEPS,),
        "encoder_hidden_states": (2 * IMAGE_STEPS, TOKENS, WIDTH),
    }
    times = found["timestep"].unique()
    assert len(times) == IMAGE_STEPS  # one image takes as many steps, each with the prompt and without
    assert times.diff().unique().numel() == 1
    for time in times:
        with_prompt, without = found["sample"][found["timestep"] == time]
        assert with_prompt.equal(without), "both are called with the same latents"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(pipelines / "text")
    prompt, empty = pipeline.encode_prompt("a cat", "cpu", 1, True)
    rows = found["encoder_hidden_states"]
    assert sorted(int((rows == text).flatten(1).all(1).sum()) for text in (prompt, empty)) == [IMAGE_STEPS, IMAGE_STEPS]


def test_heads_and_feed_forward_are_cut_together_where_one_field_sets_them(tmp_path):
    diffusers.SD3Transformer2DModel(**SD3).save_pretrained(tmp_path / "dense")
    out = tmp_path / "small"
    mptk.prune(str(tmp_path / "dense"), out, sparsity=0.3, data="random", samples=4, eval_windows=2, **WANDA)
    config = diffusers.SD3Transformer2DModel.from_pretrained(out).config
    assert (config.num_attention_heads, config.caption_projection_dim) == (5, 40)
    assert not (out / "model_index.json").exists()


def test_a_stock_autoencoder_keeps_its_groups_of_channels(pipelines):
    legal = json.loads(done("analyze", pipelines / "classes/vae", "--json", "-").stdout)
    groups = [row for row in legal["families"] if "in as many groups" in str(row["refused"])]
    assert groups
    assert all(row["width"] == VAE["norm_num_groups"] for row in groups)
    joint = [row for row in legal["families"] if row["legal_widths"] == [1, 2, 3] and row["together"]]
    assert joint, "channels in each group of the first stage, together"
    groups = [group for f in mptk.analyze(load(str(pipelines / "classes/vae")).model).families for group in f.groups]
    cut = {member.weight for group in groups for member in group.members if member.role == "producer"}
    assert "encoder.conv_in.weight" in cut
    assert cut.isdisjoint({"quant_conv.weight", "decoder.conv_out.weight"}), "the latents stay"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DiTTransformer2DModel", DIT),
        ("PixArtTransformer2DModel", {**PIXART, "use_additional_conditions": True}),
        ("SD3Transformer2DModel", SD3),
        ("FluxTransformer2DModel", FLUX),
        ("UNet2DConditionModel", UNET),
        ("UNet2DConditionModel", SDXL),
        ("AutoencoderKL", VAE),
    ],
)
def test_random_samples_are_what_the_class_reads(name, config, tmp_path):
    getattr(diffusers, name)(**config).save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    samples = bind_task(loaded).make_example(loaded.model)
    with torch.no_grad():
        output = bind_task(loaded).compute_output(loaded.model, samples)
    assert join_outputs(output).isfinite().all()
    if "timestep" in samples.inputs:
        apart = samples.map(lambda tensor: tensor.flip(0)).inputs["timestep"] != samples.inputs["timestep"]
        assert apart.all(), "the timesteps are spread"


def test_a_part_is_loaded_with_diffusers_and_no_pipeline_as_a_whole(pipelines, monkeypatch):
    with expect_error(FileError, name=pipelines / "text"):
        load(str(pipelines / "text"))
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as if it were not installed
    with expect_error(PackageError, name="diffusers"):
        load(str(pipelines / "text/unet"))


def test_samples_need_prompts_and_a_pipeline_without_code(pipelines, tmp_path):
    def record(folder):
        loaded = load(str(folder))
        like = bind_task(loaded).make_example(loaded.model).inputs
        record_samples(loaded, like, SELF, 1, 0, lambda done, total: None)

    with expect_error(InputError, name="data"):
        record(pipelines / "text/unet")
    load(str(pipelines / "text/unet")).model.save_pretrained(tmp_path / "unet")
    with expect_error(FileError):
        record(tmp_path / "unet")
    shutil.copytree(pipelines / "text", tmp_path / "text")
    (tmp_path / "text/pipeline.py").write_text("raise SystemExit('ran')")
    with expect_error(ModelError):
        record(tmp_path / "text/unet")
