"""Three sizes of a model: each cut from the dense one, each from the next larger one, or trained together.

    python -m benchmarks.ladder --train PATH[,PATH] --wikitext FILE --c4 FILE [--model smollm2-135m] [--sparsities 0.2,0.3,0.5]
        [--steps 48] [--batch 4] [--samples 48] [--length 128] [--windows 10] [--seeds 0] [--json FILE] [--work DIR] [--quick]

    separate   a `prune` run for each size
    cascaded   one `mptk.ladder`, also with half of the steps
    shared     one `mptk.ladder` with one set of weights for all sizes

All cut with Wanda and reconstruction, and train all weights. Steps, tokens and processor minutes are of all sizes
together. Rows that the JSON file has are not computed again; an interrupted way begins anew.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from benchmarks.quality import add, measure, rows_in
from benchmarks.quality_text import write_mixture
from mptk import ladder, prune, rung

TEXTS = {"wikitext2": "WikiText-2", "c4": "C4"}
"""Key of a row → the name of the text whose perplexity it has."""


@dataclass(frozen=True)
class Study:
    """``texts``: name → file that is measured on. ``data``: the training text."""

    model: str
    sparsities: Sequence[float]
    data: str
    texts: dict[str, str]
    samples: int
    length: int
    windows: int
    steps: int
    batch: int
    seed: int
    work: Path

    @property
    def asked(self) -> dict[str, Any]:
        """What the rows of one study have in common."""
        return {name: getattr(self, name) for name in ("model", "samples", "length", "windows", "batch", "seed")}

    @property
    def keywords(self) -> dict[str, Any]:
        """What all runs have in common."""
        how = {name: getattr(self, name) for name in ("data", "samples", "length", "batch", "seed")}
        return {**how, "method": "wanda", "reconstruct": True, "onnx": False, "eval_windows": 1, "proof_length": 64}

    @property
    def ways(self) -> list[tuple[str, int, Callable[[Path, int], None]]]:
        """Name, steps, and a function that makes the sizes in a folder."""
        full, half = self.steps, self.steps // 2
        return [
            ("separate", full, self.separate),
            ("cascaded", full, self.cascaded),
            ("cascaded", half, self.cascaded),
            ("shared", full, self.shared),
        ]

    def separate(self, out: Path, steps: int) -> None:
        for sparsity in self.sparsities:
            each = steps // len(self.sparsities)
            prune(self.model, self.folder(out, sparsity), sparsity=sparsity, steps=each, **self.keywords)

    def cascaded(self, out: Path, steps: int) -> None:
        ladder(self.model, out, self.sparsities, steps=steps, **self.keywords)

    def shared(self, out: Path, steps: int) -> None:
        largest = self.folder(out, self.sparsities[0])
        ladder(self.model, largest, self.sparsities, steps=steps, shared=True, **self.keywords)
        for sparsity in self.sparsities[1:]:
            rung(largest, sparsity, self.folder(out, sparsity))

    def folder(self, out: Path, sparsity: float) -> Path:
        return out / f"{sparsity:g}"


def fill(study: Study, file: Path) -> list[dict[str, Any]]:
    """Add the rows that the file lacks; returns all rows of the study."""
    nothing: dict[str, Any] = {"tasks": []}

    def known(**row: Any) -> bool:
        return any(r.items() >= (study.asked | row).items() for r in rows_in(file))

    def keep(row: dict[str, Any], folder: str) -> None:
        add(file, study.asked | row | measure(folder, study.texts, study.windows, nothing))
        print(rows_in(file)[-1], flush=True)

    if not known(way="dense"):
        keep({"way": "dense", "sparsity": 0.0}, study.model)
    for way, steps, make in study.ways:
        row = {"way": way, "steps": steps}
        if all(known(**row, sparsity=sparsity) for sparsity in study.sparsities):
            continue
        with tempfile.TemporaryDirectory(dir=study.work) as place:
            out, began = Path(place) / "sizes", time.process_time()
            make(out, steps)
            row |= {"tokens": steps * study.batch * study.length}
            row |= {"processor_minutes": round((time.process_time() - began) / 60, 1)}
            for sparsity in study.sparsities:
                keep({**row, "sparsity": sparsity}, str(study.folder(out, sparsity)))
    return [r for r in rows_in(file) if r.items() >= study.asked.items()]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a way and seed: perplexity at each size, and the geometric mean over sizes beside the separate runs'.

    Then, of several seeds, a line a way: the mean over sizes and seeds, by text and of both texts.
    """
    found = {(r["way"], r["steps"], r["seed"], r["sparsity"]): r for r in rows if r["way"] != "dense"}
    ways = sorted({key[:2] for key in found}, key=lambda way: (way[0] != "separate", way[0], -way[1]))
    seeds, sparsities = sorted({key[2] for key in found}), sorted({key[3] for key in found})
    columns = [f"{sparsity:.0%}: {text}" for sparsity in sparsities for text in TEXTS.values()]
    columns += [f"all: {text}" for text in TEXTS.values()]
    lines = [f"| | seed | tokens | processor minutes | {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) + 3)}"]
    means = ["", f"| all seeds | tokens | {' | '.join(TEXTS.values())} | both |", f"|---|{'---:|' * (len(TEXTS) + 2)}"]
    for way in ways:
        rises = dict[str, list[float]]({name: [] for name in TEXTS})
        for seed in seeds:
            each = [found[*way, seed, sparsity] for sparsity in sparsities]
            apart = [found[*ways[0], seed, sparsity] for sparsity in sparsities]
            cells = [f"{row[name]:.1f}" for row in each for name in TEXTS]
            for name in TEXTS:
                own = [math.log(a[name] / b[name]) for a, b in zip(each, apart, strict=True)]
                cells.append(_share(own))
                rises[name] += own
            row = each[0]
            lines.append(
                f"| {way[0]} | {seed} | {row['tokens']:,} | {row['processor_minutes']} | {' | '.join(cells)} |"
            )
        shares = [_share(own) for own in (*rises.values(), [rise for own in rises.values() for rise in own])]
        means.append(f"| {way[0]} | {each[0]['tokens']:,} | {' | '.join(shares)} |")
    return [*lines, *(means if len(seeds) > 1 else [])]


