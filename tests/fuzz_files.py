"""Damaged files for every reader: each is read, or refused by an MptkError, within bounds of time and memory.

    python -m tests.fuzz_files --minutes 30

Inputs are made from good files by seeded mutations of bytes, of JSON values and of lines. Batches run in processes of
their own, so that a crash of a library is a finding too. The result in ``benchmarks/results/fuzz_files.json`` is written
after each batch, and a later call goes on from it: what was found is read again, and is mended if it is refused now. A finding names its reader and its seed: ``--only READER:SEED``
writes that input to a file and reads it in this process.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import wave
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save
from torch import nn

import mptk
from benchmarks.common import limit_memory, result_header, write_result
from mptk import MptkError, Plan, Report
from mptk.config import read_recipe
from mptk.errors import find_exhaustion
from mptk.features.kinds.audio import read_sound
from mptk.io import load_tensors, models, read_archive, read_metadata
from mptk.io.text.files import read_file_documents
from mptk.io.untrusted import check_folder
from mptk.protocols import check_unfinished_run, make_run_folder
from mptk.protocols.run_folder import FACTS
from mptk.publish.manifest import check_manifest
from mptk.reading import make_damage_error, parse_json
from mptk.report import sections as views
from mptk.report.runs import read_bench, read_run
from mptk.run.prune import read_choice_facts
from mptk.targets.archive import write_archive
from mptk.tasks.inputs.images import open_image
from tests.damage import mutated

RESULT = Path("benchmarks/results/fuzz_files.json")
BATCH, SECONDS, MEMORY = 40, 20, 2 << 30
"""Inputs of a process; seconds that one may take; bytes that a process may have beside what it starts with."""

Read = Callable[[Path], object]


def shown(view: object) -> None:
    Console(file=io.StringIO(), width=200).print(view)


def of_folder(read: Read) -> Read:
    return lambda path: read(path.parent)


def tokens_of(folder: Path) -> None:
    models.load_tokenizer(str(folder))("some words")


def documents(path: Path) -> None:
    for document in read_file_documents(path):
        for _ in document:
            pass


def unfinished(path: Path) -> None:
    check_unfinished_run(path.parent.with_name(path.parent.name.removesuffix(".run")), {"method": "wanda"}, True)


def kept(path: Path) -> None:
    found = read_metadata(path, make_damage_error(path)).get(FACTS, "{}")
    Plan.from_json(read_choice_facts(parse_json(found, make_damage_error(path)), path.parent)["plan"])


READERS: Mapping[str, tuple[str, Read]] = {
    "plan": ("pruned/plan.json", Plan.load),
    "report": ("pruned/report.json", of_folder(lambda folder: shown(views.build_prune_view(Report.read(folder))))),
    "manifest": ("pruned/mptk.json", of_folder(check_manifest)),
    "bench": (
        "pruned/bench.json",
        of_folder(lambda folder: shown(views.build_bench_view(found)) if (found := read_bench(folder)) else None),
    ),
    "metrics": ("pruned/metrics.jsonl", of_folder(lambda folder: read_run(folder, "x"))),
    "recipe": ("pruned/run.yaml", read_recipe),
    "settings": ("out.run/settings.json", unfinished),
    "choice": ("out.run/choice.safetensors", kept),
    "weights": ("model/model.safetensors", lambda path: load_tensors(path, MptkError)),
    "archive": ("model.pt2", read_archive),
    "index": ("model/model.safetensors.index.json", of_folder(check_folder)),
    "config": ("model/config.json", of_folder(lambda folder: models.build_skeleton(str(folder)))),
    "generation config": ("model/generation_config.json", of_folder(check_folder)),
    "tokenizer": ("model/tokenizer.json", of_folder(tokens_of)),
    "tokenizer config": ("model/tokenizer_config.json", of_folder(tokens_of)),
    "gguf": ("toy.gguf", lambda path: models.load_config(str(path))),
    "jsonl": ("t.jsonl", documents),
    "json": ("t.json", documents),
    "jsonl.gz": ("t.jsonl.gz", documents),
    "csv": ("t.csv", documents),
    "parquet": ("t.parquet", documents),
    "text": ("t.txt", documents),
    "png": ("i.png", open_image),
    "jpeg": ("i.jpg", open_image),
    "wav": ("s.wav", lambda path: read_sound(path, 16_000)),
}
"""Reader → the good file that its inputs are made from, and how it is read."""


# ---- good files ----


def make_seeds(root: Path) -> None:
    """The files of ``READERS`` below ``root``."""
    from tests.bad_inputs.shared import write_folders

    write_folders(root)
    write_archive(root / "model.pt2", mptk.trace(nn.Linear(3, 2), torch.randn(2, 3), dynamic=True))
    case = {"phase": "decode", "length": 8, "batch": 1, "threads": 1}
    row = {
        "graph": "g",
        "case": case,
        "ms": 1.0,
        "iqr_ms": 0.1,
        "tokens_s": 9.0,
        "ratio": 1.0,
        "ideal": 1.0,
        "work": 7,
        "roofline": 0.5,
    }
    graph = {"name": "g", "file": "g.onnx", "bytes": 7, "memory": 9}
    bench = {
        "graphs": [graph],
        "onnxruntime": "1",
        "rounds": 2,
        "peaks": {"1": {"flops": 1.0, "bandwidth": 1.0}},
        "rows": [row],
    }
    rows = [{"text": f"some words {n}", "n": n} for n in range(40)]
    lines = "".join(json.dumps(each) + "\n" for each in rows)
    choice = {
        "plan": json.loads((root / "pruned/plan.json").read_text()),
        "trained": [],
        "losses": {"ffn": 1.0},
        "notes": [],
    }
    weights = dict.fromkeys(("a", "b"), "model.safetensors")
    make_run_folder(root / "out.run")
    for name, content in {
        "pruned/bench.json": json.dumps(bench),
        "pruned/metrics.jsonl": json.dumps({"phase": "masks", "step": 1, "loss": 2.0}) + "\n",
        "out.run/settings.json": json.dumps({"method": "wanda", "learning": {"steps": 0}}),
        "model/model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weights}),
        "t.jsonl": lines,
        "t.json": json.dumps(rows),
        "t.csv": "text,n\n" + "".join(f'"some words",{n}\n' for n in range(40)),
        "t.txt": "some words " * 90,
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(content)
    (root / "t.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (root / "out.run/choice.safetensors").write_bytes(save({}, {FACTS: json.dumps(choice)}))
    (root / "out.run/samples.safetensors").write_bytes(save({"x": torch.zeros(2)}))
    image = Image.fromarray(np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3))
    image.save(root / "i.png")
    image.save(root / "i.jpg")
    with wave.open(str(root / "s.wav"), "wb") as sound:
        sound.setparams((1, 2, 16_000, 400, "NONE", ""))
        sound.writeframes(bytes(800))
    multiprocessing.get_context("spawn").Process(target=write_parquet, args=(root / "t.parquet",)).run()


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["some words"] * 40}), path)


# ---- running ----


def input_of(reader: str, seed: int, root: Path, place: Path) -> Path:
    """Write the input of a reader and a seed, among good files; returns its path."""
    name, _ = READERS[reader]
    folder = root / name.split("/")[0]
    if folder.is_dir() and not (place / folder.name).exists():
        shutil.copytree(folder, place / folder.name)
        if reader != "index":
            (place / "model/model.safetensors.index.json").unlink(missing_ok=True)
    file = place / name
    file.unlink(missing_ok=True)
    file.write_bytes(mutated((root / name).read_bytes(), random.Random(f"{reader}:{seed}")))
    return file


def outcome(reader: str, file: Path) -> str:
    """``read``, ``refused`` or what went wrong."""
    signal.signal(signal.SIGALRM, _slow)
    signal.alarm(SECONDS)
    try:
        READERS[reader][1](file)
    except MptkError:
        return "refused"
    except Exception as error:
        if find_exhaustion(error) is not None:
            return "out of memory"
        said = str(error).replace(tempfile.gettempdir(), "")
        at = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in at if "/mptk/" in frame.filename] or at
        return f"{type(error).__name__}: {said[:120]} ({Path(own[-1].filename).name}:{own[-1].name})"
    finally:
        signal.alarm(0)
    return "read"


def _slow(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def batch(reader: str, seeds: range, root: Path, to: Any) -> None:
    """Read inputs in this process, within bounds; what came of each goes to ``to``."""
    limit_memory(MEMORY)
    sys.stdout = sys.stderr = io.StringIO()
    with tempfile.TemporaryDirectory() as place:
        for seed in seeds:
            file = input_of(reader, seed, root, Path(place))
            to.send((seed, None))
            to.send((seed, outcome(reader, file)))


def run_batch(reader: str, seeds: range, root: Path) -> dict[int, str]:
    """Seed → what came of it. A process that dies leaves what its last input was."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=batch, args=(reader, seeds, root, theirs))
    process.start()
    theirs.close()
    found: dict[int, str] = {}
    while True:
        try:
            if not ours.poll(3 * SECONDS):
                process.kill()
                break
            seed, result = ours.recv()
        except EOFError:
            break
        found[seed] = result or "the process died or hung"
    process.join()
    return found


