"""What fewer tokens cost: bits a byte of a dense model and of folders that keep some tokens, and greedy texts of both.

    python -m benchmarks.vocabulary --text FILE[,FILE] runs/few [--characters N] [--quick] [--json FILE]

Tokenizers differ, so perplexities a token do not compare; bits a byte do. Each text is read in the same pieces of 1,000
characters, each after the end-of-sequence token, so that every token of it is predicted. The folders run without mptk.
Greedy texts go on from the first 80 characters of pieces, by 24 tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.common import result_header, write_result
from mptk.features.vocabulary.convert import Tokens
from mptk.io import models
from mptk.ir import Plan

PIECE, PROMPT, PROMPTS, NEW = 1_000, 80, 8, 24
Runner = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def measured(name: str, runner: Runner, texts: dict[str, list[str]]) -> dict[str, Any]:
    """Tokens and parameters of a model; tokens and bits a byte of each text."""
    model, words = runner
    row: dict[str, Any] = {
        "model": name,
        "tokens": len(words),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    for text, parts in texts.items():
        nats = sum(loss(runner, part) for part in parts)
        count = sum(len(words(part, add_special_tokens=False).input_ids) for part in parts)
        row[text] = {"tokens": count, "bits a byte": round(nats / math.log(2) / len("".join(parts).encode()), 4)}
    return row


@torch.no_grad()
def loss(runner: Runner, text: str) -> float:
    """The negative log-likelihood of a text after the end-of-sequence token, in nats."""
    model, words = runner
    ids = torch.tensor([[words.eos_token_id, *words(text, add_special_tokens=False).input_ids]])
    logits = model(input_ids=ids[:, :-1]).logits[0]
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))


def greedy(whole: Runner, small: Runner, kept: tuple[int, ...], prompts: list[str]) -> dict[str, int]:
    """How many greedy texts of the dense model use kept tokens alone, and how many of these the small one writes."""
    found = {"greedy texts": len(prompts), "of kept tokens alone": 0, "of these the same": 0}
    for prompt in prompts:
        text = written(whole, prompt)
        if set(text) <= set(kept):
            found["of kept tokens alone"] += 1
            found["of these the same"] += [kept[i] for i in written(small, prompt)] == text
    return found


def written(runner: Runner, prompt: str) -> list[int]:
    model, words = runner
    ids = words(prompt, return_tensors="pt").input_ids
    made: list[int] = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0].tolist()
    return made


def main(
    folders: list[Path],
    text: Annotated[str, typer.Option(help="UTF-8 files, comma-separated")],
    model: str = "smollm2-135m",
    characters: Annotated[int, typer.Option(help="of each text")] = 40_000,
    quick: bool = False,
    json: Path | None = None,
) -> None:
    characters = PIECE if quick else characters
    contents = {Path(name).stem: Path(name).read_text()[:characters] for name in text.split(",")}
    texts = {name: [t[i : i + PIECE] for i in range(0, len(t), PIECE)] for name, t in contents.items()}
    loaded = models.load(model)
    assert loaded.tokenizer is not None
    whole: Runner = loaded.model, loaded.tokenizer
    rows = [measured(model, whole, texts)]
    print(rows[-1], flush=True)
    prompts = [part[:PROMPT] for parts in texts.values() for part in parts[: PROMPTS // len(texts)]]
    for folder in folders:
        small = AutoModelForCausalLM.from_pretrained(folder).float().eval(), AutoTokenizer.from_pretrained(folder)
        tokens = Tokens.read(Plan.load(folder / "plan.json").conversions["vocabulary"])
        rows.append(measured(folder.name, small, texts) | greedy(whole, small, tokens.keep, prompts))
        print(rows[-1], flush=True)
    if json is not None:
        write_result(json, result_header(), rows)


if __name__ == "__main__":
    typer.run(main)
