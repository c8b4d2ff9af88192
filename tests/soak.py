"""An hour of random commands over tiny models of every kind, a fifth of them killed.

    python -m tests.soak [--minutes 60] [--seed 0] [--json FILE]

Commands run one after the other in this process, as in a notebook that stays open; those that are killed run in a fork of
it (``tests/crash/forked.py``). Commands, models, options and kills are drawn from the seed. Some are wrong on purpose. After
each command:

- it ended as its exit code says: 0, one line with 1 or 2, and for a kill 130, 143 or the signal; never with a traceback;
- nothing of it is left: no hidden folder beside its files, in the cache or among the temporary files. What a killed
  command leaves goes with the next one that names something beside it and whose options can be read.

At the end memory and open files of this process must be flat. Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import io
import os

os.environ |= {"OMP_NUM_THREADS": "1", "TTY_INTERACTIVE": "0", "COLUMNS": "1000", "HF_HUB_OFFLINE": "1"}
# Else torch's two caches of kernels for up to 1024 shapes, in bfloat16 35 kB each, hide what mptk holds.
os.environ |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "1"}

import ctypes
import gc
import json
import random
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import result_header, write_result
from mptk.cli.main import main as command_line
from mptk.files.staging import read_owner
from tests.crash.forked import Trap, run

ALLOWED = {0, 1, 2}
KILLED = {130, 143, -signal.SIGKILL, -signal.SIGTERM}
"""The last one: between a command's end and the interpreter's."""
GROWTH = 20e6
"""Most bytes that memory may grow by from the second quarter of the commands to the last."""
MODELS = {
    "llama": "text.txt",
    "kinds/encoder": "kinds/text.txt",
    "kinds/text classifier": "kinds/text.txt",
    "kinds/encoder-decoder": "kinds/text.txt",
    "kinds/image classifier": "kinds/images",
    "kinds/speech": "kinds/sounds",
}
OUTPUTS = ("a", "b", "c")
"""Folders that commands write, read, and replace."""
NAMED = {*OUTPUTS, "llama", "text.txt", "nowhere", "found.json", "found.gguf"}
"""Names beside which commands write."""
WRONG = (
    "analyze nowhere",
    "prune llama --sparsity 2 --out a",
    "prune llama --width ffn=7 --method wanda --data text.txt --no-onnx --out a",
    "prune llama --method wanda --data nowhere.txt --out a",
    "prune llama --method wanda --quantize int8 --no-onnx --out a",
    "prune llama --method wanda --data text.txt --out llama",
    "prune llama --metod wanda --out a",
    "recover llama --out b",
    "verify llama",
    "report text.txt",
    "generate llama fox",
    "prune --config text.txt",
)


class Draw:
    """Commands, as a seed draws them."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.known: dict[tuple[str, str], dict[str, list[int]]] = {}

    def command(self) -> list[str]:
        kinds = {self.prune: 8, self.analyze: 2, self.read: 6, self.recover: 2, self.write: 2, self.wrong: 2}
        return self.random.choices(list(kinds), list(kinds.values()))[0]()

    def some(self, *options: str) -> list[str]:
        """Each option with a chance of one in three."""
        return [word for option in options if self.random.random() < 1 / 3 for word in shlex.split(option)]

    def model(self) -> str:
        return self.random.choices(list(MODELS), [5, 1, 1, 1, 1, 1])[0]

    def out(self) -> str:
        return self.random.choice(OUTPUTS)

    def measured(self, data: str) -> list[str]:
        return ["--data", data, *shlex.split("--length 16 --eval-windows 2 --eval-length 16")]

    def prune(self) -> list[str]:
        model = self.model()
        method = self.random.choice(("magnitude", "wanda", "flap", "taylor", "fisher", "random"))
        words = ["prune", model, "--method", method, *self.measured(MODELS[model]), "--samples", "4"]
        target = self.random.choice(("stock", "stock", "graph"))
        words += ["--target", target, "--align", "1", *self.shape(model, target)]
        words += self.some(
            "--reconstruct",
            "--reconstruct --distil-epochs 1",
            "--seed 3",
            "--memory 2GB",
            "--compute-dtype bfloat16",
        )
        words += self.some("--no-portable") if target == "stock" else []
        words += self.random.choice(("--no-onnx", "--no-onnx --dtype bfloat16", "")).split()
        if model == "llama":
            words += self.of_decoders(target)
        return [*words, "--out", self.out(), *self.some("--resume")]

    def of_decoders(self, target: str) -> list[str]:
        """Training now and then, and options that only a decoder takes. A graph is trained with all its weights."""
        rank = "--rank 2" if target == "stock" else ""
        training = f"--steps 4 --batch 2 --micro 2 --save-every 2 {rank}" if self.random.random() < 0.2 else ""
        search = "--search --search-shapes 4 --search-tokens 0"
        more = ("", "", "--vocabulary text.txt", "--layers free", "--kv-heads 1", search)
        return shlex.split(f"{training} {self.random.choice(more)}")

    def shape(self, model: str, target: str) -> list[str]:
        """Widths of one or two families, or a share of the parameters, which small models seldom meet."""
        if self.random.random() < 0.2:
            return ["--sparsity", f"{self.random.uniform(0.1, 0.5):.2f}"]
        legal = self.legal(model, target)
        names = self.random.sample(sorted(legal), min(len(legal), self.random.randint(1, 2)))
        widths = [word for name in names for word in ("--width", f"{name}={self.random.choice(legal[name])}")]
        return ["--families", ",".join(names), *widths]

    def legal(self, model: str, target: str) -> dict[str, list[int]]:
        """Family → the widths below the dense one that the target holds."""
        if (model, target) not in self.known:
            code, said = here(["analyze", model, "--target", target, "--align", "1", "--json", "-"])
            assert code == 0, said
            found = json.loads(said[said.index("{") :])["families"]
            self.known[model, target] = {f["name"]: w for f in found if (w := f["legal_widths"][:-1])}
        return self.known[model, target]

    def analyze(self) -> list[str]:
        options = self.some(
            "--target graph", "--align 4", "--tensor-parallel 2", "--json found.json", "--html found.html"
        )
        return ["analyze", self.model(), *options]

    def read(self) -> list[str]:
        folder = self.out()
        return shlex.split(
            self.random.choice(
                (
                    f"verify {folder}",
                    f"report {folder} {self.out()} --html report.html",
                    f"report {folder}",
                    f"eval {folder} --data text.txt --length 16 --windows 2",
                    f"generate {folder} 'the quick fox' --max-new-tokens 8",
                    f"rerun {folder} --out {self.out()}",
                    "show llama",
                    "models",
                    "ops",
                    "passes",
                )
            )
        )

    def recover(self) -> list[str]:
        training = shlex.split("--steps 4 --batch 2 --micro 2 --rank 2 --save-every 2 --no-onnx")
        return ["recover", self.out(), *self.measured("text.txt"), *training, "--out", self.out()]

    def write(self) -> list[str]:
        """A command that writes what is not pruned, or a pruned model in another form."""
        model = self.model()
        return self.random.choice(
            (
                ["export", model, "--out", self.out(), *self.some("--quantize int8")],
                ["gguf", self.out(), "--like", "toy.gguf", "--out", "found.gguf"],
            )
        )

    def wrong(self) -> list[str]:
        return shlex.split(self.random.choice(WRONG))

    def trap(self) -> Trap | None:
        """Where the command is killed: one in five is."""
        if self.random.random() >= 0.2:
            return None
        how = self.random.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        return Trap(how, seconds=self.random.uniform(0.01, 4))


