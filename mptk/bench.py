"""bench: prefill and decode in ONNX Runtime, dense and pruned alternating in one process.

Absolute times belong to one machine at one moment, so what counts is the ratio pruned / dense, beside the ratio that
would be ideal: of the operations in prefill, which computes, and of the bytes in decode, which reads them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mptk.onnx_work import graph_work
from mptk.runtime import OrtDecoder, onnx_file

Progress = Callable[[str, int, int], None]
PHASES = ("prefill", "decode")
SESSIONS = 3
"""The rounds are shared out among so many pairs of fresh sessions: where the weights of a session happen to lie in
memory changes the speed of its decoding by up to a quarter, for as long as the session lives."""

ROUND_S = 0.05
"""A step shorter than this is repeated within its turn, so that the change of sides does not dominate it."""


@dataclass(frozen=True)
class Row:
    """One phase: medians and interquartile ranges in milliseconds, ``ratio`` and ``ideal`` as pruned / dense.

    ``ideal`` is the ratio of ``dense_work`` and ``pruned_work``: operations in prefill, bytes in decode.
    """

    phase: str
    threads: int
    dense_ms: float
    dense_iqr_ms: float
    pruned_ms: float
    pruned_iqr_ms: float
    ratio: float
    ideal: float
    dense_work: int
    pruned_work: int


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


def bench_decoders(
    dense: Path,
    pruned: Path,
    *,
    prompts: Sequence[int] = (128, 512),
    threads: Sequence[int] = (1,),
    rounds: int = 7,
    progress: Progress | None = None,
) -> Bench:
    """Time two ONNX decoders: prefill of ``prompts`` tokens and one decoding step after as many, batch 1.

    The two take turns, and who begins a round changes. Inputs and cache are bound beforehand, so the caller's own
    work is not timed, nor is the first step of a session.

    Args:
        dense: a folder with ``model.onnx``, or the file.
        pruned: the same.
        prompts: lengths in tokens.
        threads: thread counts, each measured in sessions of its own.
        rounds: turns of each side in a phase, at least 2.
        progress: called with a stage, the phases done and all of them.

    Raises:
        MptkError: a file is missing or is no decoder.
    """
    say = progress or (lambda stage, done, total: None)
    files = (onnx_file(dense), onnx_file(pruned))
    phases = [(phase, length) for phase in PHASES for length in prompts]
    shares = [len(range(session, rounds, SESSIONS)) for session in range(min(SESSIONS, rounds))]
    done, total = 0, len(threads) * len(shares) * len(phases)
    say("bench", done, total)
    rows: list[Row] = []
    for count in threads:
        times: dict[tuple[str, int], list[list[float]]] = {key: [[], []] for key in phases}
        for share in shares:
            decoders = [OrtDecoder(file, threads=count) for file in files]
            for key in phases:
                found = alternate([decoder_step(decoder, *key) for decoder in decoders], share)
                for side, more in zip(times[key], found, strict=True):
                    side += more
                done += 1
                say("bench", done, total)
        rows += [_row(*key, count, times[key], [_work(file, *key) for file in files]) for key in phases]
    return Bench(str(dense), str(pruned), ort.__version__, rounds, rows)


def alternate(steps: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Milliseconds of each step in each round. The steps take turns; the order is reversed every other round."""
    repeats = [_repeats(step) for step in steps]
    times: list[list[float]] = [[] for _ in steps]
    order = list(range(len(steps)))
    for _ in range(rounds):
        for index in order:
            start = time.perf_counter()
            for _ in range(repeats[index]):
                steps[index]()
            times[index].append((time.perf_counter() - start) / repeats[index] * 1000)
        order.reverse()
    return times


def _repeats(step: Callable[[], None]) -> int:
    """Runs of ``step`` in one turn. Running it here warms it up, too."""
    for _ in range(2):
        start = time.perf_counter()
        step()
        elapsed = time.perf_counter() - start
        if elapsed > ROUND_S:
            return 1
    return min(50, int(ROUND_S / elapsed))


def decoder_step(decoder: OrtDecoder, phase: str, length: int) -> Callable[[], None]:
    """A call that runs one step with everything bound beforehand. Which tokens does not matter, nor what is cached."""
    cache = decoder.empty(1) if phase == "prefill" else decoder.filled(1, length)
    ids = np.zeros((1, length if phase == "prefill" else 1), dtype=np.int64)
    binding = decoder.binding(ids, np.ones((1, cache.length + ids.shape[1]), dtype=np.int64), cache)
    return lambda: decoder.session.run_with_iobinding(binding)


def _work(file: Path, phase: str, length: int) -> int:
    if phase == "prefill":
        return graph_work(file, sequence=length, past=0).flops
    return graph_work(file, sequence=1, past=length).bytes


def _row(phase: str, length: int, threads: int, times: Sequence[Sequence[float]], work: Sequence[int]) -> Row:
    """Medians of each side; the ratio is the median of the rounds' ratios, whose halves saw the same neighbours."""
    dense, pruned = times
    return Row(
        f"{phase} {length}",
        threads,
        dense_ms=round(statistics.median(dense), 3),
        dense_iqr_ms=round(_iqr(dense), 3),
        pruned_ms=round(statistics.median(pruned), 3),
        pruned_iqr_ms=round(_iqr(pruned), 3),
        ratio=round(statistics.median(p / d for p, d in zip(pruned, dense, strict=True)), 4),
        ideal=round(work[1] / work[0], 4),
        dense_work=work[0],
        pruned_work=work[1],
    )


def _iqr(values: Sequence[float]) -> float:
    first, _, third = statistics.quantiles(values, n=4)
    return third - first
