"""What types cost in quality: mptk's int8 and int4 beside ONNX Runtime's own quantisers and llama.cpp's files.

    python -m benchmarks.rounding --text FILE --calibration FILE [--models smollm2-135m,gemma3-270m,runs/cut] [--windows 16]
        [--json FILE]

Every row is the perplexity of the same windows of 512 tokens, in the product that runs the file. ``--models``: packaged names, or
folders that mptk made. ``--calibration``: what mptk's int4 is rounded for, as `--data` in `mptk export`; the others have no
such text. ``pip install llama-cpp-python`` builds llama.cpp. Its quantiser makes its types of a float32 file of
the same weights. Packaged weights lie on llama.cpp's grids, so its types lose nothing of them: a folder whose weights were
trained says more. mptk's and llama.cpp's files are timed in turns on one thread: a prompt, and a token after it.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import gguf
import numpy as np
import onnx
import torch
import typer
from torch.nn.functional import cross_entropy

from benchmarks.common import result_header, write_result
from benchmarks.onnx import export
from mptk.features.gguf import api
from mptk.io import data, models
from mptk.ort.decoder import OrtDecoder
from mptk.ort.steps import Case, bind_decoder_step
from passes.pipelines import quantize_onnx

LENGTH = 512
ROUNDS, DECODED = 7, 16
OURS = ("int8", "int4")
CALIBRATION = (32, 256)
"""Windows and tokens of each that int4 is rounded for: as many as `mptk export` takes."""
Compute = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
"""Token ids [length] → logits [length, vocabulary]."""


def measure_perplexity(compute: Compute, windows: torch.Tensor) -> float:
    """The perplexity of all tokens but the first of each window, int64 [n, length]."""
    losses = [
        float(cross_entropy(torch.from_numpy(compute(row.numpy())[:-1]).float(), row[1:], reduction="mean"))
        for row in windows
    ]
    return math.exp(sum(losses) / len(losses))


def run_graph(file: Path) -> Compute:
    decoder = OrtDecoder(file, threads=1)
    return lambda ids: decoder.compute_logits(ids[None])[0]


def count_bytes(file: Path) -> int:
    """Of a graph and the files of its weights."""
    return sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))


def quantize_with_mptk(whole: Path, text: torch.Tensor) -> Iterator[tuple[str, Path]]:
    """mptk's types. The graph of int4 is made twice, so its rows are measured one after the other."""
    yield "float32", whole
    yield "int8", quantize_onnx(whole, "int8")
    yield "int4, to the nearest", quantize_onnx(whole, "int4")
    yield "int4", quantize_onnx(whole, "int4", text.numpy())