def here(arguments: list[str]) -> tuple[int, str]:
    """Run a command in this process: its exit code, and what it said on both streams."""
    said, code = io.StringIO(), 0
    sys.argv = ["mptk", *arguments]
    with redirect_stdout(said), redirect_stderr(said):
        try:
            command_line()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return code, said.getvalue()


def wrong_with(command: list[str], code: int, said: str, allowed: set[int], place: Path) -> list[str]:
    """What is wrong with how a command ended and with what is left; a killed one may leave something."""
    found = [] if code in allowed else [f"exit code {code}: {said[-300:]}"]
    if "Traceback (most recent call last)" in said:
        found.append(f"a traceback: {said[-300:]}")
    if "please report" in said.lower():  # as after a proof that fails
        found.append(f"an error of mptk's own: {said[-300:]}")
    if code in (1, 2) and not (said.splitlines() or [""])[-1].startswith("error: "):
        found.append(f"no line on what is wrong: {said[-300:]}")
    if allowed == ALLOWED and code != 2 and NAMED.intersection(command):
        left = {*place.rglob(".*mptk*"), *(place / "tmp").iterdir()}
        found += [f"{path.relative_to(place)} is left" for path in sorted(left) if not held(path)]
    return found


def held(path: Path) -> bool:
    """Whether this process still has a staging folder: one goes with the last model that reads weights from it."""
    return read_owner(path).get("pid") == os.getpid()


