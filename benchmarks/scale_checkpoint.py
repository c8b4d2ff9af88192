"""Llama-shaped bf16 checkpoints of any size, with random weights, a tiny tokenizer, a text and a plan.

    python -m benchmarks.scale_checkpoint FOLDER --layers N --hidden N --ffn N --heads N --kv-heads N --vocab N

One shard is in memory at a time. A seed gives the same bytes on every machine. `shape.json` has the sizes that the
bounds of `benchmarks.scale` are made of, `plan.json` a cut of the FFN to 5/8, `text.txt` words for `--data`.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

import mptk
from benchmarks.zoo_plans import plan_of_widths
from mptk.distributed.processes import find_module_blocks
from mptk.files import write_json
from mptk.io import save_tokenizer

WORDS = (
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "seven",
    "wizards",
    "mix",
    "pale",
    "jars",
    "of",
    "honey",
)
CHARACTERS = 200_000
SHARD_BYTES = 1 << 30


def config_of(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def skeleton(config: LlamaConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()


def shape_of(model: PreTrainedModel) -> dict[str, int]:
    """Parameters, bytes in bf16, and bytes in float32 of the largest block and the largest tensor."""
    sizes = [p.numel() for p in model.parameters()]
    largest = max(sum(p.numel() for p in block.parameters()) for block in find_module_blocks(model))
    return {
        "parameters": sum(sizes),
        "bytes": 2 * sum(sizes),
        "block_bytes": 4 * largest,
        "tensor_bytes": 4 * max(sizes),
    }


def shards(model: PreTrainedModel, most: int) -> Iterator[list[str]]:
    """Names of the tensors of each shard of at most ``most`` bytes, in the model's order."""
    names: list[str] = []
    size = 0
    for name, tensor in model.state_dict().items():
        if names and size + 2 * tensor.numel() > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += 2 * tensor.numel()
    yield names


def random_tensor(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Norms are ones. Matrices keep the size of what goes through them."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    rows = [torch.randn(part, shape[1], generator=generator) for part in _parts(shape[0])]
    return torch.cat([(part / math.sqrt(shape[1])).to(torch.bfloat16) for part in rows])


def _parts(rows: int, size: int = 1024) -> list[int]:
    return [min(size, rows - first) for first in range(0, rows, size)]


def write_weights(model: PreTrainedModel, folder: Path, seed: int, shard_bytes: int) -> None:
    """The shards and their index, as transformers names them."""
    state, parts = model.state_dict(), list(shards(model, shard_bytes))
    index: dict[str, str] = {}
    for number, names in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        tensors = {name: random_tensor(state[name].shape, generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    if len(parts) > 1:
        total = sum(2 * tensor.numel() for tensor in state.values())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens; a model's vocabulary may be larger."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def write_text(file: Path, seed: int, characters: int) -> str:
    """Sentences of random words: enough for calibration and for the perplexity."""
    rng, lines, size = random.Random(seed), [], 0
    while size < characters:
        lines.append(" ".join(rng.choices(WORDS, k=12)).capitalize() + ".")
        size += len(lines[-1])
    file.write_text(text := "\n".join(lines))
    return text


def make_checkpoint(
    folder: Path, config: LlamaConfig, seed: int = 0, *, shard_bytes: int = SHARD_BYTES, characters: int = CHARACTERS
) -> None:
    """Write everything; `shape.json` comes last and says that the folder is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    model = skeleton(config)
    config.save_pretrained(folder)
    save_tokenizer(tokenizer(write_text(folder / "text.txt", seed, characters)), folder)
    write_weights(model, folder, seed, shard_bytes)
    width = config.intermediate_size * 5 // 8 // 32 * 32
    plan_of_widths(mptk.analyze(model), {"ffn": width}, random.Random(seed)).save(folder / "plan.json")
    write_json(folder / "shape.json", shape_of(model))


def main(
    folder: Path,
    layers: int = 2,
    hidden: int = 512,
    ffn: int = 1408,
    heads: int = 8,
    kv_heads: int = 2,
    vocab: int = 1000,
    seed: int = 0,
    config_only: Annotated[bool, typer.Option("--config-only", help="No weights: for --estimate.")] = False,
) -> None:
    config = config_of(layers, hidden, ffn, heads, kv_heads, vocab)
    if config_only:
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        write_json(folder / "shape.json", shape_of(skeleton(config)))
    else:
        make_checkpoint(folder, config, seed)
    print(json.dumps(json.loads((folder / "shape.json").read_text())))


if __name__ == "__main__":
    typer.run(main)
