"""The zoo sweep: every model type that transformers registers, analysed, cut and proven.

    python -m benchmarks.zoo [--mapping NAME] [--types A,B] [--jobs N] [--json FILE] [--end-to-end]

Each type runs in a process of its own: a tiny random model is built and traced, and for every family units are chosen
at random in each layer (and in each row of its scope). The cut program must equal the dense one with those units
masked (relative difference at most 1e-5 of the largest logit, in fp32), and the mask must have moved the output; then
all families at once. A type is proven when every family is. For causal language models the row also says what the
stock class accepts of each family (``benchmarks/zoo_stock.py``).
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import random
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from benchmarks import zoo_end_to_end
from benchmarks.common import limit_memory, result_header, write_result
from benchmarks.tiny_models import MAPPINGS, CannotBuild, Tiny, model_types, tiny_model
from benchmarks.zoo_plans import random_plan
from benchmarks.zoo_stock import depth_acceptance, stock_acceptance
from mptk import rewrite
from mptk.errors import MptkError
from mptk.ir import Analysis, Plan, resolve_plan
from passes.analysis.group import analyze_program
from passes.frontend.trace import trace_to_program
from passes.transforms.masked_reference import mask
from passes.transforms.weight_types import Retype

Run = Callable[[str, str], dict[str, Any]]
"""Makes the row of a mapping and a type."""
TOLERANCE, MOVED = 1e-5, 1e-4
STOCK_LIMIT_S = 60
TIME_LIMIT_S, MEMORY_LIMIT_BYTES = 300, 6 << 30  # processor time; the clock may run three times as long
COMMANDS_LIMIT_S = 900  # the same for ``--end-to-end``, which runs six commands or more


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of ``b``."""
    return float((a - b).abs().max() / b.abs().max())


def prove(analysis: Analysis, inputs: Sequence[Tensor], seed: int = 0) -> Iterator[tuple[str, str]]:
    """For each family, and then for ``all`` of them together: its name and why it is not proven ("" if it is)."""
    rng = random.Random(seed)
    with torch.no_grad():
        dense = analysis.program(*inputs)
        families = list(analysis.all_families)
        for family in families:
            yield family.name, disprove(analysis, random_plan([family], rng), inputs, dense)
        if len(families) > 1:
            yield "all", disprove(analysis, random_plan(families, rng), inputs, dense)


def disprove(analysis: Analysis, plan: Plan, inputs: Sequence[Tensor], dense: Tensor) -> str:
    """Why a plan's cut does not equal its mask, or its mask moves nothing; "" if both are right."""
    try:
        masked = mask(analysis, resolve_plan(analysis, plan))(*inputs)
        cut = rewrite(analysis, plan, check=False)(*inputs)
    except Exception as error:
        return describe(error)
    wrong, moved = difference(cut, masked), difference(masked, dense)
    if not wrong <= TOLERANCE:
        return f"wrong by {wrong:.1e}{_in_double(analysis, plan, inputs)} (the mask moved the output by {moved:.1e})"
    return "" if moved > MOVED else f"vacuous: the mask moved the output by {moved:.1e} only"


def _in_double(analysis: Analysis, plan: Plan, inputs: Sequence[Tensor]) -> str:
    """The same difference in fp64, which tells rounding in an ill-conditioned model from a wrong cut."""
    cut = resolve_plan(analysis, plan)
    try:
        programs = [
            Retype(torch.float64)(p).program for p in (rewrite(analysis, plan, check=False), mask(analysis, cut))
        ]
        outputs = [p(*(t.double() if t.is_floating_point() else t for t in inputs)) for p in programs]
    except Exception as error:
        return f" in fp32 (fp64 does not run: {describe(error)})"
    return f" in fp32, {difference(*outputs):.1e} in fp64"


