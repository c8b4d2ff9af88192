"""verify: commands that read pruned folders: verify, rerun, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mptk.cli.app import explain_stop, register_command, show_result
from mptk.cli.console import err, make_pass_printer, out, show_stages
from mptk.cli.options import (
    DenseOption,
    Folder,
    JsonOption,
    make_file_option,
    make_folder_option,
    refuse,
)
from mptk.config import Settings, collect_values
from mptk.errors import MptkError
from mptk.files import write_text
from mptk.progress import enter_stage
from mptk.trust import Trust

RERUN = "mptk-rerun/1"
NEW_TOKENS = 32
"""Tokens that models write after each prompt of a report."""


@register_command(
    "verify",
    examples=(
        "verify runs/m30",
        "verify runs/m30 --model models/dense",
        "verify runs/m30.gguf --like runs/m30",
    ),
)
def verify_folder(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The --out folder of `mptk prune`, or a GGUF file of one.")
    ],
    settings: Settings,
    model: DenseOption = None,
    like: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For a GGUF file: the folder that it was made from.")
    ] = None,
) -> None:
    """Prove a pruned folder again: files, config, weights, logits (torch, ONNX Runtime). Exit code 1 if it fails.

    A GGUF file is compared with its folder: each field, each tensor and, if llama.cpp is installed, its logits.
    """
    from mptk.proof import verification
    from mptk.report import sections as report

    with show_stages(err) as progress, enter_stage(progress, "prove"):
        progress("prove", 0, 0)
        proof = verification.verify(
            folder,
            model=model,
            like=like,
            **collect_values(settings, "verify"),
        )
    out.print(report.build_proof_view([d.to_dict() for d in proof]), *proof.notes, sep="\n")


@register_command("rerun", examples=("rerun runs/m30 --out runs/again",))
def show_rerun(
    folder: Folder,
    destination: Annotated[Path, make_folder_option("Folder for the new result.")],
    settings: Settings,
    model: DenseOption = None,
    json_file: JsonOption = None,
) -> None:
    """Repeat the run that made a folder, from its report, and show what differs. Exits with 1 if a result differs."""
    from mptk.api.rerun import list_differing_results, repeat_run
    from mptk.report import sections as report

    with explain_stop(destination), show_stages(err) as progress:
        found = repeat_run(
            folder,
            destination,
            progress,
            model=model,
            on_stage=make_pass_printer(),
            **collect_values(settings, "rerun"),
        )
    # Of several processes only the first has rows. The table comes before the error, which names only what differs.
    if found is not None:
        show_result(
            json_file,
            {"format": RERUN, "folder": str(folder), "out": str(destination), "rows": found},
            report.build_rerun_view(found),
        )
        if differ := list_differing_results(found):
            raise MptkError(
                f"the result differs from {folder} in {', '.join(differ)}; compare the versions in both reports"
            )


@register_command(
    "report",
    examples=(
        "report runs/m30",
        "report runs/m30 runs/w30 --html report.html",
        'report runs/m30 --prompt "Once upon a time" --html report.html',
    ),
)
def show_report(
    folders: Annotated[
        list[Path],
        typer.Argument(help="The --out folder of `mptk prune`, or of a ladder; give several to compare them."),
    ],
    html: Annotated[Path | None, make_file_option("Write a page with charts to this file instead.", "page")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Show what the dense and the pruned model write after this text; repeat it for several."),
    ] = None,
    model: DenseOption = None,
    *,
    settings: Settings,
) -> None:
    """Show a pruned folder: widths, costs, perplexity, proof, timings, files. Compares several folders."""
    from mptk.report import sections as report
    from mptk.report.runs import list_results, read_runs

    if model is not None and not prompt:
        raise MptkError("--model is the dense model that writes after --prompt; give --prompt, or leave it out")
    if not prompt:
        refuse(("trust_remote_code",), "only --prompt loads a model; give --prompt, or leave it out")
    folders = list_results(folders)  # a ladder's folder stands for its sizes
    runs = read_runs(folders)
    if prompt:
        runs = [
            replace(run, texts=generate_both(folder, prompt, model, settings.trust))
            for folder, run in zip(folders, runs, strict=True)
        ]
    if html is not None:
        from mptk.report.page.render import render_report_page

        write_text(html, render_report_page(runs))
        out.print(f"written to {html}", soft_wrap=True)
        return
    # The first in full, then all of them side by side.
    first = runs[0]
    out.print(report.build_prune_view(first.report, first.bench, first.texts))
    if len(runs) > 1:
        out.print(report.build_comparison_view(runs))
    out.print(f"files in {folders[0]}: {', '.join(first.report.files)}", soft_wrap=True, highlight=False)


def generate_both(folder: Path, prompts: Sequence[str], model: str | None, trust: Trust) -> dict[str, tuple[str, str]]:
    """Prompt → what the dense and the pruned model write after it."""
    from mptk.api.use import generate_continuations

    found = generate_continuations(folder, prompts, NEW_TOKENS, model, trust)
    return dict(zip(prompts, zip(found["dense"], found["pruned"], strict=True), strict=True))
