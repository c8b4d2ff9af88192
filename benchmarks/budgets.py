"""Whether `mptk advise` names the best way to meet a budget: its ways beside full runs of all of them.

    python -m benchmarks.budgets --text FILE --held-out FILE [--model smollm2-135m] [--sparsities 0.1,0.2,0.3,0.4,0.5]
        [--context 512] [--windows 16] [--json FILE] [--work DIR] [--quick]

A way is a cut in a type. One advice predicts the loss, times and sizes of all. `prune --method wanda --reconstruct` then
makes each cut in float32, int8 and int4, measures it on the held-out text, and all graphs are timed in turns. Budgets are
drawn by a seed: milliseconds of a decoding step, of a prompt, or bytes, between the least and the most that a way takes,
each ratio as likely as another. For each the way that the advice names, by its predictions and as `--measure` corrects them,
stands beside the best of all. Cuts that DIR has are not made again, and ways that the file has are only judged again.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import result_header, write_result
from mptk import Report, Settings, advise, prune
from mptk.api.graphs import export_folder
from mptk.cost.budgets import list_phase_tokens
from mptk.features.advise.advice import FLOAT_TYPE, Advice, Ceiling, Figures, Point, Way
from mptk.features.advise.made import choose_further_ways
from mptk.features.advise.types import name_graph
from mptk.ort.bench import time_graphs
from mptk.ort.steps import Case
from passes.targets.onnx.names import ONNX_FOLDER, count_graph_bytes

TYPES = ("int8", "int4")
KINDS = ("decode_ms", "decode_ms", "prefill_ms", "bytes")
"""What the budgets limit, in turns: decoding is what users wait for."""
BUDGETS = 10
ANY_MS = 1e6
"""A limit that all ways meet: the advice times only phases that are limited."""


@dataclass(frozen=True)
class Run:
    """A way as a full run made it: milliseconds by phase, bytes of its graph, and the perplexity of held-out text."""

    ms: Mapping[str, float]
    bytes: int
    perplexity: float

    def measure(self, kind: str) -> float:
        """What a budget of ``kind`` limits."""
        return self.bytes if kind == "bytes" else self.ms[kind.removesuffix("_ms")]


def main(
    text: Annotated[Path, typer.Option(help="What scores and fits, and what the advice measures on.")],
    held_out: Annotated[Path, typer.Option(help="What full runs are measured on.")],
    model: str = "smollm2-135m",
    sparsities: str = "0.1,0.2,0.3,0.4,0.5",
    context: int = 512,
    windows: int = 16,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    work: Path = Path("runs/budgets"),
    quick: Annotated[bool, typer.Option("--quick", help="One cut, few windows.")] = False,
) -> None:
    """Print a line for each budget."""
    known = json.loads(json_file.read_text()) if json_file is not None and json_file.exists() else {}
    if known:
        ways, runs = zip(*map(read_way, known["ways"]), strict=True)
        advice = make_advice(known["model"], ways, known["context"])
        header = {key: value for key, value in known.items() if key != "rows"}
    else:
        how: dict[str, Any] = {"samples": 4} if quick else {}
        if quick:
            sparsities, windows, context = "0.3", 2, 64
        advice = advise(
            model,
            data=str(text),
            sparsities=[float(each) for each in sparsities.split(",")],
            types=TYPES,
            max_decode_ms=ANY_MS,
            max_prefill_ms=ANY_MS,
            context=context,
            **how,
        )
        how |= {"data": str(text), "eval_data": str(held_out), "eval_windows": windows}
        runs = make_runs(model, advice, how, context, work)
        described = [describe_way(way, run) for way, run in zip(advice.ways, runs, strict=True)]
        header = result_header() | {"quick": quick, "model": model, "context": context, "ways": described}
    judged_at = result_header()["commit"]  # the runs may be of another
    rows = [row | {"commit": judged_at} for row in judge(advice, runs)]
    print(table(rows))
    if json_file is not None:
        write_result(json_file, header, rows)


def make_runs(model: str, advice: Advice, how: Mapping[str, Any], context: int, work: Path) -> list[Run]:
    """Each way of the advice as a full run makes it, in their order."""
    folders = {(): work / "dense"}
    if not folders[()].is_dir():
        export_folder(model, folders[()], Settings(quantize=TYPES), text=how["data"])
    for point in advice.division:
        folder = folders[tuple(point.widths.items())] = work / f"{point.sparsity:.4f}"
        if not folder.is_dir():
            cut: dict[str, Any] = {"sparsity": point.sparsity, "widths": dict(point.widths), "quantize": TYPES}
            prune(model, folder, method="wanda", reconstruct=True, **cut, **how)

    # All graphs take turns, so that load counts for all of them.
    places = [(folders[way.cut if way.sparsity else ()], way.type) for way in advice.ways]
    files = {str(number): name_graph(folder / ONNX_FOLDER, kind) for number, (folder, kind) in enumerate(places)}
    cases = [Case(phase, max(list_phase_tokens(phase, context)), 1, 1) for phase in ("decode", "prefill")]
    rows = time_graphs(files, cases)
    reports = {folder: Report.read(folder) for folder, _ in places if folder != work / "dense"}
    runs = []
    for (folder, kind), (name, file) in zip(places, files.items(), strict=True):
        ms = {row.case.phase: row.ms for row in rows if row.graph == name}
        runs.append(Run(ms, count_graph_bytes([file]), read_perplexity(reports, folder, kind)))
    return runs


def read_perplexity(reports: Mapping[Path, Report], folder: Path, kind: str) -> float:
    """Of a cut from its own report. Of the dense model's types from any: each run measures them beside its own."""
    report = reports.get(folder)
    if report is not None:
        return float(report.quality["pruned"] if kind == FLOAT_TYPE else report.quantized[kind]["quality"])
    other = next(iter(reports.values()))
    return float(other.quality["dense"] if kind == FLOAT_TYPE else other.quantized[kind]["dense"]["quality"])