def memory() -> int:
    """Bytes of this process that are in memory, without what the C library keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grown(sizes: list[int], files: list[int]) -> list[str]:
    """Whether memory and open files grew from the second quarter of the commands to the last, in words."""
    quarter = len(sizes) // 4
    if quarter < 10:
        return []
    early, late = (statistics.median(sizes[part]) for part in (slice(quarter, 2 * quarter), slice(-quarter, None)))
    found = [f"memory grew from {early / 1e6:.0f} to {late / 1e6:.0f} MB"] if late > early + GROWTH else []
    more = max(files[-quarter:]) - max(files[quarter : 2 * quarter])
    return found + ([f"{more} more files are open"] if more > 0 else [])


def write_inputs(place: Path) -> None:
    """Models of every kind, data for them, and empty folders for the cache and temporary files."""
    from gguf import GGMLQuantizationType

    from benchmarks.gguf_file import write_gguf
    from mptk import testing
    from mptk.testing import write_kind
    from mptk.testing.kinds import write_data

    write_data(place / "kinds")
    for model in MODELS:
        if model.startswith("kinds/"):
            write_kind(Path(model).name, place / model)
    llama = testing.make_llama()
    testing.save_model(llama, place / "llama")
    write_gguf(llama, testing.make_tokenizer(), place / "toy.gguf", "Toy", lambda _: GGMLQuantizationType.F32)
    shutil.copy(place / "kinds" / "text.txt", place)
    for name in ("cache", "tmp"):
        (place / name).mkdir()


def main(
    minutes: float = 60.0,
    seed: int = 0,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    json_file, header = json_file and json_file.resolve(), result_header()
    work = Path(tempfile.mkdtemp(prefix="soak-"))
    place = work / "place"
    place.mkdir()
    write_inputs(place)
    os.environ |= {"MPTK_CACHE": str(place / "cache"), "TMPDIR": str(place / "tmp")}
    tempfile.tempdir = None
    os.chdir(place)
    draw, counts, wrong = Draw(seed), Counter[str](), list[str]()
    sizes, files = list[int](), list[int]()
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        command, trap = draw.command(), draw.trap()
        if draw.random.random() < 0.5:  # as a user does who reads that a run had other settings
            for unfinished in place.glob("*.run"):
                shutil.rmtree(unfinished)
        if trap is None:
            code, said = here(command)
            found = wrong_with(command, code, said, ALLOWED, place)
        else:
            ended = run(command, place, work / "aside", trap)
            code, said = ended.code, ended.said
            found = wrong_with(command, code, said, ALLOWED | KILLED, place)
        counts |= {"commands": counts["commands"] + 1, f"exit {code}": counts[f"exit {code}"] + 1}
        counts["killed"] += code in KILLED
        wrong += [f"{shlex.join(command)}: {each}" for each in found]
        sizes.append(memory())
        files.append(len(os.listdir("/proc/self/fd")))
        print(f"{counts['commands']} {shlex.join(command)} → {code} {'; '.join(found) or 'ok'}", flush=True)
        if code == 1:
            print(f"    {said.splitlines()[-1]}", flush=True)
    wrong += grown(sizes, files)
    os.chdir("/")
    shutil.rmtree(work)
    sizes_mb = [round(size / 1e6) for size in sizes[:: max(1, len(sizes) // 20)]]
    header |= {"seed": seed, "minutes": minutes, **counts, "wrong": len(wrong), "memory_mb": sizes_mb}
    header |= {"open_files": [min(files), max(files)]}
    if json_file is not None:
        write_result(json_file, header, [{"wrong": each} for each in wrong])
    print(f"seed {seed}: {counts['commands']} commands, {counts['killed']} killed, {len(wrong)} wrong")
    raise typer.Exit(bool(wrong))


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
