"""What the ONNX graphs are compared with: onnxruntime-genai's own, PyTorch eager and compiled; and the caller's work."""

from __future__ import annotations

import io
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from mptk.ort.bench import bench_graphs, time_alternately
from mptk.ort.decoder import OrtDecoder
from mptk.ort.generation import generate_tokens
from mptk.ort.steps import Case, bind_decoder_step

GENAI = {"fp32": "prune_lm_head=true", "int8": "prune_lm_head=true block_size=128"}
LEFT_OUT = {
    "optimum-onnx": "its last release (0.1.0) needs transformers<4.58, which the rest here cannot run on",
    "torch.compile, decode": "a cache that grows is compiled anew at each step: 5 s a token with four layers",
}
NEW_TOKENS = 64


def genai(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, precision: str) -> Path:
    """What onnxruntime-genai's builder makes of the checkpoint."""
    source = folder.with_name(f"{folder.name}-checkpoint")
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    words = ["-i", source, "-o", folder, "-p", precision, "-e", "cpu", "-c", folder.with_name("cache")]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    options = ["--extra_options", *GENAI[precision].split()]
    subprocess.run([*builder, *map(str, words), *options], check=True, capture_output=True)
    file = folder / "model.onnx"
    graph = onnx.load(file, load_external_data=False)
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "kv_cache_dim":
                dim.dim_value = model.config.head_dim
    onnx.save(graph, file)
    return file


def genai_rows(ours: Path, theirs: Path, about: dict[str, Any], **how: Any) -> list[dict[str, Any]]:
    """Our graph beside genai's of the same model and precision, only these two taking turns (``bench_graphs``).

    ``ratio``: of our time over theirs, the median of the rounds'.
    """
    rows = bench_graphs({"genai": theirs, "ours": ours}, **how).rows
    return [about | asdict(row.case) | {"ms": row.ms, "ratio": row.ratio} for row in rows if row.graph == "ours"]


def torch_rows(
    model: PreTrainedModel, file: Path, lengths: Sequence[int], threads: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """PyTorch beside the dense graph, taking turns: eager, and compiled for the shortest prompt only.

    Prefill, and (eager only) a step after it; both compute the last position's logits alone.
    """
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        decoder = OrtDecoder(file, threads=count)
        for length in lengths:
            for name, phase in (
                ("PyTorch eager, dense", "prefill"),
                ("PyTorch eager, dense", "decode"),
                *([("torch.compile, dense", "prefill")] if length == min(lengths) else []),
            ):
                row = {"graph": name, "phase": phase, "length": length, "batch": 1, "threads": count}
                rows.append(row | _beside(decoder, model, row, rounds))
    torch.set_num_threads(1)
    return rows


@torch.no_grad()
def _beside(decoder: OrtDecoder, model: PreTrainedModel, row: dict[str, Any], rounds: int) -> dict[str, Any]:
    """``ratio``: PyTorch's time over ours, the median of the rounds'; or why there is none."""
    ids = torch.zeros(1, row["length"], dtype=torch.long)
    called: Any = torch.compile(model, dynamic=False) if row["graph"].startswith("torch.compile") else model
    if row["phase"] == "prefill":
        ours: Callable[[], Any] = lambda: decoder.prefill(ids.numpy())  # noqa: E731
        theirs: Callable[[], Any] = lambda: called(input_ids=ids, logits_to_keep=1, use_cache=True)  # noqa: E731
    else:
        _, cached = decoder.prefill(ids.numpy())
        ours = lambda: decoder.decode(ids[:, :1].numpy(), cached)  # noqa: E731
        theirs = torch_step(model, ids)
    try:
        times = time_alternately([ours, theirs], rounds)
    except (TorchDynamoException, InductorError) as error:
        return {"ms": None, "ratio": None, "reason": str(error).strip().split("\n")[0]}
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    return {"ms": round(statistics.median(times[1]), 3), "ratio": round(ratio, 4)}


def torch_step(model: PreTrainedModel, ids: torch.Tensor) -> Callable[[], Any]:
    """One decoding step after ``ids``: the cache is cut back after each."""
    cache = DynamicCache()
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step() -> None:
        model(ids[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-1)

    return step


def caller_rows(
    graphs: Iterable[tuple[str, Path]], tokenizer: PreTrainedTokenizerBase, length: int, rounds: int
) -> list[dict[str, Any]]:
    """What `mptk generate` adds to the session's own time a token, streaming included, after ``length`` tokens.

    Its loop and bare steps in the middle of its lengths take turns. One thread. ``overhead``: the median of the
    rounds; ``least``: of the fastest rounds of each.
    """
    rows = []
    for name, file in graphs:
        decoder = OrtDecoder(file, threads=1)
        step = bind_decoder_step(decoder, Case("decode", length + NEW_TOKENS // 2, 1, 1))
        loops, bare = [], []
        for _ in range(rounds + 1):
            loops.append(_loop(decoder, tokenizer, length))
            start = time.perf_counter()
            for _ in range(NEW_TOKENS):
                step()
            bare.append(time.perf_counter() - start)
        overhead = statistics.median(a / b for a, b in zip(loops[1:], bare[1:], strict=True)) - 1
        row = {"graph": name, "phase": "caller", "length": length, "batch": 1, "threads": 1}
        rows.append({**row, "overhead": round(overhead, 4), "least": round(min(loops) / min(bare) - 1, 4)})
    return rows


def _loop(decoder: OrtDecoder, tokenizer: PreTrainedTokenizerBase, length: int) -> float:
    """Seconds that ``NEW_TOKENS`` tokens take after the first."""
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    steps = generate_tokens(decoder, [[1000] * length], limit=NEW_TOKENS + 1)
    with redirect_stdout(io.StringIO()):
        next(steps)
        start = time.perf_counter()
        for (token,) in steps:
            streamer.put(np.array([token]))
        return time.perf_counter() - start
