"""How long the int8 graph of a pruned folder writes what its float graph writes, for blocks and levels of accuracy.

    python -m benchmarks.agreement runs/ffn --data FILE [--prompts N] [--quick] [--json FILE]

The float graph goes on greedily from the first tokens of N windows of a text, by 64 tokens. Every quantised graph reads
these texts; the first token where its own choice is another one is where its text would part. Logits are compared at
the same positions. Decode is timed beside the float graph, after the prompt, in alternating rounds of processor time.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import typer

from benchmarks.common import result_header, write_result
from mptk.io import data
from mptk.ort.decoder import Ids, LogitsArray, OrtDecoder
from mptk.ort.generation import TextGenerator, generate_tokens
from passes.pipelines import quantize_onnx
from passes.targets.onnx import block_weights

PROMPT, NEW, ROUNDS = 16, 64, 5
VARIANTS = {
    "blocks of 32": (32, 4),
    "blocks of 64": (64, 4),
    "blocks of 128": (128, 4),
    "blocks of 256": (256, 4),
    "blocks of 128, products in float32": (128, 1),
}
"""Name → inputs that share a scale, accuracy level of MatMulNBits. Its blocks have at most 256 inputs, so it has no scale
for each whole output."""


@contextmanager
def variant(block: int, level: int) -> Iterator[None]:
    """Within it ``quantize_onnx`` makes int8 graphs of such blocks."""
    with patch.object(block_weights, "WIDE_BLOCK", block), patch.object(block_weights, "ACCURACY_LEVEL", level):
        yield


def written(decoder: OrtDecoder, prompts: list[list[int]]) -> Ids:
    """The prompts with the tokens that follow greedily, [prompts, PROMPT + NEW]."""
    steps = [
        [token for token in tokens if token is not None] for tokens in generate_tokens(decoder, prompts, limit=NEW)
    ]
    return np.concatenate([np.array(prompts), np.array(steps).T], axis=1)


def logits_of(decoder: OrtDecoder, texts: Ids) -> LogitsArray:
    """Logits of the positions whose next token was written, [texts, NEW, vocabulary]."""
    rows = [decoder.compute_logits(text[None])[0, PROMPT - 1 : -1] for text in texts]
    return np.stack(rows)


def compared(found: LogitsArray, expected: LogitsArray) -> dict[str, Any]:
    """Tokens before the first other choice, and differences of logits."""
    same = found.argmax(-1) == expected.argmax(-1)
    first = np.where(same.all(1), same.shape[1], same.argmin(1)).tolist()
    apart = np.abs(found - expected)
    return {
        "tokens, median": statistics.median(first),
        "tokens, mean": round(statistics.fmean(first), 1),
        "whole texts": int(same.all(1).sum()),
        "same choices": round(float(same.mean()), 4),
        "logits, mean": round(float(apart.mean()), 3),
        "logits, largest": round(float(apart.max()), 2),
    }


def step_seconds(decoder: OrtDecoder, text: Ids) -> float:
    """Processor time of a decoding step, one token after the other."""
    _, cache = decoder.prefill(text[None, :PROMPT])
    start = time.process_time()
    for token in text[PROMPT:]:
        _, cache = decoder.decode(np.array([[token]]), cache)
    return (time.process_time() - start) / NEW


def main(
    folder: Path,
    data_file: Annotated[str, typer.Option("--data")],
    prompts: int = 50,
    quick: bool = False,
    json: Path | None = None,
) -> None:
    """``quick``: two prompts and blocks of 128."""
    variants, prompts = (dict(list(VARIANTS.items())[2:3]), 2) if quick else (VARIANTS, prompts)
    generator = TextGenerator(folder / "onnx" / "model.onnx")
    windows = data.load_evaluation_windows(generator.tokenizer, data_file, PROMPT, prompts)
    float_graph = OrtDecoder(folder / "onnx", threads=1)
    texts = written(float_graph, windows.tolist())
    expected = logits_of(float_graph, texts)
    rows = list[dict[str, Any]]()
    for name, (block, level) in variants.items():
        with tempfile.TemporaryDirectory() as place, variant(block, level):
            source = Path(shutil.copytree(folder / "onnx", Path(place) / "onnx")) / "model.onnx"
            graph = quantize_onnx(source, "int8")
            decoder = OrtDecoder(graph, threads=1)
            pairs = [(step_seconds(float_graph, texts[0]), step_seconds(decoder, texts[0])) for _ in range(ROUNDS)]
            speed = statistics.median(plain / own for plain, own in pairs)
            size = sum(part.stat().st_size for part in source.parent.glob(f"{graph.name}*"))
            row = {"graph": name, **compared(logits_of(decoder, texts), expected)}
        rows.append({**row, "decode, times float": round(speed, 2), "MB": round(size / 1e6)})
        print(rows[-1], flush=True)
    if json is not None:
        write_result(json, {**result_header(), "folder": folder.name, "prompts": prompts, "new": NEW}, rows)


if __name__ == "__main__":
    typer.run(main)
