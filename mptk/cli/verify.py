"""verify: commands that read pruned folders: verify, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mptk.cli.app import announce_reading, register_command
from mptk.cli.console import err, out, show_stages
from mptk.cli.options import DenseOption, refuse
from mptk.config import Settings, collect_values
from mptk.errors import InputError
from mptk.progress import enter_stage
from mptk.trust import Trust

if TYPE_CHECKING:
    from mptk.report.runs import Run

NEW_TOKENS = 32
"""Tokens that models write after each prompt of a report."""


@register_command(
    "verify",
    examples=("verify runs/m30", "verify runs/m30 --model models/dense"),
)
def verify_folder(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The --out folder of `mptk prune`, or a GGUF file of one.")
    ],
    settings: Settings,
    model: DenseOption = None,
) -> None:
    """Prove a pruned folder again: files, config, weights, logits (torch, ONNX Runtime). Exit code 1 if it fails."""
    announce_reading(folder)
    show_proof(folder, settings, model)


def show_proof(folder: Path, settings: Settings, model: str | None, like: Path | None = None) -> None:
    """Prove a folder, or a file against the folder ``like``, and print each stage."""
    from mptk.proof import verification
    from mptk.report import sections as report

    with show_stages(err) as progress, enter_stage(progress, "prove"):
        progress("prove", 0, 0)
        proof = verification.verify(folder, model=model, like=like, **collect_values(settings, "verify"))
    out.print(report.build_proof_view([d.to_dict() for d in proof]), *proof.notes, sep="\n")


@register_command("report", examples=("report runs/m30",))
def show_report(
    folders: Annotated[
        list[Path],
        typer.Argument(help="The --out folder of `mptk prune`, or of a ladder; give several to compare them."),
    ],
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
    from mptk.report.runs import list_results

    # The first in full, then all of them side by side.
    runs = read_runs_to_show(folders, prompt, model, settings)
    first = runs[0]
    out.print(report.build_prune_view(first.report, first.bench, first.texts, first.metrics))
    if len(runs) > 1:
        out.print(report.build_comparison_view(runs))
    out.print(f"files in {list_results(folders)[0]}: {', '.join(first.report.files)}", soft_wrap=True, highlight=False)


def read_runs_to_show(
    folders: Sequence[Path], prompts: Sequence[str] | None, model: str | None, settings: Settings
) -> list[Run]:
    """The runs that ``report`` shows, with what their models write after the prompts."""
    from mptk.report.runs import list_results, read_runs

    if model is not None and not prompts:
        raise InputError(
            "--model is the dense model that writes after --prompt; give --prompt, or leave it out", name="model"
        )
    if not prompts:
        refuse(("trust_remote_code",), "only --prompt loads a model; give --prompt, or leave it out")
    folders = list_results(folders)  # a ladder's folder stands for its sizes
    runs = read_runs(folders)
    if not prompts:
        return runs
    return [
        replace(run, texts=generate_both(folder, prompts, model, settings.trust))
        for folder, run in zip(folders, runs, strict=True)
    ]


def generate_both(folder: Path, prompts: Sequence[str], model: str | None, trust: Trust) -> dict[str, tuple[str, str]]:
    """Prompt → what the dense and the pruned model write after it."""
    from mptk.api.use import generate_continuations

    found = generate_continuations(folder, prompts, NEW_TOKENS, model, trust)
    return dict(zip(prompts, zip(found["dense"], found["pruned"], strict=True), strict=True))
