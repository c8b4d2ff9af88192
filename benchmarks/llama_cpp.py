"""llama.cpp on SmolLM2-135M beside our ONNX graphs of the same weights, dense and narrower, taking turns in one process.

    python -m benchmarks.llama_cpp [--json FILE] [--quick] [--threads 1,2] [--rounds N] [--objective decode|prefill]

``pip install xllamacpp`` brings llama.cpp as a library. Its files are float32, Q8_0 and Q4_0 (the table Q8_0), beside our
float32, int8 and int4. Its own timings are read: of a prompt that no cache holds, and of the tokens after it. The latter hold
the sampling of a token (greedy), which ours do not. ``--quick``: the first four layers, one length, two rounds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gguf import GGMLQuantizationType as Kind
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.common import result_header, write_result
from benchmarks.gguf_file import write_gguf
from benchmarks.onnx import MODEL, NARROW, SHAPES, export, resized
from mptk.io import models
from mptk.ort.decoder import OrtDecoder
from mptk.ort.steps import Case, bind_decoder_step
from passes.pipelines import quantize_onnx

TOKEN = 1000
DECODED = 16
"""Tokens that llama.cpp decodes in a turn."""
STORED = {"": (Kind.F32, Kind.F32), "int8": (Kind.Q8_0, Kind.Q8_0), "int4": (Kind.Q4_0, Kind.Q8_0)}
"""Our scheme → llama.cpp's type of a matrix, and of the table, which is the output projection, too."""


def gguf_of(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, file: Path, scheme: str) -> Path:
    """``model`` as llama.cpp reads it, in the type that is nearest to ours of ``scheme``."""
    matrix, table = STORED[scheme]
    write_gguf(model, tokenizer, file, file.stem, lambda name: table if "embed_tokens" in name else matrix)
    return file


class LlamaCpp:
    """llama.cpp with a model and a number of threads."""

    def __init__(self, file: Path, threads: int, positions: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = positions, 1, 0
        params.n_batch = params.n_ubatch = 512
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup, params.verbosity = True, 0
        self.server = xllamacpp.Server(params)

    def milliseconds(self, length: int, new: int) -> tuple[float, float]:
        """Of a prompt of ``length`` tokens, and of each of ``new`` tokens after it."""
        asked = {"prompt": [TOKEN] * length, "max_tokens": new, "n_predict": new, "cache_prompt": False}
        found = self.server.handle_completions(asked | {"temperature": 0.0, "ignore_eos": True, "samplers": ["top_k"]})
        timings = found["timings"]
        assert timings["prompt_n"] == length, "the prompt was read anew"
        return timings["prompt_ms"], timings["predicted_per_token_ms"]


def llama_rows(
    ours: Path, theirs: Path, about: dict[str, Any], lengths: Sequence[int], threads: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """A row for each case. ``ratio``: of our time over theirs, the median of the rounds'."""
    rows = []
    for count in threads:
        decoder, other = OrtDecoder(ours, threads=count), LlamaCpp(theirs, count, max(lengths) + DECODED + 8)
        for length in lengths:
            for phase in ("prefill", "decode"):
                case = Case(phase, length, 1, count)
                rows.append(about | _beside(bind_decoder_step(decoder, case), other, case, rounds))
    return rows


def _beside(step: Callable[[], None], other: LlamaCpp, case: Case, rounds: int) -> dict[str, Any]:
    prefill = case.phase == "prefill"
    steps = 1 if prefill else DECODED

    def ours() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - start) / steps * 1000

    def theirs() -> float:
        prompt, token = other.milliseconds(case.length, steps)
        return prompt if prefill else token

    turns = [ours, theirs]
    found: dict[Callable[[], float], list[float]] = {turn: [] for turn in turns}
    for _ in range(rounds + 1):
        for turn in turns:
            found[turn].append(turn())
        turns.reverse()
    paired = list(zip(found[ours][1:], found[theirs][1:], strict=True))  # the first turns warm up
    return {
        "phase": case.phase,
        "length": case.length,
        "batch": 1,
        "threads": case.threads,
        "ms": round(statistics.median(a for a, _ in paired), 3),
        "theirs_ms": round(statistics.median(b for _, b in paired), 3),
        "ratio": round(statistics.median(a / b for a, b in paired), 4),
    }


def main(
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    quick: Annotated[bool, typer.Option("--quick")] = False,
    threads: Annotated[str, typer.Option()] = "1,2",
    rounds: Annotated[int, typer.Option()] = 12,
    objective: Annotated[str, typer.Option(help="what our graph is arranged for: decode or prefill")] = "decode",
) -> None:
    torch.set_num_threads(1)
    dense = models.load(MODEL).model
    if quick:
        dense, rounds, threads = resized(dense, num_hidden_layers=4), 2, "1"
    lengths = (128,) if quick else (128, 512)
    tokenizer, rows = models.load_tokenizer(MODEL), []
    with tempfile.TemporaryDirectory() as temporary:
        for name, model in (("dense", dense), (NARROW, resized(dense, **SHAPES[NARROW]))):
            folder = Path(temporary) / name.replace("/", "-")
            ours = export(model, folder, objective=objective)
            for scheme in STORED:
                graph = quantize_onnx(ours, scheme) if scheme else ours
                theirs = gguf_of(model, tokenizer, folder / f"{scheme or 'float32'}.gguf", scheme)
                about = {"model": name, "weights": scheme or "float32"}
                for row in llama_rows(graph, theirs, about, lengths, [int(n) for n in threads.split(",")], rounds):
                    print(row, flush=True)
                    rows.append(row)
                if json_file is not None:
                    write_result(
                        json_file,
                        {**result_header(), "model": MODEL, "quick": quick, "rounds": rounds, "objective": objective},
                        rows,
                    )


if __name__ == "__main__":
    typer.run(main)