def _share(rises: Sequence[float]) -> str:
    return f"{math.expm1(fmean(rises)):+.1%}"


def main(
    train: Annotated[str, typer.Option(help="Files and folders of training text, comma-separated.")],
    wikitext: Annotated[str, typer.Option(help="WikiText-2 test.")],
    c4: Annotated[Path, typer.Option(help="C4 as JSON lines: the last documents are not trained on.")],
    model: str = "smollm2-135m",
    sparsities: str = "0.2,0.3,0.5",
    steps: Annotated[int, typer.Option(help="Training steps of all sizes together.")] = 48,
    batch: Annotated[int, typer.Option(help="Windows in a step.")] = 4,
    samples: Annotated[int, typer.Option(help="Windows to score and fit with.")] = 48,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 128,
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens of each text to measure on.")] = 10,
    seeds: str = "0",
    json_file: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/ladder.json"),
    work: Path = Path("runs/ladder"),
    quick: Annotated[bool, typer.Option("--quick", help="2 steps, few windows: to see that it runs.")] = False,
) -> None:
    sizes = [float(share) for share in sparsities.split(",")]
    if quick:
        steps, samples, windows = 2 * len(sizes), 8, 2
    training, held_out = write_mixture([Path(part) for part in train.split(",")], c4, work)
    texts = dict(zip(TEXTS, (wikitext, str(held_out)), strict=True))
    rows = list[dict[str, Any]]()
    for seed in map(int, seeds.split(",")):
        study = Study(model, sizes, str(training), texts, samples, length, windows, steps, batch, seed, work)
        rows += fill(study, json_file)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    typer.run(main)
