"""bench: time prefill and decode in ONNX Runtime. Several graphs take turns in one process.

Absolute times hold for one machine at one moment, so the result is the ratio to the first graph. It is shown beside the
ideal ratio: of operations in prefill, which is bound by compute, and of bytes in decode, which is
bound by memory. The roofline share is the speed relative to the machine's peak (of a matrix product, or of reading
memory), which is measured between the same rounds.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime as ort
import torch
from pydantic import Field

from mptk.errors import MptkError
from mptk.ort.decoder import OrtDecoder, onnx_file
from mptk.ort.roofline import Peaks, Roofline, graph_work, peak_memory
from mptk.ort.sessions import CPU, HOST
from mptk.ort.unaligned import Unaligned, time_unaligned
from mptk.progress import Progress, silent

PHASES = ("prefill", "decode")
LENGTHS = (128, 512)
SESSIONS = 3
"""Sets of fresh sessions. The place of a session's weights in memory changes its decoding speed by up to a quarter, for
the life of the session."""


@dataclass(frozen=True)
class Case:
    """One measured step. ``length``: tokens of the prompt, or tokens in the cache before one decoding step."""

    phase: str
    length: int
    batch: int
    threads: int

    @property
    def tokens(self) -> int:
        """New tokens in one run."""
        return self.batch * (self.length if self.phase == "prefill" else 1)

    def __str__(self) -> str:
        batch = f" ×{self.batch}" if self.batch > 1 else ""
        return f"{self.phase} {self.length}{batch}"


Times = Mapping[Case, list[list[float]]]
"""Case → graph → milliseconds of each round."""


@dataclass(frozen=True)
class Measurement:
    """One graph in one case.

    ``ms``: median; in prefill, the time to the first token. ``iqr_ms``: interquartile range. ``tokens_s``: tokens a
    second. ``ratio``: time over the first graph's, the median of the ratios within each round. ``work``: operations in
    prefill, bytes in decode. ``ideal``: the ratio of ``work`` to the first graph's. ``roofline``: share of the peak.
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
    """A compared graph. ``bytes``: size of its files. ``memory``: bytes by which a process that runs it grows."""

    name: str
    file: str
    bytes: int
    memory: int


@dataclass(frozen=True)
class Bench:
    """All cases of one comparison.

    ``peaks``: threads → the machine's peaks, measured meanwhile. ``providers``: the execution providers that ran it.
    ``unaligned``: products of widths that are no multiples of the kernels' block, with the first number of threads.
    """

    graphs: Sequence[Graph]
    onnxruntime: str
    rounds: int
    peaks: Mapping[int, Peaks]
    rows: Annotated[Sequence[Measurement], Field(min_length=1)]
    providers: Sequence[str] = (HOST,)
    unaligned: Sequence[Unaligned] = ()

    def __post_init__(self) -> None:
        if not {row.graph for row in self.rows} <= {graph.name for graph in self.graphs}:
            raise ValueError("its rows are of other graphs than it has")

    def to_json(self) -> dict[str, object]:
        """The comparison as JSON data."""
        return asdict(self)


