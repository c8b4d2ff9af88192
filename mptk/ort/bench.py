"""bench: time graphs in ONNX Runtime. Those of several models take turns in one process.

Absolute times hold for one machine at one moment, so the result is the ratio to the first graph. It is shown beside the
ideal ratio: of bytes in decode, which is bound by memory, and of operations in prefill and in other runs, which are
bound by compute. The roofline share is the speed relative to the machine's peak (of a matrix product, or of reading
memory), which is measured between the same rounds.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from pydantic import Field

from mptk.errors import FileError, InputError
from mptk.ir import KERNEL_BLOCK
from mptk.ort.graph_files import find_onnx_file
from mptk.ort.roofline import Peaks, Roofline, compute_graph_work, measure_peak_memory, run_work
from mptk.ort.sessions import CPU, HOST, open_session
from mptk.ort.steps import PHASES, Case, choose_lengths, find_phase_graphs, open_stepper, takes_encoder_output
from mptk.progress import Progress, show_nothing

BENCH_FORMAT = "mptk-bench/1"
LENGTHS = (128, 512)
"""Tokens of a prompt, by default."""
BENCH_ROUNDS = 7
"""Turns of each graph in a case, by default."""
SESSIONS = 3
"""Sets of fresh sessions. The place of a session's weights in memory changes its decoding speed by up to a quarter, for
the life of the session."""


Step = Callable[[], object]
Alternate = Callable[[Sequence[Step]], list[list[float]]]
"""Gives milliseconds of each step in each round."""
GraphOf = Mapping[str, Path]
"""Phase → the graph of a model that runs in it."""
Times = Mapping[Case, list[list[float]]]
"""Case → graph → milliseconds of each round."""


@dataclass(frozen=True)
class Measurement:
    """One graph in one case.

    ``ms``: median; in prefill, the time to the first token. ``iqr_ms``: interquartile range. ``tokens_s``: tokens a
    second, or samples if the graph reads no tokens. ``ratio``: time over the first graph's, the median of the ratios
    within each round. ``work``: bytes in decode, else operations. ``ideal``: its ratio to the first graph's.
    ``roofline``: share of the peak.
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
        return {"format": BENCH_FORMAT, **asdict(self)}


def bench_graphs(
    graphs: Mapping[str, Path],
    *,
    lengths: Sequence[int] = LENGTHS,
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    rounds: int = BENCH_ROUNDS,
    phases: Sequence[str] | None = None,
    sessions: int = SESSIONS,
    device: torch.device = CPU,
    progress: Progress | None = None,
) -> Bench:
    """Time ONNX graphs of one kind of model (``steps.find_phase_graphs``).

    The graphs take turns, and every other round reverses their order. Inputs and cache are bound beforehand, so neither
    the caller's work nor the first run of a session is timed.

    Args:
        graphs: name → a folder with a main graph, or the file. The others are compared with the first. A graph that has
            two names is timed under the first.
        lengths: tokens of the prompt, in the cache, or of a text.
        batches: batch sizes.
        threads: thread counts, each measured in its own sessions.
        rounds: turns of each graph in a case, at least 2.
        phases: what to time, such as ``prefill``; None: all.
        sessions: sets of fresh sessions, over which the rounds are divided.
        device: where the graphs run, and whose peaks are measured.
        progress: called with a stage, the cases done and all cases.

    Raises:
        MptkError: a file is missing, or its graphs are of another kind than the first; a graph does not run on one of
            the lengths; fewer than two rounds.
    """
    say, models = progress or show_nothing, _of_one_kind(_find_distinct(graphs))
    cases = _list_cases(next(iter(models.values())), phases, lengths, batches, threads)
    timed = time_models(models, cases, rounds, sessions, device, say)
    # What needs no turns: memory, in new processes, and products of unaligned widths.
    measured = [_measure_graph(name, parts, max(lengths), device, say) for name, parts in models.items()]
    products = _time_products(models, cases, rounds, device)
    return Bench(measured, ort.__version__, rounds, timed.peaks, timed.rows, timed.providers, products)


def time_graphs(
    graphs: Mapping[str, Path], cases: Sequence[Case], *, device: torch.device = CPU, progress: Progress | None = None
) -> Sequence[Measurement]:
    """Only the rows of ``bench_graphs``, in cases that the caller chooses. ``graphs``: name → file.

    Raises MptkError as ``bench_graphs``.
    """
    return time_models(_of_one_kind(graphs), cases, BENCH_ROUNDS, SESSIONS, device, progress or show_nothing).rows


@dataclass(frozen=True)
class Timed:
    """Rows, peaks and providers, as of ``Bench``."""

    rows: Sequence[Measurement]
    peaks: Mapping[int, Peaks]
    providers: Sequence[str]


