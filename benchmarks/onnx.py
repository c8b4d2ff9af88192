"""ONNX Runtime on SmolLM2-135M: graphs of the dense and of three narrower models, plain, int8 and int4, and rivals.

    python -m benchmarks.onnx [--json FILE] [--plot FILE] [--quick] [--threads 1,2] [--rounds N] [--long]

The narrower models keep the first heads and channels, since which ones does not matter for speed. Graphs give the
logits of the last position; ``dense, all logits`` shows what the others cost, ``dense, for prefill`` what is exported
with ``--objective prefill``. Rivals: the graphs that onnxruntime-genai's builder makes of the same checkpoints (``pip
install onnxruntime-genai``), each beside ours alone, in four times as many rounds and twice as many sets of sessions;
and PyTorch, eager and compiled. ``caller``: what `mptk generate` adds to the session's own time a token. ``--long``: also
2048 tokens and batches of 8, for the dense and the narrow graphs and their int8. ``--quick``: the first four layers, one
length, two rounds.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.common import result_header, write_result
from benchmarks.onnx_rivals import LEFT_OUT, caller_rows, genai, genai_rows, torch_rows
from mptk.io import models
from mptk.ort.bench import Bench, bench_graphs
from mptk.report.page.charts import write_bench_plot
from mptk.report.sections import build_bench_view
from mptk.report.view import render_markdown
from passes.frontend.trace_decoder import LogitsScope, trace_decoder
from passes.pipelines import emit_onnx, quantize_onnx

MODEL = "smollm2-135m"
SHAPES = {
    "6/2 heads, ffn 1024": {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1024},
    "3/1 heads, ffn 1216": {"num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 1216},
    "9/3 heads, ffn 928": {"intermediate_size": 928},
}
NARROW = next(iter(SHAPES))


@torch.no_grad()
def resized(model: PreTrainedModel, **sizes: int) -> PreTrainedModel:
    """A model of the same class with other sizes in its config and the first rows and columns of each weight."""
    config = type(model.config)(**{**model.config.to_dict(), **sizes})
    result: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    weights = model.state_dict()
    for name, parameter in result.named_parameters():
        parameter.copy_(weights[name][tuple(slice(size) for size in parameter.shape)])
    return result


def export(model: PreTrainedModel, folder: Path, logits: LogitsScope = "last", objective: str = "decode") -> Path:
    start = time.perf_counter()
    program = trace_decoder(model, logits=logits)
    traced = time.perf_counter()
    file = emit_onnx(program, folder, objective=objective)
    print(
        f"{folder.name}: traced in {traced - start:.0f} s, emitted in {time.perf_counter() - traced:.0f} s", flush=True
    )
    return file


def graphs_of(dense: PreTrainedModel, folder: Path) -> dict[str, Path]:
    narrow = {name: resized(dense, **sizes) for name, sizes in SHAPES.items()}
    found = {"dense": export(dense, folder / "dense"), "dense, all logits": export(dense, folder / "all", "all")}
    found |= {name: export(model, folder / name.replace("/", "-")) for name, model in narrow.items()}
    for name in ("dense", NARROW):
        found |= {f"{name}, {scheme}": quantize_onnx(found[name], scheme) for scheme in ("int8", "int4")}
    found["dense, for prefill"] = export(dense, folder / "prefill", objective="prefill")
    found["dense, for prefill, int8"] = quantize_onnx(found["dense, for prefill"], "int8")
    return found


def genai_of(dense: PreTrainedModel, folder: Path) -> dict[str, Path]:
    """Name of our graph → genai's."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        print("no onnxruntime-genai here: its graphs are left out")
        return {}
    tokenizer, found = models.load_tokenizer(MODEL), {}
    for name, model in (("dense", dense), (NARROW, resized(dense, **SHAPES[NARROW]))):
        for precision, suffix in (("fp32", ""), ("int8", ", int8")):
            place = folder / f"genai-{name.replace('/', '-')}-{precision}"
            found[name + suffix] = genai(model, tokenizer, place, precision)
    found |= {f"dense, for prefill{suffix}": found[f"dense{suffix}"] for suffix in ("", ", int8")}
    return found


def rows_of(result: Bench) -> list[dict[str, Any]]:
    return [
        {
            "graph": row.graph,
            **asdict(row.case),
            **{key: value for key, value in asdict(row).items() if key not in ("graph", "case")},
            "over_ideal": round(row.ratio / row.ideal, 3),
        }
        for row in result.rows
    ]


def main(
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    plot: Annotated[Path | None, typer.Option()] = None,
    quick: Annotated[bool, typer.Option("--quick")] = False,
    long: Annotated[bool, typer.Option("--long")] = False,
    threads: Annotated[str, typer.Option()] = "1,2",
    rounds: Annotated[int, typer.Option()] = 5,
) -> None:
    torch.set_num_threads(1)
    dense = models.load(MODEL).model
    if quick:
        dense, rounds, threads = resized(dense, num_hidden_layers=4), 2, "1"
    counts = tuple(map(int, threads.split(",")))
    lengths = (128,) if quick else (128, 512)
    with tempfile.TemporaryDirectory() as temporary:
        graphs, theirs = graphs_of(dense, Path(temporary)), genai_of(dense, Path(temporary))

        def progress(stage: str, done: int, total: int) -> None:
            print(f"  {stage} {done}/{total}", flush=True)

        how: dict[str, Any] = {"lengths": lengths, "threads": counts, "progress": progress}
        result = bench_graphs(graphs, rounds=rounds, sessions=rounds, **how)
        beside = []
        for name, file in theirs.items():
            about = {"graph": name, "beside": "genai"}
            beside += genai_rows(graphs[name], file, about, rounds=4 * rounds, sessions=2 * rounds, **how)
        quantised = [(name, graphs[name]) for name in ("dense, int8", f"{NARROW}, int8")]
        beside += caller_rows(quantised, models.load_tokenizer(MODEL), lengths[0], rounds)
        beside += torch_rows(dense, graphs["dense"], lengths, counts, rounds)
        rows = rows_of(result) + beside
        print(render_markdown(build_bench_view(result)))
        for row in beside:
            print(row, flush=True)
        if long:
            few = {name: graphs[name] for name in ("dense", NARROW, "dense, int8", f"{NARROW}, int8")}
            for batch, many in ((1, (2048,)), (8, (128, 512))):
                more = bench_graphs(few, lengths=many, batches=(batch,), threads=counts[:1], rounds=3)
                print(render_markdown(build_bench_view(more)))
                rows += rows_of(more)
    if plot is not None:
        write_bench_plot(result, plot)
    if json_file is not None:
        peaks = {count: asdict(found) for count, found in result.peaks.items()}
        sizes = [{"graph": g.name, "bytes": g.bytes, "memory": g.memory} for g in result.graphs]
        header = {**result_header(), "model": MODEL, "shapes": SHAPES, "quick": quick, "peaks": peaks, "sizes": sizes}
        header["left_out"] = LEFT_OUT
        write_result(json_file, header, rows)


if __name__ == "__main__":
    typer.run(main)
