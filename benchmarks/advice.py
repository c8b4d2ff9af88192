"""How well ``mptk advise --calibrate`` predicts what full runs give.

    python -m benchmarks.advice --text NAME=FILE … [--model smollm2-135m] [--sparsities 0.1,0.2,0.3,0.4,0.5] [--tolerance 1]
        [--steps 16] [--batch 4] [--samples 48] [--length 128] [--windows 16] [--json FILE] [--work DIR] [--quick]

A tenth of each text is held out. One advice reads the rest. For each sparsity `prune --method wanda --reconstruct` reads
the rest, too, and `recover` trains its result. Each of these models is measured on the same windows of what was held out.
Rows that the JSON file has are not computed again.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

from benchmarks.quality import add, rows_in
from benchmarks.quality_text import documents, pieces
from mptk import advise, prune, recover
from mptk.features.advise.advice import STANDARD_ERRORS, Advice, Point, Range
from mptk.io import data, models
from mptk.reading import make_typed

SHARE = 10
"""One piece of text in this number is held out."""
BEGINNING = 600
"""Characters of a held-out piece that are measured on, so that the windows are of many documents."""
MEASURED = 8
"""Windows of each text that the advice measures on."""
TOLERANCES = (0.2, 0.5, 1.0, 2.0)


# ---- rows ----


@dataclass(frozen=True)
class Study:
    """``held_out``: name → file of each text. ``rest``: files with the rest of each, by name."""

    model: str
    held_out: Mapping[str, Path]
    rest: Mapping[str, Path]
    samples: int
    length: int
    windows: int
    steps: int
    batch: int
    work: Path

    @property
    def asked(self) -> dict[str, Any]:
        """What the rows of one study have in common."""
        return {name: getattr(self, name) for name in ("model", "samples", "length", "windows", "batch")}

    @property
    def keywords(self) -> dict[str, Any]:
        """What advice and full runs have in common."""
        return {"data": ",".join(map(str, self.rest.values())), "length": self.length, "proof_length": 64}

    def advice(self, sparsities: Sequence[float], tolerance: float) -> Advice:
        how = {"steps": self.steps, "batch": self.batch, "samples": self.samples, "eval_windows": MEASURED}
        return advise(self.model, sparsities=sparsities, tolerance=tolerance, calibrate=True, **how, **self.keywords)

    def runs(self, sparsity: float) -> Iterator[tuple[int, Path]]:
        """Training steps → the folder of a full run: without recovery, and with it."""
        cut, recovered = (self.work / f"{name}-{sparsity:g}" for name in ("cut", "recovered"))
        how = {"onnx": False, "eval_windows": 1, **self.keywords}
        if not cut.is_dir():
            prune(self.model, cut, sparsity=sparsity, samples=self.samples, method="wanda", reconstruct=True, **how)
        yield 0, cut
        if not recovered.is_dir():
            recover(cut, recovered, steps=self.steps, batch=self.batch, **how)
        yield self.steps, recovered
        shutil.rmtree(cut)
        shutil.rmtree(recovered)

    @torch.no_grad()
    def losses(self, folder: str) -> dict[str, list[float]]:
        """Text → nats a token in each of its held-out windows."""
        loaded = models.load(folder)
        model, found = loaded.model.eval(), {}
        for name, file in self.held_out.items():
            windows = data.load_evaluation_windows(loaded.tokenizer, str(file), self.length, self.windows)
            outputs = (model(ids[None], use_cache=False).logits[0].float() for ids in windows)
            losses = [F.cross_entropy(out[:-1], ids[1:]) for out, ids in zip(outputs, windows, strict=True)]
            found[name] = [round(float(loss), 5) for loss in losses]
        return found


def split(texts: Mapping[str, Path], work: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Write the beginnings of the held-out pieces of each text, in random order, and its other pieces."""
    work.mkdir(parents=True, exist_ok=True)
    held_out, rest = {}, {}
    for name, file in texts.items():
        found = [piece for text in documents(file) for piece in pieces(text)]
        count = max(1, len(found) // SHARE)
        last = [piece[:BEGINNING] for piece in found[-count:]]
        random.Random(0).shuffle(last)
        held_out[name] = _written(work / f"{name}-held-out.jsonl", last)
        rest[name] = _written(work / f"{name}.jsonl", found[:-count])
    return held_out, rest


def _written(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def fill(study: Study, sparsities: Sequence[float], tolerance: float, file: Path) -> list[dict[str, Any]]:
    """Add the rows that the file lacks; returns all rows of the study."""

    def known(**row: Any) -> bool:
        return any(r.items() >= (study.asked | row).items() for r in rows_in(file))

    def keep(row: dict[str, Any], began: float) -> None:
        minutes = round((time.process_time() - began) / 60, 1)
        add(file, study.asked | row | {"processor_minutes": minutes})
        print(row["kind"], row.get("sparsity", ""), row.get("steps", ""), minutes, flush=True)

    if not known(kind="dense"):
        keep({"kind": "dense", "losses": study.losses(study.model)}, time.process_time())
    if not known(kind="advice", steps=study.steps):
        began = time.process_time()
        found = study.advice(sparsities, tolerance).to_json()
        keep({"kind": "advice", "steps": study.steps, "advice": found}, began)
    for sparsity in sparsities:
        if known(kind="run", sparsity=sparsity, steps=study.steps):
            continue
        began = time.process_time()
        for steps, folder in study.runs(sparsity):
            row = {"kind": "run", "sparsity": sparsity, "steps": steps}
            if not known(**row):
                keep({**row, "losses": study.losses(str(folder))}, began)
            began = time.process_time()
    return [r for r in rows_in(file) if r.items() >= study.asked.items()]


# ---- tables ----


@dataclass(frozen=True)
class Compared:
    """An advice beside full runs.

    ``rises``: (sparsity, steps, text) → rise of the loss on held-out text and its standard error.
    """

    advice: Advice
    rises: Mapping[tuple[float, int, str], tuple[float, float]]
    texts: Mapping[str, str]
    steps: int

    @staticmethod
    def of(rows: Sequence[Mapping[str, Any]]) -> Compared:
        row = next(r for r in rows if r["kind"] == "advice")
        advice: Advice = make_typed(Advice, row["advice"])
        dense = next(r for r in rows if r["kind"] == "dense")["losses"]
        texts = {Path(text).stem: text for text in advice.texts}

        def rise(losses: Sequence[float], name: str) -> tuple[float, float]:
            rises = [a - b for a, b in zip(losses, dense[name], strict=True)]
            return fmean(rises), stdev(rises) / math.sqrt(len(rises))

        runs = [r for r in rows if r["kind"] == "run"]
        rises = {(r["sparsity"], r["steps"], name): rise(r["losses"][name], name) for r in runs for name in texts}
        return Compared(advice, rises, texts, row["steps"])

    def sparsities(self, steps: int) -> list[float]:
        return sorted({sparsity for sparsity, trained, _ in self.rises if trained == steps})

    def point(self, sparsity: float) -> Point:
        return min(self.advice.division, key=lambda point: abs(point.sparsity - sparsity))

    def change(self, sparsity: float, steps: int, name: str) -> Range:
        """The change of the perplexity, less and more two standard errors."""
        rise, error = self.rises[sparsity, steps, name]
        return Range(math.expm1(rise - STANDARD_ERRORS * error), math.expm1(rise + STANDARD_ERRORS * error))

    def cuts(self, steps: int) -> Iterator[str]:
        """A line a cut and text: the change of the perplexity as the advice says and as in full runs."""
        yield "| removed | text | advice | full run | do they overlap? |"
        yield "|---:|---|---:|---:|---|"
        for sparsity in self.sparsities(steps):
            point = self.point(sparsity)
            for name, text in self.texts.items():
                own, run = point.texts[text], self.change(sparsity, steps, name)
                error = STANDARD_ERRORS * own.error
                said = (
                    self.advice.estimate_after(point, text) if steps else Range(own.change - error, own.change + error)
                )
                trained = ", trained" if steps and self.advice.find_trained(point) is not None else ""
                over, under = said.least > run.most, said.most < run.least
                yield (
                    f"| {point.sparsity:.1%} | {name} | {_shown(said)}{trained} | {_shown(run)} "
                    f"| {'no, the advice says more' if over else 'no, the advice says less' if under else 'yes'} |"
                )

    def recommendations(self) -> Iterator[str]:
        """A line a tolerance: the recommended cut, and the largest whose full run keeps it on every text."""
        yield "| tolerance | advice | full runs | advice, trained | full runs, trained |"
        yield "|---:|---:|---:|---:|---:|"
        for tolerance in TOLERANCES:
            found = replace(self.advice, tolerance=tolerance)
            cells = [found.recommended, self.largest(tolerance, 0), found.recommended_after]
            cells.append(self.largest(tolerance, self.steps))
            yield f"| {tolerance:.0%} | {' | '.join('none' if c is None else f'{c.sparsity:.1%}' for c in cells)} |"

    def tables(self) -> list[list[str]]:
        return [list(self.cuts(0)), list(self.cuts(self.steps)), list(self.recommendations())]

    def largest(self, tolerance: float, steps: int) -> Point | None:
        """The largest cut of which no smaller one exceeds the tolerance on any text."""
        found = None
        for sparsity in self.sparsities(steps):
            if any(math.expm1(self.rises[sparsity, steps, name][0]) > tolerance for name in self.texts):
                break
            found = self.point(sparsity)
        return found


def _shown(change: Range) -> str:
    return f"{change.least:+.0%} to {change.most:+.0%}"


def main(
    text: Annotated[list[str], typer.Option(help="NAME=FILE, may be repeated.")],
    model: str = "smollm2-135m",
    sparsities: str = "0.1,0.2,0.3,0.4,0.5",
    tolerance: Annotated[float, typer.Option(help="Tolerance by which the advice chooses what it trains.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Training steps of a recovery.")] = 16,
    batch: Annotated[int, typer.Option(help="Windows in a step.")] = 4,
    samples: Annotated[int, typer.Option(help="Windows to score and fit with.")] = 48,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 128,
    windows: Annotated[int, typer.Option(help="Held-out windows of each text.")] = 16,
    json_file: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/advice.json"),
    work: Path = Path("runs/advice"),
    quick: Annotated[bool, typer.Option("--quick", help="2 steps, few windows: to see that it runs.")] = False,
) -> None:
    if quick:
        steps, samples, windows, sparsities = 2, 8, 4, "0.2,0.4"
    texts = {name: Path(file) for name, _, file in (each.partition("=") for each in text)}
    held_out, rest = split(texts, work)
    study = Study(model, held_out, rest, samples, length, windows, steps, batch, work)
    rows = fill(study, [float(share) for share in sparsities.split(",")], tolerance, json_file)
    found = Compared.of(rows)
    print("\n\n".join("\n".join(lines) for lines in found.tables()))


if __name__ == "__main__":
    typer.run(main)
