"""A tiny LLaVA, a tiny Qwen2-VL and a tiny CLIP with their processors, and pictures with captions."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from benchmarks.tiny_models import tiny_model
from benchmarks.tiny_wrappers import PICTURED

COLOURS = ("red", "green", "blue", "white", "grey", "black")
WORDS = ("<unk>", "<pad>", "<image>", "a", "picture", "that", "is", "all", "user", "assistant", *COLOURS)
IMAGE, PATCHES = 2, 16
"""The token of images, and how many of them stand for one."""

VAE: dict[str, Any] = {
    "block_out_channels": [12, 24],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
"""The config of a tiny AutoencoderKL."""


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    made.image_token, made.image_token_id = "<image>", IMAGE
    return made


def llava() -> LlavaForConditionalGeneration:
    """Vision: hidden 48, 4 heads, ffn 80, 3 layers, 32 pixels. Text: hidden 64, 4 heads on 2, ffn 96, 2 layers."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=48, num_attention_heads=4, intermediate_size=80, num_hidden_layers=3, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        num_hidden_layers=2,
        max_position_embeddings=128,
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))
    return model.eval()


def processor(additional: int = 1) -> LlavaProcessor:
    """``additional``: tokens of an image beside its patches; 1 is right for the model."""
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(
        images,
        tokenizer(),
        patch_size=8,
        num_additional_image_tokens=additional,
        vision_feature_select_strategy="default",
    )


def write_llava(folder: Path) -> Path:
    """A checkpoint of ``llava`` with its processor."""
    llava().save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


START, END = 16, 17
"""The tokens around a text of ``clip_processor``."""


def clip() -> CLIPModel:
    """Text: hidden 40, 5 heads, ffn 72, 2 layers. Vision: hidden 48, 4 heads, ffn 80, 3 layers. Embeddings of 28."""
    torch.manual_seed(0)
    text = {
        "vocab_size": len(WORDS) + 2,
        "hidden_size": 40,
        "num_attention_heads": 5,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "max_position_embeddings": 20,
        "bos_token_id": START,
        "eos_token_id": END,
    }
    vision = {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "image_size": 32,
        "patch_size": 8,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=28)).eval()


def clip_processor() -> CLIPProcessor:
    words = {**{word: i for i, word in enumerate(WORDS)}, "<s>": START, "</s>": END}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<s>", START), ("</s>", END)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=20, **special)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return CLIPProcessor(images, made)


TEMPLATE = (
    "{% for turn in messages %}{% for part in turn['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|> <|image_pad|> <|vision_end|> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
)


def write_qwen(folder: Path) -> Path:
    """A tiny Qwen2-VL of the zoo, whose processor keeps the size of a picture: 8 pixels a patch, 4 patches a token."""
    model = tiny_model(PICTURED, "qwen2_vl").model
    config: Any = model.config
    words = {i: f"w{i}" for i in range(config.text_config.vocab_size)}
    words |= dict(enumerate([*WORDS[3:], "<unk>", "<pad>"], 20))
    marks = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    marks |= {f"vision_{side}_token": f"<|vision_{side}|>" for side in ("start", "end")}
    words |= {getattr(config, f"{name}_id"): mark for name, mark in marks.items()}
    backend = Tokenizer(models.WordLevel({word: i for i, word in words.items()}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": list(marks.values())})
    sizes = {"shortest_edge": 256, "longest_edge": 4096}
    images = Qwen2VLImageProcessor(patch_size=8, temporal_patch_size=2, merge_size=2, size=sizes)
    model.save_pretrained(folder)
    Qwen2VLProcessor(images, made, Qwen2VLVideoProcessor(), chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def write_captions(folder: Path, width: int = 40) -> Path:
    """A folder as ``imagefolder`` of datasets has it: a picture of each colour, 32 pixels high, with a caption."""
    folder.mkdir()
    with (folder / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text"])
        for colour in COLOURS:
            Image.new("RGB", (width, 32), colour).save(folder / f"{colour}.png")
            rows.writerow([f"{colour}.png", f"a picture that is all {colour}"])
    return folder


def write_chats(file: Path, folder: Path) -> Path:
    """A chat a line about each picture of ``folder``; images are named in the turns, or in a column beside them."""
    with file.open("w") as lines:
        for i, colour in enumerate(COLOURS):
            path = str(folder / f"{colour}.png")
            image = {"type": "image", "path": path} if i % 2 else {"type": "image"}
            turns = [
                {"role": "user", "content": [image, {"type": "text", "text": "is a"}]},
                {"role": "assistant", "content": f"all {colour}"},
            ]
            row = {"messages": turns} if i % 2 else {"messages": turns, "images": [path]}
            lines.write(json.dumps(row) + "\n")
    return file
