"""Time and memory of the commands on checkpoints of any size.

    python -m benchmarks.scale [--shapes 12-layers,24-layers] [--commands analyze,plan,...] [--memory 3GB]
        [--old WORKTREE] [--work DIR] [--json FILE] [--quick] [--table]

A row is one command on one shape, in a process of its own. Checkpoints are synthetic (`scale_checkpoint.py`). Rows that
the JSON file has are not run again, but failed ones are. `--table` only prints the file's rows as Markdown.

Memory is given twice: `anonymous_bytes`, the most anonymous memory of the command and its children (RssAnon, sampled
every 50 ms), and `peak_bytes`, the most resident memory of one process (ru_maxrss). The second counts pages of mapped
files, which the system may take back. The bound is 1 GB + 3 × the largest block in float32.

    plan         also over the time of reading and writing the same bytes, which comes right after
    old-and-new  SmolLM2-135M, `OLD_AND_NEW`, this tree and the one of `--old` in turns
    export       the bound is 1 GB + 2 × the largest tensor above what opening the result in ONNX Runtime takes
    processes    the stage that scores, in two processes of one thread and in one, in turns
    estimate     what `--estimate` prints, from a config alone
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import result_header, write_result

LLAMA3 = {"hidden": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8}
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"layers": 2, "hidden": 512, "ffn": 1408, "heads": 8, "kv_heads": 2, "vocab": 1000},
    "half-billion": {"layers": 10, "hidden": 2048, "ffn": 5632, "heads": 16, "kv_heads": 4, "vocab": 32000},
    "12-layers": {"layers": 12, **LLAMA3, "vocab": 32000},
    "24-layers": {"layers": 24, **LLAMA3, "vocab": 32000},
    "Llama-2-7B": {"layers": 32, "hidden": 4096, "ffn": 11008, "heads": 32, "kv_heads": 32, "vocab": 32000},
    "Llama-3-8B": {"layers": 32, **LLAMA3, "vocab": 128256},
    "Llama-3-70B": {"layers": 80, "hidden": 8192, "ffn": 28672, "heads": 64, "kv_heads": 8, "vocab": 128256},
}
FILES = "--out {out} --no-onnx --data {model}/text.txt --eval-windows 4 --eval-length 64 {memory} {more}"
COMMANDS = {
    "analyze": "-m mptk analyze {model}",
    "plan": f"-m mptk prune {{model}} --plan {{model}}/plan.json {FILES}",
    "verify": "-m mptk verify {out} {memory}",
    "magnitude": f"-m mptk prune {{model}} --method magnitude --no-portable {FILES}",
    "wanda": f"-m mptk prune {{model}} --method wanda --reconstruct --samples 4 --length 64 --no-portable {FILES}",
}
"""Command → what Python gets. `verify` reads what `plan` wrote."""
OLD_AND_NEW = "-m mptk prune smollm2-135m --method wanda --no-onnx --data {text} --samples 8 --out {out}"
EXPORT = "-m mptk export {model} --quantize int8 --out {out} {memory}"
SESSION = "import sys; from mptk.ort.decoder import OrtDecoder; OrtDecoder(sys.argv[1])"
SCORING = f"-m mptk prune {{model}} --method wanda --samples 16 --length 256 --no-portable {FILES}"
LAUNCHER = "-m torch.distributed.run --standalone --nproc-per-node {processes}"
ESTIMATE = "-m mptk prune {model} --estimate --out {out} {memory} {more}"

Row = dict[str, Any]
GB = 1e9
SAMPLE_S = 0.05


# ---- one command ----


def measured(command: list[str], log: Path, *, threads: int, cwd: Path | None = None) -> Row:
    """Run Python with these arguments: wall time, processor time, memory, and the last line if it fails.

    This process must stay small (no torch): the system counts a child's peak from its parent's on.
    """
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "ACCELERATE_USE_CPU": "1"}
    began, most = time.perf_counter(), 0
    with log.open("w") as output:
        child = subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, cwd=cwd, env=env)
        try:
            while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
                most = max(most, sum(map(anonymous_bytes, family(child.pid))))
                time.sleep(SAMPLE_S)
        except BaseException:
            child.kill()
            raise
    child.returncode = code = os.waitstatus_to_exitcode(ended[1])
    usage = ended[2]
    row: Row = {
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_bytes": usage.ru_maxrss * 1024,
        "anonymous_bytes": most,
        "command": shlex.join(command),
    }
    if code:
        row["failed"] = f"exit {code}: {(log.read_text().strip().splitlines() or ['no word'])[-1][:300]}"
    return row


def family(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return
    for child in children:
        yield from family(int(child))


def anonymous_bytes(pid: int) -> int:
    """Resident anonymous memory; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def read_and_write(files: list[Path], written: int, scratch: Path) -> float:
    """Seconds to read all of ``files`` and write their first ``written`` bytes, in pieces as `cp` does."""
    buffer, began = memoryview(bytearray(1 << 20)), time.perf_counter()
    with scratch.open("wb", buffering=0) as copy:
        for file in files:
            with file.open("rb", buffering=0) as source:
                while size := source.readinto(buffer):
                    copy.write(buffer[: min(size, written)])
                    written -= min(size, written)
    seconds = time.perf_counter() - began
    scratch.unlink()
    return round(seconds, 3)


