"""bench: prefill and decode in ONNX Runtime, dense and pruned alternating in one process.

Absolute times belong to one machine at one moment, so what counts is the ratio pruned / dense, beside the ratio that
would be ideal: of the operations in prefill, which computes, and of the weights' bytes in decode, which reads them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from mptk.runtime import FILE, OrtDecoder

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Row:
    """One phase: medians and interquartile ranges in milliseconds, ``ratio`` and ``ideal`` as pruned / dense."""

    phase: str
    threads: int
    dense_ms: float
    dense_iqr_ms: float
    pruned_ms: float
    pruned_iqr_ms: float
    ratio: float
    ideal: float


@dataclass(frozen=True)
class Bench:
    """All phases of one comparison, and what was compared with what."""

    dense: str
    pruned: str
    onnxruntime: str
    rounds: int
    rows: Sequence[Row]

    def to_json(self) -> dict[str, Any]:
        """As data; ``from_json`` reads it."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Bench:
        """A comparison that ``to_json`` wrote."""
        return Bench(**{**data, "rows": [Row(**row) for row in data["rows"]]})


@dataclass(frozen=True)
class Work:
    """What a graph has to do: ``macs`` multiply-adds with weights for one token (``last`` of them for a position whose
    logits are asked for), ``bytes`` of weights read a step, and ``attention`` multiply-adds for each pair of positions.
    """

    macs: int
    bytes: int
    attention: int


def bench_decoders(
    dense: Path,
    pruned: Path,
    *,
    prompts: Sequence[int] = (128, 512),
    threads: Sequence[int] = (1,),
    rounds: int = 7,
    progress: Progress | None = None,
) -> Bench:
    """Time two ONNX folders: prefill of ``prompts`` tokens and one decoding step after as many, batch 1.

    Rounds alternate between the two models; the first round of each phase is not counted.
    """
    say = progress or (lambda stage, done, total: None)
    work = (read_work(dense), read_work(pruned))
    rows = []
    done, total = 0, 2 * len(prompts) * len(threads)
    for count in threads:
        decoders = (OrtDecoder(dense, threads=count), OrtDecoder(pruned, threads=count))
        for phase in ("prefill", "decode"):
            for length in prompts:
                times = _alternate([_step(d, phase, length) for d in decoders], rounds)
                rows.append(_row(f"{phase} {length}", count, times, _ideal(phase, length, *work)))
                done += 1
                say("bench", done, total)
    return Bench(str(dense), str(pruned), ort.__version__, rounds, rows)


def _step(decoder: OrtDecoder, phase: str, length: int) -> Callable[[], None]:
    """A call that runs one step with everything bound beforehand."""
    rng = np.random.default_rng(0)
    if phase == "prefill":
        ids, cache = rng.integers(1, 100, (1, length)), decoder.empty(1)
    else:
        ids, cache = rng.integers(1, 100, (1, 1)), decoder.filled(1, length)
    mask = np.ones((1, cache.length + ids.shape[1]), dtype=np.int64)
    binding = decoder.binding(ids, mask, cache)
    return lambda: decoder.session.run_with_iobinding(binding)


def _alternate(steps: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Milliseconds of each step, in turn; steps shorter than 50 ms are repeated within a round."""
    repeats = []
    for step in steps:
        step()
        start = time.perf_counter()
        step()
        repeats.append(max(1, min(20, int(0.05 / (time.perf_counter() - start)))))
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, repeat, found in zip(steps, repeats, times, strict=True):
            start = time.perf_counter()
            for _ in range(repeat):
                step()
            found.append((time.perf_counter() - start) / repeat * 1000)
    return times


def _row(phase: str, threads: int, times: Sequence[Sequence[float]], ideal: float) -> Row:
    """Medians of each side; the ratio is the median of the rounds' ratios, whose two halves saw the same neighbours."""
    dense, pruned = times
    return Row(
        phase,
        threads,
        dense_ms=round(statistics.median(dense), 3),
        dense_iqr_ms=round(_iqr(dense), 3),
        pruned_ms=round(statistics.median(pruned), 3),
        pruned_iqr_ms=round(_iqr(pruned), 3),
        ratio=round(statistics.median(p / d for p, d in zip(pruned, dense, strict=True)), 4),
        ideal=round(ideal, 4),
    )


def _iqr(values: Sequence[float]) -> float:
    first, _, third = statistics.quantiles(values, n=4)
    return third - first


def _ideal(phase: str, length: int, dense: Work, pruned: Work) -> float:
    if phase == "decode":
        return pruned.bytes / dense.bytes
    return _prefill_macs(pruned, length) / _prefill_macs(dense, length)


def _prefill_macs(work: Work, length: int) -> int:
    return work.macs * length + work.attention * length * length


def read_work(path: Path) -> Work:
    """The work of an ONNX graph, from its own operators: matrix products with initialisers and attention.

    A lookup of embedding rows reads a few of them and counts for nothing; a table that is also the output projection
    counts once, as that.
    """
    model = ir.load(path / FILE if path.is_dir() else path)
    macs = attention = size = 0
    seen: set[str | None] = set()
    for node in model.graph.all_nodes():
        if node.op_type in ("MatMul", "Gemm"):
            weight = _weight(node.inputs[1])
            if weight is not None and weight.shape is not None:
                macs += int(np.prod(weight.shape.numpy()))
                size += 0 if weight.name in seen else weight.const_value.nbytes  # type: ignore[union-attr]
                seen.add(weight.name)
        elif node.op_type == "Attention":
            attention += _attention_macs(node)
    return Work(macs, size, attention)


def _weight(value: ir.Value | None) -> ir.Value | None:
    """The initialiser behind an operand, through a transpose."""
    while value is not None and not value.is_initializer():
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in ("Transpose", "Identity") else None
    return value


def _attention_macs(node: ir.Node) -> int:
    """Multiply-adds a pair of positions: heads · (key size + value size), from the output's width or the cache."""
    heads = node.attributes.get_int("q_num_heads", 0)
    key, value = node.inputs[4], node.inputs[5]
    if not heads:
        query = node.inputs[0]
        heads = int(query.shape[1]) if query is not None and query.shape is not None else 0  # type: ignore[arg-type]
    sizes = [int(v.shape[3]) for v in (key, value) if v is not None and v.shape is not None]  # type: ignore[arg-type]
    return heads * sum(sizes)
