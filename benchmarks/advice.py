"""How well ``mptk advise`` predicts what full runs of ``mptk prune`` give.

    python -m benchmarks.advice --text NAME=FILE … [--model smollm2-135m] [--sparsities 0.1,0.2,0.3,0.4,0.5]
        [--steps 16] [--batch 4] [--samples 48] [--length 128] [--windows 16] [--json FILE] [--work DIR] [--quick]

A tenth of each text is held out. One `advise --calibrate` reads the rest. For each sparsity `prune --method wanda
--reconstruct` reads the rest, too, and `recover` trains its result. Every model is measured on the same windows of what
was held out. Rows that the JSON file has are not computed again.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer

from benchmarks.quality import add, rows_in
from benchmarks.quality_text import documents, pieces
from mptk import prune, recover
from mptk.io import data, models

SHARE = 10
"""One piece of text in this number is held out."""


@dataclass(frozen=True)
class Texts:
    """Name → windows that are held out, and the files of the rest as ``--data`` names them."""

    rest: str
    windows: Mapping[str, Path]


def split(texts: Mapping[str, Path], work: Path) -> Texts:
    """Write a file with the held-out pieces of each text, in random order, and a file with its other pieces."""
    work.mkdir(parents=True, exist_ok=True)
    rest, windows = [], {}
    for name, file in texts.items():
        found = [piece for text in documents(file) for piece in pieces(text)]
        count = max(1, len(found) // SHARE)
        held_out = found[-count:]
        random.Random(0).shuffle(held_out)
        windows[name] = _written(work / f"{name}-held-out.jsonl", held_out)
        rest.append(str(_written(work / f"{name}.jsonl", found[:-count])))
    return Texts(",".join(rest), windows)


def _written(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@torch.no_grad()
def losses(folder: str, texts: Texts, length: int, count: int) -> dict[str, list[float]]:
    """Text → nats a token in each of its held-out windows."""
    loaded = models.load(folder)
    model, found = loaded.model.eval(), {}
    for name, file in texts.windows.items():
        windows = data.evaluation_windows(loaded.tokenizer, str(file), length, count)
        each = (model(ids[None], use_cache=False).logits[0].float() for ids in windows)
        found[name] = [
            round(float(F.cross_entropy(out[:-1], ids[1:])), 5) for out, ids in zip(each, windows, strict=True)
        ]
    return found


def runs(
    model: str, sparsity: float, samples: int, steps: int, batch: int, keywords: Mapping[str, Any], work: Path
) -> Iterator[tuple[int, Path]]:
    """Training steps → the folder of a full run, without recovery and then with it."""
    cut = work / f"cut-{sparsity:g}"
    if not cut.is_dir():
        chosen = {"method": "wanda", "reconstruct": True, "onnx": False, "eval_windows": 1}
        prune(model, cut, sparsity=sparsity, samples=samples, **chosen, **keywords)
    yield 0, cut
    recovered = work / f"recovered-{sparsity:g}"
    if not recovered.is_dir():
        recover(cut, recovered, steps=steps, batch=batch, onnx=False, eval_windows=1, **keywords)
    yield steps, recovered


def main(
    text: Annotated[list[str], typer.Option(help="NAME=FILE, may be repeated.")],
    model: str = "smollm2-135m",
    sparsities: str = "0.1,0.2,0.3,0.4,0.5",
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
    texts = split({name: Path(file) for name, _, file in (each.partition("=") for each in text)}, work)
    asked = {"model": model, "samples": samples, "length": length, "windows": windows}
    keywords = {"data": texts.rest, "length": length, "proof_length": 64}

    def known(**row: Any) -> dict[str, Any] | None:
        return next((r for r in rows_in(json_file) if r.items() >= (asked | row).items()), None)

    def keep(row: dict[str, Any], folder: str, began: float) -> None:
        minutes = round((time.process_time() - began) / 60, 1)
        found = asked | row | {"processor_minutes": minutes, "losses": losses(folder, texts, length, windows)}
        print({name: value for name, value in found.items() if name != "losses"}, flush=True)
        add(json_file, found)

    if known(kind="dense") is None:
        keep({"kind": "dense"}, model, time.process_time())
    for sparsity in map(float, sparsities.split(",")):
        if known(kind="run", sparsity=sparsity, steps=steps) is None:
            began = time.process_time()
            for trained, folder in runs(model, sparsity, samples, steps, batch, keywords, work):
                if known(kind="run", sparsity=sparsity, steps=trained) is None:
                    keep({"kind": "run", "sparsity": sparsity, "steps": trained}, str(folder), began)
                began = time.process_time()
            for name in ("cut", "recovered"):
                shutil.rmtree(work / f"{name}-{sparsity:g}")


if __name__ == "__main__":
    typer.run(main)
