"""prune: commands that write or read pruned folders: prune, recover, verify, report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mptk.cli.app import command, resumable, show
from mptk.cli.console import err, out
from mptk.cli.idle import check_prune, check_recover
from mptk.cli.options import (
    RECOVERY,
    Dense,
    Device,
    Folder,
    Json,
    MaxMs,
    Memory,
    Model,
    Out,
    Overwrite,
    ProofLength,
    Trust,
    settings_from,
    with_latency,
    with_settings,
)
from mptk.cli.parse import parse_size
from mptk.cli.places import file_to_write, folder_to_write
from mptk.cli.progress import stages
from mptk.cli.recipes import Config
from mptk.cli.voice import VOICE
from mptk.config.settings import DEFAULT_STEPS, Settings
from mptk.errors import MptkError
from mptk.files import write_text
from mptk.progress import within

if TYPE_CHECKING:
    from mptk.ir.passes import Record


NO_PLACE = "there is no place for the result; give --out FOLDER"
Estimate = Annotated[bool, typer.Option("--estimate", help="Only say what memory, disk and time the run will need.")]


@command(
    examples=(
        "prune smollm2-135m --sparsity 0.3 --data book.txt --out runs/m30",
        "prune smollm2-135m --sparsity 0.3 --method wanda --data c4.jsonl=0.7,code/=0.3 --out runs/w30",
        "prune smollm2-135m --max-decode-ms 15 --data wikitext2 --quantize int8 --out runs/fast",
        "prune --config runs/m30/run.yaml --sparsity 0.5 --out runs/m50",
    )
)
@with_settings()
def prune(
    model: Model,
    folder: Annotated[Path | None, Out.__metadata__[0]] = None,
    max_decode_ms: MaxMs = None,
    max_prefill_ms: MaxMs = None,
    estimate: Estimate = False,
    config: Config = None,
    **options: object,
) -> None:
    """Cut a model, prove the result, and write it as a plain checkpoint folder and ONNX.

    maskprune learns what to cut and then trains the small model. A one-shot method trains only if --steps is given.
    """
    from mptk.api.pruned import prune
    from mptk.chain.estimate import check_fits, estimated
    from mptk.chain.prepare import check_settings, given_plan, settled
    from mptk.methods import find_method
    from mptk.report import terminal as report

    settings = with_latency(settings_from(options), max_decode_ms, max_prefill_ms)
    meant = settled(settings)
    check_prune(meant, not meant.fixed and find_method(meant.method).learns, estimate)
    check_settings(meant, given_plan(meant))
    if estimate:
        found = estimated(model, meant)
        out.print(report.estimate_view(found))
        check_fits(found, folder or Path.cwd())
        return
    if folder is None:
        raise MptkError(NO_PLACE)
    with resumable(folder), stages(err) as progress:
        result = prune(model, folder, settings, progress=progress, on_stage=printed())
    if result is not None:
        out.print(report.prune_view(result.report))
        out.print(f"written to {folder}", soft_wrap=True)


@command(examples=("recover runs/w30 --data book.txt --steps 100 --out runs/w30r",))
@with_settings(*RECOVERY)
def recover(
    folder: Folder,
    destination: Annotated[
        Path | None, typer.Option("--out", callback=folder_to_write, help="Folder for the trained model.")
    ] = None,
    model: Dense = None,
    estimate: Estimate = False,
    config: Config = None,
    **options: object,
) -> None:
    """Train a pruned folder against its dense model, prove the result, and write it to another folder."""
    from mptk.api import recovery
    from mptk.chain.estimate import check_fits
    from mptk.report import terminal as report

    steps = DEFAULT_STEPS if options["steps"] is None else options["steps"]
    settings = settings_from({**options, "steps": steps})
    check_recover(settings)
    measured = ("eval_data", "eval_windows", "eval_length")
    given = ("data", "length", "seed", "resume", "overwrite", "onnx", "logits", "quantize", "onnx_dtype", "strict")
    machine = ("proof_length", "max_shard_size", "memory", "device", "compute_dtype")
    changes: dict[str, Any] = {name: getattr(settings, name) for name in (*given, *measured, *machine)}
    changes |= {"model": model, "trust_remote_code": settings.trust_remote_code}
    if estimate:
        found = recovery.needed(folder, settings.learning, **changes)
        out.print(report.estimate_view(found))
        check_fits(found, destination or Path.cwd())
        return
    if destination is None:
        raise MptkError(NO_PLACE)
    with resumable(destination), stages(err) as progress:
        result = recovery.recover(folder, destination, settings.learning, progress, on_stage=printed(), **changes)
    if result is not None:
        out.print(report.prune_view(result))
        out.print(f"written to {destination}", soft_wrap=True)


def printed() -> Callable[[Record], None] | None:
    """A call that prints the record of a stage, with the difference if it is a pass; None unless ``-v`` is given."""
    return (lambda record: err.print(str(record), highlight=False)) if VOICE.verbose else None


@command(examples=("verify runs/m30", "verify runs/m30 --model models/dense"))
def verify(
    folder: Folder,
    model: Dense = None,
    proof_length: ProofLength = Settings.proof_length,
    memory: Memory = None,
    device: Device = Settings.device,
    trust_remote_code: Trust = False,
) -> None:
    """Prove a pruned folder again: files, config, weights, logits (torch, ONNX Runtime). Exit code 1 if it fails."""
    from mptk.proof import verification
    from mptk.report import terminal as report

    with stages(err) as progress, within(progress, "prove"):
        progress("prove", 0, 0)
        proof = verification.verify(
            folder,
            model=model,
            trust_remote_code=trust_remote_code,
            proof_length=proof_length,
            memory=parse_size(memory),
            device=device,
        )
    out.print(report.proof_view([d.as_dict() for d in proof]), *proof.notes, sep="\n")


@command(examples=("rerun runs/m30 --out runs/again",))
def rerun(
    folder: Folder,
    destination: Annotated[Path, typer.Option("--out", callback=folder_to_write, help="Folder for the new result.")],
    model: Dense = None,
    json_file: Json = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
) -> None:
    """Repeat the run that made a folder, from its report, and show what differs. Exit code 1 if a result does."""
    from mptk.api.rerun import rerun, results_differing
    from mptk.report import terminal as report

    with resumable(destination), stages(err) as progress:
        found = rerun(
            folder,
            destination,
            progress,
            model=model,
            on_stage=printed(),
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
        )
    if found is not None:
        show(json_file, {"folder": str(folder), "out": str(destination), "rows": found}, report.rerun_view(found))
        if differ := results_differing(found):
            raise MptkError(f"{folder} could not be repeated, and differs in {', '.join(differ)}; compare its versions")


@command("report", examples=("report runs/m30", "report runs/m30 runs/w30 --html report.html"))
def show_report(
    folders: Annotated[
        list[Path], typer.Argument(help="The --out folder of `mptk prune`; further ones stand beside it.")
    ],
    html: Annotated[
        Path | None, typer.Option(callback=file_to_write(), help="Write a page with charts to this file instead.")
    ] = None,
) -> None:
    """Show a pruned folder: widths, costs, perplexity, proof, timings, files. Several are compared."""
    from mptk.protocols.report import Report
    from mptk.report import terminal as report
    from mptk.report.page.runs import read_bench

    if html is not None:
        from mptk.report.page.render import report_page
        from mptk.report.page.runs import read_runs

        write_text(html, report_page(read_runs(folders)))
        out.print(f"written to {html}", soft_wrap=True)
        return
    folder, results = folders[0], [Report.read(each) for each in folders]
    timed = read_bench(folder)
    out.print(report.prune_view(results[0]))
    if timed is not None:
        out.print(report.bench_view(timed))
    if len(results) > 1:
        out.print(report.comparison_view(results))
    out.print(f"files in {folder}: {', '.join(results[0].files)}", soft_wrap=True, highlight=False)