# ---- rows ----


class Bench:
    """The checkpoints and outputs in ``work``, and how commands are run."""

    def __init__(self, work: Path, threads: int, more: str, old: Path | None, rounds: int, memory: str) -> None:
        self.work, self.threads, self.more, self.old, self.rounds = work.resolve(), threads, more, old, rounds
        self.memory = f"--memory {memory}" if memory else ""
        self.log = self.work / "last.log"
        self.work.mkdir(parents=True, exist_ok=True)

    def checkpoint(self, shape: str, *, weights: bool = True) -> tuple[Path, Row]:
        """The folder of a shape, made if it is not there, and the sizes in its `shape.json`."""
        folder = self.work / (shape if weights else f"{shape}-config")
        if not (folder / "shape.json").is_file():
            sizes = [
                word for name, size in SHAPES[shape].items() for word in (f"--{name.replace('_', '-')}", str(size))
            ]
            flags = [] if weights else ["--config-only"]
            command = [sys.executable, "-m", "benchmarks.scale_checkpoint", str(folder), *sizes, *flags]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return folder, json.loads((folder / "shape.json").read_text())

    def run(self, command: str, *, launcher: str = "", threads: int = 0, cwd: Path | None = None, **names: Any) -> Row:
        words = shlex.split(f"{launcher} {command}".format(**{"more": self.more, "memory": self.memory, **names}))
        return measured(words, self.log, threads=threads or self.threads, cwd=cwd)

    def out(self, name: str) -> Path:
        """The folder for a command's result, which is not there."""
        folder = self.work / f"out-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    def command(self, name: str, shape: str) -> Row:
        model, sizes = self.checkpoint(shape)
        if name == "plan":
            return self.plan(model, shape) | sizes
        out = self.work / f"out-plan-{shape}"
        if name != "verify":
            out = self.out(f"{name}-{shape}")
        elif not out.is_dir():
            self.plan(model, shape)
        row = self.run(COMMANDS[name], model=model, out=out)
        shutil.rmtree(out, ignore_errors=True)
        return row | sizes | bounded(row, GB + 3 * sizes["block_bytes"])

    def plan(self, model: Path, shape: str) -> Row:
        """`prune --plan`, after its input was read once, and two copies of the same bytes; `verify` needs the folder."""
        self.copied(model, self.work)
        row = self.run(COMMANDS["plan"], model=model, out=(out := self.out(f"plan-{shape}")))
        sizes = json.loads((model / "shape.json").read_text())
        row |= bounded(row, GB + 3 * sizes["block_bytes"])
        if "failed" in row:
            return row
        copies = [self.copied(model, out) for _ in range(2)]
        return row | {"copy_seconds": copies, "copy_ratio": round(row["seconds"] / statistics.mean(copies), 2)}

    def copied(self, model: Path, out: Path) -> float:
        """Seconds to read the weights of ``model`` and write as many bytes as those of ``out`` have."""
        written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        return read_and_write(sorted(model.glob("*.safetensors")), written, self.work / "copy")

    def old_and_new(self) -> Row:
        text = self.checkpoint("tiny")[0] / "text.txt"
        trees = {"old": self.old, "new": Path.cwd()}
        rows: dict[str, list[Row]] = {tree: [] for tree in trees}
        for _ in range(self.rounds):
            for tree, cwd in trees.items():
                more = self.more if tree == "new" else ""
                row = self.run(f"{OLD_AND_NEW} {more}", text=text, out=self.out(tree), cwd=cwd)
                if "failed" in row:
                    return row
                rows[tree].append(row)
        return compared(rows, ("seconds", "cpu_seconds", "peak_bytes", "anonymous_bytes"))

    def export(self, shape: str) -> Row:
        model, sizes = self.checkpoint(shape)
        row = self.run(EXPORT, model=model, out=(out := self.out("export")))
        if "failed" in row:
            return row | sizes
        session = measured(["-c", SESSION, str(out / "onnx" / "model.onnx")], self.log, threads=self.threads)
        shutil.rmtree(out)
        row |= {"session_bytes": session["anonymous_bytes"]}
        return row | sizes | bounded(row, GB + 2 * sizes["tensor_bytes"] + session["anonymous_bytes"])

    def processes(self, shape: str) -> Row:
        model, sizes = self.checkpoint(shape)
        rows: dict[str, list[Row]] = {"one": [], "two": []}
        for _ in range(self.rounds):
            for name, count in (("one", 1), ("two", 2)):
                out = self.out("processes")
                row = self.run(SCORING, launcher=LAUNCHER, processes=count, threads=1, model=model, out=out)
                if "failed" in row:
                    return row | sizes
                stages = json.loads((out / "report.json").read_text())["stages"]
                row["score_seconds"] = sum(s["seconds"] for s in stages if s["name"].startswith("score"))
                row["plan"] = json.loads((out / "report.json").read_text())["plan_sha256"]
                rows[name].append(row)
        plans = {row["plan"] for both in rows.values() for row in both}
        return compared(rows, ("score_seconds", "seconds", "anonymous_bytes")) | {"same_plan": len(plans) == 1, **sizes}

    def estimate(self, shape: str) -> Row:
        model, sizes = self.checkpoint(shape, weights=False)
        row = self.run(ESTIMATE, model=model, out=self.out("estimate"))
        printed = self.log.read_text()
        if "will need" in printed:  # that it does not fit here is an answer too
            row.pop("failed", None)
        return row | sizes | {"printed": printed}