def make_advice(model: str, ways: Sequence[Way], context: int) -> Advice:
    """An advice with these ways, the dense model's first. What else it says plays no part here."""
    dense = Point(ways[0].widths, 0.0, 0, 0, None, ways[0].texts)
    return Advice(model, "", "perplexity", 0.0, dense, (), {}, {}, ways=tuple(ways), limits=Ceiling(context=context))


def judge(advice: Advice, runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """For each budget: the advised ways and the best of all runs that meet it."""
    drawn, made = random.Random(0), {name_way(way): run for way, run in zip(advice.ways, runs, strict=True)}
    for number in range(BUDGETS):
        kind = KINDS[number % len(KINDS)]
        taken = {name: run.measure(kind) for name, run in made.items()}
        low, high = min(taken.values()), max(taken.values())
        budget = low * (high / low) ** drawn.random()
        best = min((name for name in made if taken[name] <= budget), key=lambda name: made[name].perplexity)
        row = {"limit": kind, "budget": budget, "best": best, "perplexity": made[best].perplexity}

        # The advice with this budget as its limit.
        asked: Any = {kind: budget, "context": advice.limits.context}
        predicted = replace(advice, limits=Ceiling(**asked))
        for name, found in (("predicted", predicted), ("measured", measure_best(predicted, made))):
            if (way := found.find_way()) is not None:
                chosen = name_way(way)
                quality, price = made[chosen].perplexity / made[best].perplexity - 1, taken[chosen] / budget - 1
                row[name] = {"way": chosen, "quality": quality, "price": price}
        yield row


def measure_best(found: Advice, made: Mapping[str, Run]) -> Advice:
    """The advice as ``--measure`` corrects it, with the figures of full runs."""
    while chosen := [name_way(way) for way in choose_further_ways(found)]:
        ways = [
            set_measured(way, made[name], made[FLOAT_TYPE].perplexity) if (name := name_way(way)) in chosen else way
            for way in found.ways
        ]
        found = replace(found, ways=tuple(ways))
    return found


def set_measured(way: Way, run: Run, dense: float) -> Way:
    """A way with the figures of its run."""
    loss, rise = math.log(run.perplexity), math.log(run.perplexity / dense)
    figures = Figures(loss, rise, None, run.perplexity / dense - 1, 0.0)
    ms = {phase: run.ms[phase] for phase in way.ms}
    return replace(way, measured=replace(way, bytes=run.bytes, ms=ms, texts=dict.fromkeys(way.texts, figures)))


def name_way(way: Way) -> str:
    return f"{way.type}{f' −{way.sparsity:.0%}' if way.sparsity else ''}"


def describe_way(way: Way, run: Run) -> dict[str, Any]:
    """A way as predicted and as measured."""
    predicted = {"ms": dict(way.ms), "bytes": way.bytes, "rise": way.rise}
    measured = {"ms": dict(run.ms), "bytes": run.bytes, "perplexity": run.perplexity}
    return {
        "type": way.type,
        "sparsity": way.sparsity,
        "widths": dict(way.widths),
        "predicted": predicted,
        "run": measured,
    }


def read_way(row: Mapping[str, Any]) -> tuple[Way, Run]:
    """What ``describe_way`` described. Only the rise of the loss is known of its figures."""
    predicted, run = row["predicted"], row["run"]
    rise = predicted["rise"]
    texts = {"": Figures(rise, rise, None, math.expm1(rise), 0.0)}
    way = Way(row["type"], row["sparsity"], row["widths"], predicted["bytes"], predicted["ms"], texts)
    return way, Run(run["ms"], run["bytes"], run["perplexity"])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each budget. "over": by how much the advised way exceeds the budget, if it does."""
    lines = [
        "| budget | best of all runs | advised | worse by | over | advised with --measure | worse by | over |",
        "|---|---|---|---:|---:|---|---:|---:|",
    ]
    for row in rows:
        size = (
            f"{row['budget'] / 1e6:.0f} MB"
            if row["limit"] == "bytes"
            else f"{row['budget']:.1f} ms of {row['limit'].removesuffix('_ms')}"
        )
        cells = [size, f"{row['best']}, {row['perplexity']:.1f}"]
        for name in ("predicted", "measured"):
            found = row.get(name)
            cells += (
                [found["way"], f"{found['quality']:+.1%}", f"{found['price']:.1%}" if found["price"] > 0 else ""]
                if found
                else ["none", "", ""]
            )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