def bench_decoders(
    graphs: Mapping[str, Path],
    *,
    lengths: Sequence[int] = LENGTHS,
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    rounds: int = 7,
    phases: Sequence[str] = PHASES,
    sessions: int = SESSIONS,
    device: torch.device = CPU,
    progress: Progress | None = None,
) -> Bench:
    """Time ONNX decoders: prefill of ``lengths`` tokens, and one decoding step with that many tokens in the cache.

    The graphs take turns, and every other round reverses their order. Inputs and cache are bound beforehand, so neither
    the caller's work nor the first run of a session is timed.

    Args:
        graphs: name → a folder with ``model.onnx``, or the file. The others are compared with the first.
        lengths: tokens of the prompt, or in the cache.
        batches: batch sizes.
        threads: thread counts, each measured in its own sessions.
        rounds: turns of each graph in a case, at least 2.
        phases: ``prefill``, ``decode`` or both.
        sessions: sets of fresh sessions, over which the rounds are divided.
        device: where the graphs run, and whose peaks are measured.
        progress: called with a stage, the cases done and all cases.

    Raises:
        MptkError: a file is missing or is not a decoder; fewer than two rounds.
    """
    if rounds < 2:
        raise MptkError("the spread of one round is unknown; give --rounds 2 or more")
    say, files = progress or silent, {name: onnx_file(path) for name, path in graphs.items()}
    shares = [len(range(session, rounds, sessions)) for session in range(min(sessions, rounds))]
    cases = [Case(p, n, b, t) for t in threads for p in phases for b in batches for n in lengths]
    times: Times = {case: [[] for _ in files] for case in cases}
    peaks, ran, done = dict[int, Peaks](), list[str](), itertools.count()

    def finished() -> None:
        say("bench", next(done), len(cases) * len(shares))

    finished()
    for n in threads:
        own = {case: sides for case, sides in times.items() if case.threads == n}
        peaks[n], ran = _time_cases(list(files.values()), own, shares, Roofline(n, device), device, finished)
    rows = [row for case in cases for row in _rows(case, files, times[case], peaks[case.threads])]
    measured = [_graph(name, file, max(lengths), device, say) for name, file in files.items()]
    products = _products(files, {"prefill": max(lengths), "decode": 1}, phases, threads[0], rounds, device)
    return Bench(measured, ort.__version__, rounds, peaks, rows, ran, products)


def _products(
    files: Mapping[str, Path],
    tokens: Mapping[str, int],
    phases: Sequence[str],
    threads: int,
    rounds: int,
    device: torch.device,
) -> list[Unaligned]:
    timed = partial(time_unaligned, rows=[tokens[phase] for phase in phases], threads=threads, device=device)
    return [each for file in files.items() for each in timed(*file, alternate=partial(alternate, rounds=rounds))]


def _time_cases(
    files: Sequence[Path],
    times: Times,
    shares: Sequence[int],
    roofline: Roofline,
    device: torch.device,
    finished: Callable[[], None],
) -> tuple[Peaks, list[str]]:
    """Extend ``times``, whose cases use the threads of ``roofline``; returns the peaks, and what ran the graphs.

    Each entry of ``shares`` is the number of rounds in one set of fresh sessions.
    """
    for index, share in enumerate(shares):
        decoders = [OrtDecoder(file, threads=roofline.threads, device=device) for file in files]
        ran = decoders[0].providers
        turn = slice(None, None, -1 if index % 2 else 1)
        for case, sides in times.items():
            found = alternate([decoder_step(decoder, case) for decoder in decoders[turn]], share)
            for side, more in zip(sides[turn], found, strict=True):
                side += more
            roofline.measure()
            finished()
        del decoders
    return roofline.peaks, ran


def decoder_step(decoder: OrtDecoder, case: Case) -> Callable[[], None]:
    """A call that runs one step with inputs and outputs bound beforehand. Token ids and cached values do not matter."""
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


def _rows(case: Case, files: Mapping[str, Path], times: Sequence[Sequence[float]], peaks: Peaks) -> list[Measurement]:
    work = [_work(file, case) for file in files.values()]
    peak = peaks.flops if case.phase == "prefill" else peaks.bandwidth
    rows = []
    for name, own, mine in zip(files, times, work, strict=True):
        median = statistics.median(own)
        rows.append(
            Measurement(
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


def _graph(name: str, file: Path, length: int, device: torch.device, say: Progress) -> Graph:
    say(f"peak memory of {name}", 0, 0)
    size = sum(part.stat().st_size for part in file.parent.iterdir() if part.name.startswith(file.name))
    return Graph(name, str(file), size, peak_memory(file, length, device))


ROUND_S = 0.05
"""A shorter step, in seconds, is repeated within its turn, so that switching between steps does not dominate."""


def alternate(steps: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Milliseconds of each step in each round. Every other round reverses their order.

    The steps take turns, so that disturbances of the machine affect all of them equally.
    """
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


def _repeats(step: Callable[[], object]) -> int:
    """Number of runs of ``step`` in one turn. This also warms it up."""
    for _ in range(2):
        start = time.perf_counter()
        step()
        elapsed = time.perf_counter() - start
        if elapsed > ROUND_S:
            return 1
    return min(50, int(ROUND_S / elapsed))