def bounded(row: Row, bound: float) -> Row:
    """The bound, and both peaks as shares of it."""
    ratios = {f"{name}_ratio": round(row[f"{name}_bytes"] / bound, 3) for name in ("anonymous", "peak")}
    return {"bound_bytes": round(bound), **ratios}


def compared(rows: dict[str, list[Row]], figures: tuple[str, ...]) -> Row:
    """Medians of the runs of two kinds, and the second's over the first's."""
    medians = {kind: {f: statistics.median(r[f] for r in found) for f in figures} for kind, found in rows.items()}
    first, second = medians.values()
    return {
        **medians,
        "ratio": {f: round(second[f] / first[f], 3) for f in figures},
        "rounds": len(next(iter(rows.values()))),
    }


# ---- the file and its table ----


def table(rows: list[Row]) -> str:
    lines = [
        "| shape | command | wall | CPU | anonymous peak | resident peak | bound | anonymous / bound | over a copy |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in (r for r in rows if "anonymous_ratio" in r and "failed" not in r):
        sizes = " | ".join(f"{row[f'{name}_bytes'] / GB:.2f} GB" for name in ("anonymous", "peak", "bound"))
        lines.append(
            f"| {row['shape']} | {row['row']} | {row['seconds']:.1f} s | {row['cpu_seconds']:.1f} s | {sizes} "
            f"| {row['anonymous_ratio']:.2f} | {row.get('copy_ratio', '')} |"
        )
    for row in (r for r in rows if "ratio" in r):
        kinds = [kind for kind in row if isinstance(row[kind], dict) and kind != "ratio"]
        lines += ["", f"{row['row']} {row['shape']}, medians of {row['rounds']}:", ""]
        lines += [f"| | {' | '.join(kinds)} | ratio |", "|---|---:|---:|---:|"]
        for figure, ratio in row["ratio"].items():
            values = (row[kind][figure] for kind in kinds)
            shown = (f"{v / GB:.2f} GB" if figure.endswith("bytes") else f"{v:.1f} s" for v in values)
            lines.append(f"| {figure.rpartition('_')[0] or 'wall'} | {' | '.join(shown)} | {ratio:.2f} |")
    for row in (r for r in rows if "printed" in r and "failed" not in r):
        lines += ["", f"{row['row']} {row['shape']}:", "", "```", row["printed"].rstrip(), "```"]
    lines += ["", *(f"{row['row']} {row['shape']} failed: {row['failed']}" for row in rows if "failed" in row)]
    return "\n".join(lines).rstrip()


def jobs(bench: Bench, shapes: list[str], export: str, scored: str) -> Iterator[tuple[str, str, Callable[[], Row]]]:
    """Row, shape, and what makes the row."""
    for shape in shapes:
        for name in COMMANDS:
            yield name, shape, lambda name=name, shape=shape: bench.command(name, shape)  # type: ignore[misc]
    if bench.old is not None:
        yield "old-and-new", "SmolLM2-135M", bench.old_and_new
    yield "export", export, lambda: bench.export(export)
    yield "processes", scored, lambda: bench.processes(scored)
    for shape in ("Llama-3-8B", "Llama-3-70B"):
        yield "estimate", shape, lambda shape=shape: bench.estimate(shape)  # type: ignore[misc]


def rows_in(file: Path) -> list[Row]:
    return json.loads(file.read_text())["rows"] if file.is_file() else []


def main(
    shapes: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(SHAPES)}.")] = "12-layers,24-layers",
    commands: Annotated[str, typer.Option(help="Rows to run, comma-separated; all by default.")] = "",
    memory: Annotated[str, typer.Option(help="The commands' --memory.")] = "",
    more: Annotated[str, typer.Option(help="Options for every prune of this tree.")] = "",
    export: Annotated[str, typer.Option(help="Shape that is exported.")] = "half-billion",
    scored: Annotated[str, typer.Option(help="Shape that two processes score.")] = "half-billion",
    old: Annotated[Path | None, typer.Option(help="A checkout of an older commit, for old-and-new.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of what alternates.")] = 3,
    threads: int = os.cpu_count() or 1,
    work: Annotated[Path, typer.Option(help="Folder for checkpoints and outputs.")] = Path("runs/scale"),
    json_file: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/scale.json"),
    quick: Annotated[bool, typer.Option("--quick", help="The tiny shape, one turn: to see that it runs.")] = False,
    show: Annotated[bool, typer.Option("--table", help="Print the table of the JSON file, run nothing.")] = False,
) -> None:
    if quick:
        shapes = export = scored = "tiny"
        rounds = 1
    bench = Bench(work, threads, more, old, rounds, memory)
    wanted = [name for name in commands.split(",") if name]
    for name, shape, job in jobs(bench, shapes.split(","), export, scored):
        done = any((r["row"], r["shape"]) == (name, shape) and "failed" not in r for r in rows_in(json_file))
        if show or done or (wanted and name not in wanted):
            continue
        row = {"row": name, "shape": shape, **job(), "threads": threads}
        print(json.dumps(row), flush=True)
        others = [r for r in rows_in(json_file) if (r["row"], r["shape"]) != (name, shape)]
        write_result(json_file, result_header(), [*others, row])
    print(table(rows_in(json_file)))


if __name__ == "__main__":
    typer.run(main)
