"""bench: prefill and decode in ONNX Runtime, several graphs taking turns in one process.

Absolute times belong to one machine at one moment, so what counts is the ratio to the first graph, beside the ratio
that would be ideal: of the operations in prefill, which computes, and of the bytes in decode, which reads them. How
much of the machine a graph uses is its share of the roofline: the peak of a matrix product, or of reading memory,
measured between the same rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from mptk.errors import MptkError
from mptk.progress import Progress, silent
from mptk.runtime.alternate import alternate
from mptk.runtime.decoder import OrtDecoder, onnx_file
from mptk.runtime.graph_work import graph_work
from mptk.runtime.roofline import Peaks, Roofline, peak_memory

PHASES = ("prefill", "decode")
SESSIONS = 3
"""Sets of fresh sessions: where the weights of a session happen to lie in memory changes the speed of its decoding by
up to a quarter, for as long as the session lives."""


@dataclass(frozen=True)
class Case:
    """``length``: tokens of the prompt, or cached before the one decoding step."""

    phase: str
    length: int
    batch: int
    threads: int

    @property
    def tokens(self) -> int:
        """Tokens that one run takes in."""
        return self.batch * (self.length if self.phase == "prefill" else 1)

    def __str__(self) -> str:
        batch = f" ×{self.batch}" if self.batch > 1 else ""
        return f"{self.phase} {self.length}{batch}"


@dataclass(frozen=True)
class Row:
    """One graph in one case.

    ``ms``: median, for prefill the time to the first token; ``iqr_ms``: interquartile range; ``tokens_s``: tokens a
    second. ``ratio``: to the first graph, the median of the rounds' ratios, whose halves saw the same neighbours;
    ``ideal``: the ratio of ``work``, operations in prefill and bytes in decode. ``roofline``: share of the peak.
    """

    graph: str
    case: Case
    ms: float
    iqr_ms: float
    tokens_s: float
    ratio: float
    ideal: float
    work: int
    roofline: float


@dataclass(frozen=True)
class Graph:
    """What was compared. ``bytes``: of its files. ``memory``: what a process grows by when it loads and runs it."""

    name: str
    file: str
    bytes: int
    memory: int


@dataclass(frozen=True)
class Bench:
    """All cases of one comparison. ``peaks``: threads → what the machine gave meanwhile."""

    graphs: Sequence[Graph]
    onnxruntime: str
    rounds: int
    peaks: Mapping[int, Peaks]
    rows: Sequence[Row]

    def to_json(self) -> dict[str, object]:
        """As data; ``from_json`` reads it."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Bench:
        """A comparison that ``to_json`` wrote."""
        graphs = [Graph(**graph) for graph in data["graphs"]]
        peaks = {int(threads): Peaks(**found) for threads, found in data["peaks"].items()}
        rows = [Row(**{**row, "case": Case(**row["case"])}) for row in data["rows"]]
        return Bench(graphs, data["onnxruntime"], data["rounds"], peaks, rows)


def bench_decoders(
    graphs: Mapping[str, Path],
    *,
    lengths: Sequence[int] = (128, 512),
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    rounds: int = 7,
    phases: Sequence[str] = PHASES,
    sessions: int = SESSIONS,
    progress: Progress | None = None,
) -> Bench:
    """Time ONNX decoders: prefill of ``lengths`` tokens, and one decoding step after as many.

    The graphs take turns, and who begins a round changes. Inputs and cache are bound beforehand, so the caller's own
    work is not timed, nor is the first run of a session.

    Args:
        graphs: name → a folder with ``model.onnx``, or the file. The first is what the others are compared with.
        lengths: in tokens.
        batches: sequences at once.
        threads: thread counts, each measured in sessions of its own.
        rounds: turns of each graph in a case, at least 2.
        phases: ``prefill``, ``decode`` or both.
        sessions: sets of fresh sessions that the rounds are shared out among.
        progress: called with a stage, the cases done and all of them.

    Raises:
        MptkError: a file is missing or is no decoder; fewer than two rounds.
    """
    if rounds < 2:
        raise MptkError("the spread of one round is unknown; give --rounds 2 or more")
    say = progress or silent
    files = {name: onnx_file(path) for name, path in graphs.items()}
    shares = [len(range(session, rounds, sessions)) for session in range(min(sessions, rounds))]
    cases = [Case(p, n, b, t) for t in threads for p in phases for b in batches for n in lengths]
    times: dict[Case, list[list[float]]] = {case: [[] for _ in files] for case in cases}
    peaks: dict[int, Peaks] = {}
    done, total = 0, len(cases) * len(shares)
    say("bench", done, total)
    for count in threads:
        roofline = Roofline(count)
        for index, share in enumerate(shares):
            decoders = [OrtDecoder(file, threads=count) for file in files.values()]
            turn = slice(None, None, -1 if index % 2 else 1)
            for case in (case for case in cases if case.threads == count):
                found = alternate([decoder_step(decoder, case) for decoder in decoders[turn]], share)
                for side, more in zip(times[case][turn], found, strict=True):
                    side += more
                roofline.measure()
                done += 1
                say("bench", done, total)
            del decoders
        peaks[count] = roofline.peaks
    rows = [row for case in cases for row in _rows(case, files, times[case], peaks[case.threads])]
    measured = [_graph(name, file, max(lengths), say) for name, file in files.items()]
    return Bench(measured, ort.__version__, rounds, peaks, rows)


def decoder_step(decoder: OrtDecoder, case: Case) -> Callable[[], None]:
    """A call that runs one step with everything bound beforehand. Which tokens does not matter, nor what is cached."""
    prefill = case.phase == "prefill"
    cache = decoder.empty(case.batch) if prefill else decoder.filled(case.batch, case.length)
    ids = np.zeros((case.batch, case.length if prefill else 1), dtype=np.int64)
    mask = np.ones((case.batch, cache.length + ids.shape[1]), dtype=np.int64)
    binding = decoder.binding(ids, mask, cache)
    return lambda: decoder.session.run_with_iobinding(binding)


def _work(file: Path, case: Case) -> int:
    if case.phase == "prefill":
        return graph_work(file, sequence=case.length, past=0, batch=case.batch).flops
    return graph_work(file, sequence=1, past=case.length, batch=case.batch).bytes


def _rows(case: Case, files: Mapping[str, Path], times: Sequence[Sequence[float]], peaks: Peaks) -> list[Row]:
    work = [_work(file, case) for file in files.values()]
    peak = peaks.flops if case.phase == "prefill" else peaks.bandwidth
    rows = []
    for name, own, mine in zip(files, times, work, strict=True):
        median = statistics.median(own)
        rows.append(
            Row(
                name,
                case,
                ms=round(median, 3),
                iqr_ms=round(_iqr(own), 3),
                tokens_s=round(case.tokens / median * 1000, 1),
                ratio=round(statistics.median(t / first for t, first in zip(own, times[0], strict=True)), 4),
                ideal=round(mine / work[0], 4),
                work=mine,
                roofline=round(mine / median * 1000 / peak, 3),
            )
        )
    return rows


def _iqr(values: Sequence[float]) -> float:
    first, _, third = statistics.quantiles(values, n=4)
    return third - first


def _graph(name: str, file: Path, length: int, say: Progress) -> Graph:
    say(f"peak memory of {name}", 0, 0)
    size = sum(part.stat().st_size for part in (file, file.with_name(f"{file.name}.data")) if part.is_file())
    return Graph(name, str(file), size, peak_memory(file, length))