def time_models(
    models: Mapping[str, GraphOf],
    cases: Sequence[Case],
    rounds: int,
    sessions: int,
    device: torch.device,
    say: Progress,
) -> Timed:
    """Time all cases of all models, in turns. Raises MptkError for fewer than two rounds."""
    if rounds < 2:
        raise InputError("the spread of one round is unknown; give --rounds 2 or more", name="rounds")
    # The rounds are dealt out to the sets of sessions, at least one to each.
    shares = [len(range(session, rounds, sessions)) for session in range(min(sessions, rounds))]
    times: Times = {case: [[] for _ in models] for case in cases}
    peaks, ran, done = dict[int, Peaks](), list[str](), itertools.count()

    def report_finished() -> None:
        say("bench", next(done), len(cases) * len(shares))

    report_finished()
    # Sessions and peaks have one number of threads, so all cases of one number are timed together.
    for n in dict.fromkeys(case.threads for case in cases):
        own = {case: sides for case, sides in times.items() if case.threads == n}
        peaks[n], ran = _time_cases(list(models.values()), own, shares, Roofline(n, device), device, report_finished)
    rows = [row for case in cases for row in _make_rows(case, models, times[case], peaks[case.threads])]
    return Timed(rows, peaks, ran)


def _list_cases(
    parts: GraphOf,
    phases: Sequence[str] | None,
    lengths: Sequence[int],
    batches: Sequence[int],
    threads: Sequence[int],
) -> list[Case]:
    timed = {phase: file for phase, file in parts.items() if phases is None or phase in phases}
    sizes = {phase: choose_lengths(file, phase, lengths) for phase, file in timed.items()}
    return [Case(p, n, b, t) for t in threads for p in timed for b in batches for n in sizes[p]]


def _find_distinct(graphs: Mapping[str, Path]) -> dict[str, Path]:
    """Name → file of each graph, once: a folder and a file in it may be the same."""
    files = {name: find_onnx_file(path) for name, path in graphs.items()}
    first: dict[Path, str] = {}
    for name, file in files.items():
        first.setdefault(file.resolve(), name)
    return {name: files[name] for name in first.values()}


def _of_one_kind(files: Mapping[str, Path]) -> Mapping[str, GraphOf]:
    """Model → its graphs. Raises MptkError unless all have the same phases."""
    models = {name: find_phase_graphs(file) for name, file in files.items()}
    first, *others = models
    if other := next((name for name in others if models[name].keys() != models[first].keys()), None):
        phases = (", ".join(models[name]) for name in (other, first))
        raise FileError(
            f"{other} has {next(phases)}, and {first} has {next(phases)}; compare models of one kind", name=other
        )
    return models


def _time_products(
    models: Mapping[str, GraphOf], cases: Sequence[Case], rounds: int, device: torch.device
) -> list[Unaligned]:
    """The products of unaligned widths in the longest case of each phase that reads tokens, with the first threads."""
    tokens = {
        case.phase: 1 if case.phase == "decode" else case.length for case in sorted(cases, key=lambda c: c.length)
    }
    # Decode multiplies one row, prefill as many as there are tokens. A graph of several phases is read once.
    timed, found = partial(time_alternately, rounds=rounds), list[Unaligned]()
    for name, parts in models.items():
        for file in dict.fromkeys(parts[phase] for phase in tokens):
            rows = [count for phase, count in tokens.items() if count and parts[phase] == file]
            found += time_unaligned(name, file, rows, cases[0].threads, device, timed)
    return found


def _time_cases(
    models: Sequence[GraphOf],
    times: Times,
    shares: Sequence[int],
    roofline: Roofline,
    device: torch.device,
    finished: Callable[[], None],
) -> tuple[Peaks, list[str]]:
    """Extend ``times``, whose cases use the threads of ``roofline``; returns the peaks, and what ran the graphs.

    Each entry of ``shares`` is the number of rounds in one set of fresh sessions.
    """
    ran = list[str]()
    for index, share in enumerate(shares):
        # A session serves all cases of its set. The next set opens new ones, whose weights lie elsewhere in memory.
        open_once = functools.cache(partial(open_stepper, threads=roofline.threads, device=device))
        turn = slice(None, None, -1 if index % 2 else 1)
        for case, sides in times.items():
            steppers = [open_once(parts[case.phase], case.phase in PHASES) for parts in models]
            ran = steppers[0].providers
            found = time_alternately([stepper.step(case) for stepper in steppers[turn]], share)
            for side, more in zip(sides[turn], found, strict=True):
                side += more
            roofline.measure()  # between rounds, so that the same disturbances move the peaks
            finished()
        del open_once, steppers  # before the next set: two sets may not fit into memory
    return roofline.peaks, ran


def _work(file: Path, case: Case) -> int:
    decodes = case.phase == "decode"
    if case.phase not in PHASES or takes_encoder_output(file):
        work = run_work(file, case)
    else:
        past = case.length if decodes else 0
        work = compute_graph_work(file, sequence=1 if decodes else case.length, past=past, batch=case.batch)
    return work.bytes if decodes else work.flops