def main() -> None:
    """Fuzz, or with ``--only`` repeat one input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="in all, with those of earlier calls")
    parser.add_argument("--fresh", action="store_true", help="start anew")
    parser.add_argument("--only", help="READER:SEED")
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "seeds"
        root.mkdir()
        make_seeds(root)
        if options.only:
            reader, _, seed = options.only.partition(":")
            place = Path(tempfile.mkdtemp())
            file = input_of(reader, int(seed), root, place)
            print(file)
            READERS[reader][1](file)
            return
        fuzz(root, options.minutes, options.json, options.fresh)


def fuzz(root: Path, minutes: float, file: Path, fresh: bool) -> None:
    known = json.loads(file.read_text()) if file.is_file() and not fresh else {}
    seconds, rows = known.get("seconds", 0.0), {row["reader"]: Counter(row) for row in known.get("rows", [])}
    findings, mended = known.get("findings", {}), known.get("mended", {})

    def write() -> None:
        about = {"seconds": round(seconds), "inputs": sum(row["inputs"] for row in rows.values())}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_result(
            file, {**result_header(), **about, "findings": findings, "mended": mended}, [*map(dict, rows.values())]
        )

    for name in list(findings):
        reader, _, seed = name.partition(":")
        if run_batch(reader, range(int(seed), int(seed) + 1), root).get(int(seed)) in ("read", "refused"):
            mended[name] = findings.pop(name)
            write()
    while seconds < 60 * minutes:
        reader = min(READERS, key=lambda name: rows.get(name, Counter())["seconds"])
        row, began = rows.setdefault(reader, Counter(reader=reader)), time.monotonic()
        row.pop("commit", None)  # its last inputs are of this one
        first = row["inputs"]
        for seed, result in run_batch(reader, range(first, first + BATCH), root).items():
            row[result if result in ("read", "refused") else "findings"] += 1
            if result not in ("read", "refused"):
                findings[f"{reader}:{seed}"] = result
                print(f"{reader}:{seed}  {result}", flush=True)
        row["inputs"] = first + BATCH
        took = time.monotonic() - began
        row["seconds"] += round(took, 2)
        seconds += took
        write()
    inputs = sum(row["inputs"] for row in rows.values())
    print(f"{inputs:,} inputs in {seconds / 60:.0f} minutes, {len(findings)} findings")


if __name__ == "__main__":
    sys.path.insert(0, "tests")
    main()