def quantize_with_onnxruntime(source: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """ONNX Runtime's quantisers with their defaults, but blocks of 32 for 4 bits, as everyone else has."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    folder.mkdir()
    dynamic = folder / "dynamic.onnx"
    # Left to itself it quantises attention, too, into a node with an output more than its schema has. Eight whole bits by
    # channel overflow in products of processors without VNNI, so it is told to leave one bit.
    products = {"op_types_to_quantize": ["MatMul"], "per_channel": True, "reduce_range": True}
    quantize_dynamic(source, dynamic, **products, weight_type=QuantType.QInt8, use_external_data_format=True)
    yield "quantize_dynamic, int8 by channel", dynamic
    ways = {
        "MatMulNBits, 8 bits": nbits.DefaultWeightOnlyQuantConfig(block_size=32, bits=8),
        "MatMulNBits, 4 bits": nbits.DefaultWeightOnlyQuantConfig(block_size=32),
        "MatMulNBits, 4 bits, HQQ": nbits.HQQWeightOnlyQuantConfig(block_size=32),
        "MatMulNBits, 4 bits, k-quant": nbits.KQuantWeightOnlyQuantConfig(),
    }
    for number, (name, config) in enumerate(ways.items()):
        quantizer = nbits.MatMulNBitsQuantizer(onnx.load(str(source)), block_size=32, algo_config=config)
        try:
            quantizer.process()
        except ValueError as error:  # k-quant takes only an even number of blocks
            print(f"{name}: {error}")
            continue
        file = folder / f"nbits{number}.onnx"
        quantizer.model.save_model_to_file(str(file), use_external_data_format=True)
        yield name, file


class LlamaCpp:
    """A file in llama.cpp, on one thread. ``all_logits``: of every position, not only of the last one."""

    def __init__(self, file: Path, all_logits: bool) -> None:
        from llama_cpp import Llama

        sizes = {"n_ctx": LENGTH + 2 * DECODED, "n_batch": LENGTH, "n_ubatch": LENGTH}
        self.llama = Llama(str(file), **sizes, n_threads=1, n_threads_batch=1, logits_all=all_logits, verbose=False)

    def compute_logits(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        self.llama.reset()
        self.llama.eval(ids.tolist())
        logits: np.ndarray[Any, Any] = self.llama.scores[: len(ids)]
        return logits

    def measure_ms(self) -> tuple[float, float]:
        """Milliseconds of a prompt of ``LENGTH`` tokens and of each token after it."""
        self.llama.reset()
        return measure_cpu_ms(lambda: self.llama.eval([1000] * LENGTH), 1), measure_cpu_ms(
            lambda: self.llama.eval([1000]), DECODED
        )


class Graph:
    """A graph that gives the logits of the last position, in ONNX Runtime on one thread."""

    def __init__(self, file: Path) -> None:
        decoder = OrtDecoder(file, threads=1)
        self.steps = [bind_decoder_step(decoder, Case(phase, LENGTH, 1, 1)) for phase in ("prefill", "decode")]

    def measure_ms(self) -> tuple[float, float]:
        """As ``LlamaCpp.measure_ms``."""
        prefill, decode = self.steps
        return measure_cpu_ms(prefill, 1), measure_cpu_ms(decode, DECODED)


def measure_cpu_ms(step: Callable[[], None], times: int) -> float:
    """Milliseconds of the processor for each of so many steps."""
    start = time.process_time()
    for _ in range(times):
        step()
    return (time.process_time() - start) / times * 1000


def time_in_turns(found: Mapping[tuple[str, str], Graph | LlamaCpp]) -> dict[tuple[str, str], dict[str, float]]:
    """Medians of ``ROUNDS`` rounds, and of the ratios to the first of ``found`` in the same round. One more warms up."""
    turns = [{name: each.measure_ms() for name, each in found.items()} for _ in range(1 + ROUNDS)]
    rounds = turns[1:]
    first = next(iter(found))
    return {
        name: {
            f"{phase}{unit}": round(statistics.median(values), 4)
            for number, phase in enumerate(("prefill", "decode"))
            for unit, values in (
                ("_ms", [turn[name][number] for turn in rounds]),
                ("_ratio", [turn[name][number] / turn[first][number] for turn in rounds]),
            )
        }
        for name in found
    }


def quantize_with_llama_cpp(source: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """The types of llama.cpp, from a float32 file that it makes of ``source``, too: packaged files are quantised."""
    import llama_cpp

    folder.mkdir()
    types = {
        "F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
        "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
        "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
        "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    }
    for name, number in types.items():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread, params.allow_requantize = number, 1, True
        file = folder / f"{name}.gguf"
        given = source if name == "F32" else folder / "F32.gguf"
        if llama_cpp.llama_model_quantize(str(given).encode(), str(file).encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama.cpp could not write {name} of {given}")
        yield name, file


def describe_types(file: Path) -> str:
    """How many matrices a file has of each type."""
    found = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(str(file)).tensors if len(tensor.shape) > 1)
    return ", ".join(f"{count} {name}" for name, count in found.most_common())


def measure_model(name: str, text: str, calibration: str, count: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each product and type."""
    loaded = models.load(name)
    windows = data.load_evaluation_windows(loaded.tokenizer, text, LENGTH, count)
    fitted = data.load_calibration_windows(loaded.model, loaded.tokenizer, calibration, *CALIBRATION)
    if Path(name).is_dir():
        api.gguf(name, source := folder / "source.gguf", type="f32")
    else:
        source = Path(models.locate(name))
    # Perplexity needs the logits of all positions. llama.cpp computes the last one's for a prompt, so that is timed.
    whole, last = (export(loaded.model, folder / scope, scope) for scope in ("all", "last"))
    del loaded
    rows, timed = list[dict[str, Any]](), dict[tuple[str, str], Graph | LlamaCpp]()
    ours = (("mptk", *made) for made in quantize_with_mptk(whole, fitted))
    theirs = (("onnxruntime", *made) for made in quantize_with_onnxruntime(whole, folder / "ort"))
    for by, kind, file in itertools.chain(ours, theirs):  # one after the other, as they are made
        row = {"model": Path(name).name, "by": by, "type": kind, "megabytes": count_bytes(file) / 1e6}
        rows.append(row | {"perplexity": measure_perplexity(run_graph(file), windows)})
        print(rows[-1], flush=True)
    for kind, file in quantize_with_llama_cpp(source, folder / "llama.cpp"):
        row = {"model": Path(name).name, "by": "llama.cpp", "type": kind, "matrices": describe_types(file)}
        perplexity = measure_perplexity(LlamaCpp(file, all_logits=True).compute_logits, windows)
        rows.append(row | {"megabytes": count_bytes(file) / 1e6, "perplexity": perplexity})
        print(rows[-1], flush=True)
        timed["llama.cpp", kind] = LlamaCpp(file, all_logits=False)
    graphs = {"float32": last} | {kind: quantize_onnx(last, kind) for kind in OURS}
    times = time_in_turns({**{("mptk", kind): Graph(file) for kind, file in graphs.items()}, **timed})
    return [row | times.get((row["by"], row["type"]), {}) for row in rows]


def main(
    text: Annotated[str, typer.Option(help="What the windows are of.")],
    calibration: Annotated[str, typer.Option(help="What int4 is rounded for.")],
    chosen: Annotated[str, typer.Option("--models")] = "smollm2-135m,gemma3-270m",
    windows: int = 16,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    torch.set_num_threads(1)
    rows = json.loads(json_file.read_text())["rows"] if json_file is not None and json_file.exists() else []
    done = {row["model"] for row in rows}
    for name in (name for name in chosen.split(",") if Path(name).name not in done):
        with tempfile.TemporaryDirectory() as folder:
            for row in measure_model(name, text, calibration, windows, Path(folder)):
                rows.append(row | {key: round(row[key], 3) for key in ("megabytes", "perplexity")})
        if json_file is not None:
            write_result(json_file, result_header() | {"windows": windows, "length": LENGTH}, rows)
    print(make_table(rows))


def make_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each product and type of each model; changes are relative to mptk's float32, times ratios to it."""
    lines = ["| model | by | type | MB | perplexity | change | prefill | decode |", "|---|---|---|" + "---:|" * 5]
    for row in rows:
        whole = next(r for r in rows if (r["model"], r["by"], r["type"]) == (row["model"], "mptk", "float32"))
        times = [f"{row[key]:.2f}" if key in row else "" for key in ("prefill_ratio", "decode_ratio")]
        change = f"{row['perplexity'] / whole['perplexity'] - 1:+.1%}"
        cells = [row["model"], row["by"], row["type"], f"{row['megabytes']:.0f}", f"{row['perplexity']:.2f}", change]
        lines.append(f"| {' | '.join([*cells, *times])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