def _make_rows(
    case: Case, models: Mapping[str, GraphOf], times: Sequence[Sequence[float]], peaks: Peaks
) -> list[Measurement]:
    work = [_work(parts[case.phase], case) for parts in models.values()]
    peak = peaks.bandwidth if case.phase == "decode" else peaks.flops
    rows = []
    for name, own, mine in zip(models, times, work, strict=True):
        # The ratio within each round, not of medians: a disturbance lasts longer than a round.
        median = statistics.median(own)
        rows.append(
            Measurement(
                name,
                case,
                ms=round(median, 3),
                iqr_ms=round(_compute_iqr(own), 3),
                tokens_s=round(case.tokens / median * 1000, 1),
                ratio=round(statistics.median(t / first for t, first in zip(own, times[0], strict=True)), 4),
                ideal=round(mine / (work[0] or 1), 4),  # a graph without counted operations has no ratio
                work=mine,
                roofline=round(mine / median * 1000 / peak, 3),
            )
        )
    return rows


def _compute_iqr(values: Sequence[float]) -> float:
    first, _, third = statistics.quantiles(values, n=4)
    return third - first


def _measure_graph(name: str, parts: GraphOf, length: int, device: torch.device, say: Progress) -> Graph:
    say(f"peak memory of {name}", 0, 0)
    files = list(dict.fromkeys(parts.values()))
    size = sum(part.stat().st_size for file in files for part in file.parent.glob(f"{file.name}*"))
    return Graph(name, str(files[0]), size, measure_peak_memory(files[0], length, device))


ROUND_S = 0.05
"""Seconds of a turn in which switching between steps does not dominate."""


def time_alternately(steps: Sequence[Step], rounds: int, shortest: float = ROUND_S) -> list[list[float]]:
    """Milliseconds of each step in each round. Every other round reverses their order.

    The steps take turns, so that disturbances of the machine affect all of them equally. ``shortest``: a step that
    takes fewer seconds is repeated within its turn.
    """
    repeats = [_count_repeats(step, shortest) for step in steps]
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


def _count_repeats(step: Step, shortest: float) -> int:
    """Number of runs of ``step`` in one turn. This also warms it up."""
    for _ in range(2):  # the first call of a session also allocates its memory
        start = time.perf_counter()
        step()
        elapsed = time.perf_counter() - start
        if elapsed > shortest:
            return 1
    return min(50, int(shortest / elapsed))


@dataclass(frozen=True)
class Unaligned:
    """A product of float32 inputs [rows, inputs] with a weight [inputs, outputs] of a graph.

    ``ms``: milliseconds at these widths; ``aligned_ms``: at the next multiples of the block.
    """

    graph: str
    rows: int
    inputs: int
    outputs: int
    ms: float
    aligned_ms: float

    @property
    def aligned(self) -> tuple[int, int]:
        """The next aligned widths."""
        return round_up(self.inputs), round_up(self.outputs)


def round_up(width: int) -> int:
    """The next multiple of the kernels' block."""
    return -(-width // KERNEL_BLOCK) * KERNEL_BLOCK


def list_unaligned_weights(file: Path) -> list[tuple[int, int]]:
    """The sizes [inputs, outputs] of the float weights in a graph of which one is not aligned, each once."""
    graph = onnx.load(file, load_external_data=False).graph
    sizes = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    found = {sizes[node.input[1]] for node in graph.node if node.op_type == "MatMul" and node.input[1] in sizes}
    return sorted(size for size in found if len(size) == 2 and any(width != round_up(width) for width in size))


def build_matrix_product(
    rows: int, inputs: int, outputs: int, threads: int, device: torch.device = CPU
) -> Callable[[], object]:
    """A call that multiplies [rows, inputs] with a constant weight [inputs, outputs] in ONNX Runtime."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, inputs])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, outputs])
    weight = numpy_helper.from_array(np.ones((inputs, outputs), dtype=np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "product", [given], [result], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = open_session(bytes(model.SerializeToString()), device, threads=threads)
    feeds = {"x": np.ones((rows, inputs), dtype=np.float32)}
    return lambda: session.run(None, feeds)


def time_unaligned(
    name: str,
    file: Path,
    rows: Sequence[int],
    threads: int,
    device: torch.device,
    alternate: Alternate,
) -> list[Unaligned]:
    """Time each unaligned weight of the graph ``name`` beside the aligned one.

    ``rows``: the numbers of tokens.
    """
    found = []
    for inputs, outputs in list_unaligned_weights(file):
        for count in rows:
            sizes = ((inputs, outputs), (round_up(inputs), round_up(outputs)))
            own, aligned = alternate([build_matrix_product(count, *size, threads, device) for size in sizes])
            ms, aligned_ms = (round(statistics.median(each), 4) for each in (own, aligned))
            found.append(Unaligned(name, count, inputs, outputs, ms, aligned_ms))
    return found