def calibrate(tiny: Tiny) -> None:
    """Take batch norms' statistics from the inputs: at random ones a deep stack of them would drown its signal."""
    norms = [m for m in tiny.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        tiny.wrapper(*tiny.inputs)
    tiny.model.eval()


def describe(error: BaseException) -> str:
    """One line: the error, and for one that is not meant for users the place in our source."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, MptkError):
        return text
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "passes" in f.filename or "mptk" in f.filename]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {text}{place}"


def run_type(mapping: str, model_type: str) -> dict[str, Any]:
    """One row of the table, from the first of three sets of random weights that is not ill-conditioned.

    Weights count as ill-conditioned if a family differs in fp32 and not in fp64 (by less than 1e-9): rounding, not the
    cut. ``seed`` says which set the row is from.
    """
    for seed in range(3):
        row = {**_run(mapping, model_type, seed), "seed": seed}
        if not rounding(row["reason"]):
            break
    return row


def rounding(reason: str) -> bool:
    """Whether fp64 clears every family that is wrong in fp32."""
    doubles = re.findall(r" in fp32, (\S+) in fp64", reason)
    return reason.count("wrong by") == len(doubles) > 0 and all(float(d) < 1e-9 for d in doubles)


def _run(mapping: str, model_type: str, seed: int) -> dict[str, Any]:
    """``stage`` is the last one that passed: none, config, build, forward, trace, analysis, proven."""
    row: dict[str, Any] = {"type": model_type, "mapping": mapping, "stage": "none", "families": 0, "proven": 0}
    row["reason"] = ""
    try:
        tiny = tiny_model(mapping, model_type, seed)
    except CannotBuild as error:
        stages = ["none", "config", "build", "forward", "trace"]
        return {**row, "stage": stages[stages.index(error.stage) - 1], "reason": str(error)}
    except Exception as error:
        return {**row, "reason": describe(error)}
    row["stage"] = "forward"
    calibrate(tiny)
    try:
        program = trace_to_program(tiny.wrapper, tiny.inputs)
        row["stage"] = "trace"
        analysis = analyze_program(program)
        row["stage"] = "analysis"
    except Exception as error:
        return {**row, "reason": describe(error)}
    results = dict(prove(analysis, tiny.inputs))
    together = results.pop("all", "")
    row["families"], row["proven"] = len(results), list(results.values()).count("")
    row["names"] = list(results)
    row["reason"] = "; ".join(f"{n}: {why}" for n, why in [*results.items(), ("all", together)] if why)
    row["stage"] = "proven" if results and not row["reason"] else "analysis"
    if not results:
        row["reason"] = "no family: " + "; ".join(f"{b.weights[0]} {b.reasons[0]}" for b in analysis.blocked[:4])
    if mapping == "causal-lm":
        row |= ask_stock(analysis, tiny, "stock", stock_acceptance)
    elif analysis.depths:
        row |= ask_stock(analysis, tiny, "depth", depth_acceptance)
    return row


class OutOfTime(BaseException):
    """Not an Exception: reading a class takes any of those for a refusal."""


def ask_stock(
    analysis: Analysis, tiny: Tiny, key: str, ask: Callable[[Analysis, Tiny], dict[str, Any]]
) -> dict[str, Any]:
    """``key``: family → what the model's own class accepts of it; or ``stock_error``, why that cannot be said."""

    def stop(*_: object) -> None:
        raise OutOfTime

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, STOCK_LIMIT_S)
    try:
        return {key: ask(analysis, tiny)}
    except OutOfTime:
        return {"stock_error": f"reading the class ran past {STOCK_LIMIT_S} s"}
    except Exception as error:
        return {"stock_error": describe(error)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _child(pipe: Connection, run: Run, mapping: str, model_type: str, limit_s: int) -> None:
    limit_memory(MEMORY_LIMIT_BYTES)
    resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
    torch.set_num_threads(1)
    gc.disable()  # the process is short, and each collection would go through all of torch and transformers
    pipe.send(run(mapping, model_type))


def run_limited(mapping: str, model_type: str, limit_s: int = TIME_LIMIT_S, run: Run = run_type) -> dict[str, Any]:
    """``run`` in a process of its own, forked from a server that has imported its module already.

    ``limit_s``: of processor time. The clock may run three times as long.
    """
    row = {"type": model_type, "mapping": mapping, "stage": "none", "families": 0, "proven": 0, "target": ""}
    context = multiprocessing.get_context("forkserver")
    spec = sys.modules[run.__module__].__spec__
    context.set_forkserver_preload([spec.name] if spec else [])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, run, mapping, model_type, limit_s))
    start = time.perf_counter()
    process.start()
    theirs.close()
    try:
        if ours.poll(3 * limit_s):
            row = dict(ours.recv())
        else:
            row["reason"] = f"ran past {3 * limit_s} s"
    except EOFError:
        process.join()
        row["reason"] = f"the process died with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def sweep(
    pairs: Sequence[tuple[str, str]],
    rows: list[dict[str, Any]],
    jobs: int,
    json_file: Path | None,
    run: Run = run_type,
    limit_s: int = TIME_LIMIT_S,
) -> Iterator[dict[str, Any]]:
    """``run`` for the pairs (mapping, type) that ``rows`` lacks; yields rows as they come, adds and saves them."""
    header = result_header()
    done = {(r["mapping"], r["type"]) for r in rows}
    with ThreadPoolExecutor(jobs) as pool:
        todo = [pair for pair in pairs if pair not in done]
        for row in pool.map(lambda pair: run_limited(*pair, limit_s=limit_s, run=run), todo):
            rows.append({**row, "commit": header["commit"]})
            yield rows[-1]
            if json_file:
                write_result(json_file, header, rows)


