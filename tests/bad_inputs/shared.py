"""The folders that rows start from: tiny models, one of them pruned, an export, text, a GGUF file."""

from __future__ import annotations

from pathlib import Path

import torch
from toy_checkpoints import write_gguf
from transformers import GPT2Config, GPT2LMHeadModel

from mptk.api import graphs as api
from mptk.testing import make_llama, make_tokenizer
from tests.bad_inputs.table import run

SHORT = "--method magnitude --align 8 --samples 2 --length 16 --eval-windows 1 --eval-length 16 --no-onnx"


def write_folders(root: Path) -> None:
    """``model``: a LLaMA of 70 positions. ``gpt2``: an export of 16 positions. ``pruned``: of ``model``."""
    root.mkdir(exist_ok=True)
    model = make_llama(layers=1)
    model.save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    (root / "text.raw").write_text(" ".join(f"wizard {n} has {n * n} jars of honey\n" for n in range(60)))
    torch.manual_seed(0)
    config = GPT2Config(n_embd=24, n_head=2, n_layer=1, n_positions=16, vocab_size=300, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(root / "gpt2-dense")
    make_tokenizer().save_pretrained(root / "gpt2-dense")
    api.export_folder(str(root / "gpt2-dense"), root / "gpt2")
    write_gguf(model, make_tokenizer(), root / "toy.gguf")
    line = f"prune {root / 'model'} --data {root / 'text.raw'} --out {root / 'pruned'} {SHORT}"
    assert run(line.split()).code == 0