OneMapping = Annotated[str, typer.Option(help="One mapping; all when empty")]
Types = Annotated[str, typer.Option(help="Comma-separated model types; all when empty")]
Jobs = Annotated[int, typer.Option(help="Processes at once")]
RowsFile = Annotated[
    Path | None, typer.Option("--json", help="Rows are kept here; types it has already are not run again")
]


def saved_rows(json_file: Path | None) -> list[dict[str, Any]]:
    """The rows of an earlier run."""
    return json.loads(json_file.read_text())["rows"] if json_file and json_file.exists() else []


def totals(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line a mapping: types, traced, analysed, proven in full, families proven."""
    lines = []
    for mapping in dict.fromkeys(r["mapping"] for r in rows):
        mine = [r for r in rows if r["mapping"] == mapping]
        stages = [r["stage"] for r in mine]
        analysed = stages.count("analysis") + stages.count("proven")
        lines.append(
            f"{mapping}: {len(mine)} types, {analysed} analysed, {stages.count('proven')} proven in full "
            f"({sum(r['proven'] for r in mine)} of {sum(r['families'] for r in mine)} families)"
        )
    return lines


def main(
    mapping: OneMapping = "",
    types: Types = "",
    jobs: Jobs = 1,
    json_file: RowsFile = None,
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="Save each type and run `mptk prune` and `mptk verify` on it instead")
    ] = False,
) -> None:
    """Prove every family of every model type; prints a row each and the totals."""
    rows = saved_rows(json_file)
    wanted = [m for m in MAPPINGS if mapping in ("", m)]
    pairs = [(m, t) for m in wanted for t in model_types(m) if not types or t in types.split(",")]
    if end_to_end:
        for row in sweep(pairs, rows, jobs, json_file, zoo_end_to_end.run_type, COMMANDS_LIMIT_S):
            said = f"{row.get('task', ''):15} {row.get('target', ''):6} {row['seconds']:6.1f}s  {row['reason'][:400]}"
            print(f"{row['mapping']:20} {row['type']:28} {row['stage']:8} {said}", flush=True)
        print("\n".join(zoo_end_to_end.totals(rows)))
        return
    for row in sweep(pairs, rows, jobs, json_file):
        print(
            f"{row['mapping']:20} {row['type']:28} {row['stage']:8} {row['proven']:3}/{row['families']:<3} "
            f"{row['seconds']:6.1f}s  {row['reason'][:600]}",
            flush=True,
        )
    print("\n".join(totals(rows)))


if __name__ == "__main__":
    typer.run(main)
