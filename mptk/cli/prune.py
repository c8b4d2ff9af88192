"""prune: commands that write pruned folders: prune, recover."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mptk.cli.app import announce_reading, explain_stop, register_command
from mptk.cli.console import err, make_pass_printer, out, show_stages
from mptk.cli.options import (
    Config,
    DenseOption,
    Folder,
    MaxMs,
    ModelArgument,
    make_folder_option,
    refuse_idle,
    refuse_surely_idle,
    with_latency,
)
from mptk.config import Asked, Settings
from mptk.cost.fixed import sum_fixed_seconds
from mptk.errors import InputError
from mptk.io import count_layers
from mptk.progress import Progress
from mptk.protocols import check_unfinished_run
from mptk.publish.folder import check_replaceable

if TYPE_CHECKING:
    from mptk.api.pruned import Pruned
    from mptk.cost.estimate import Estimate

COMPUTING = 2
"""The smallest run takes about twice as long as what it does besides computing (SmolLM2-135M)."""
EstimateOption = Annotated[
    bool, typer.Option("--estimate", help="Only estimate the memory, disk space and time that the run needs.")
]


def check_prune_options(
    model: str,
    settings: Settings,
    folder: Path | None,
    max_decode_ms: float | None,
    max_prefill_ms: float | None,
    estimate: bool,
) -> None:
    """Check the options of ``prune``."""
    if not estimate:
        check_output(folder, settings)
    check_minutes(model, settings, settings.method == Settings.method and not settings.fixed)
    settings = with_latency(settings, max_decode_ms, max_prefill_ms)
    settings.check_free_amount()
    refuse_surely_idle("prune", Asked(settings, writes=folder is not None, estimate=estimate))
    announce_reading(model)
    check_prune(settings, folder is not None, estimate)


def check_recover_options(folder: Path, settings: Settings, destination: Path | None, estimate: bool) -> None:
    """Check the options of ``recover``."""
    if not estimate:
        check_output(destination, settings)
    if (steps := settings.learning.steps) == 0:
        raise InputError("recover trains, and --steps 0 leaves nothing to do; give --steps 1 or more", name="steps")
    check_minutes(folder, settings, True)
    announce_reading(folder)
    from mptk.run.minutes import fill_in  # it imports torch

    # As in ``check_prune``: what would do nothing is refused by the settings as the run completes them.
    meant = fill_in(settings, recovers=True)
    refuse_idle("recover", Asked(meant, True, destination is not None, estimate, undecided=steps is None))


def check_minutes(model: str | Path, settings: Settings, trains: bool) -> None:
    """Refuse minutes that hold no run on any machine, before torch is imported. A run estimates the rest itself.

    ``trains``: whether the run trains by default.
    """
    if settings.minutes is None or (layers := count_layers(model)) is None:
        return
    least = sum_fixed_seconds(layers, trains=trains or settings.steps > 0, onnx=settings.onnx)
    if 60 * settings.minutes < least:
        no_onnx = ", or --no-onnx" if settings.onnx else ""
        raise InputError(
            f"--minutes {settings.minutes:g} is too short: what a run on {layers} layers does besides computing takes "
            f"about {least:.0f} s; give --minutes {ceil(COMPUTING * least / 60)}{no_onnx}",
            name="minutes",
            nearest=(ceil(COMPUTING * least / 60),),
        )


def check_output(folder: Path | None, settings: Settings) -> None:
    """Refuse a folder that the result may not have. The run asks again: time has passed by then."""
    place = check_given(folder)
    check_replaceable(place, settings.overwrite)
    if not settings.resume:
        check_unfinished_run(place, {}, resume=False)


def check_given(folder: Path | None) -> Path:
    """The folder for a result. Raises MptkError if none is given."""
    if folder is None:
        raise InputError("the result needs a folder; give --out FOLDER", name="out")
    return folder


@register_command(
    "prune",
    check=check_prune_options,
    examples=(
        "prune smollm2-135m --sparsity 0.3 --data book.txt --out runs/m30",
        "prune smollm2-135m --sparsity 0.3 --method wanda --data c4.jsonl=0.7,code/=0.3 --out runs/w30",
        "prune smollm2-135m --max-decode-ms 10 --data wikitext2 --quantize auto --out runs/fast",
        "prune --config runs/m30/run.yaml --sparsity 0.5 --out runs/m50",
    ),
)
def prune_to_folder(
    model: ModelArgument,
    settings: Settings,
    folder: Annotated[Path | None, make_folder_option("Folder for the result; an earlier result is replaced.")] = None,
    max_decode_ms: MaxMs = None,
    max_prefill_ms: MaxMs = None,
    estimate: EstimateOption = False,
    config: Config = None,
) -> None:
    """Cut a model, prove the result, and write it as a plain checkpoint folder and ONNX.

    maskprune learns what to cut, then trains the small model. The other methods train only with --steps.
    """
    from mptk.api.pruned import estimate_run, prune

    settings = with_latency(settings, max_decode_ms, max_prefill_ms)
    if estimate:
        show_needs(estimate_run(model, settings), folder)
        return
    with open_output(folder) as (place, progress):
        show_pruned(prune(model, place, settings, progress=progress, on_stage=make_pass_printer()), place)


def check_prune(settings: Settings, writes: bool, estimate: bool, instead: Mapping[str, str] | None = None) -> None:
    """Refuse what ``prune`` cannot do and options that would do nothing, before the model is read.

    ``settings``: with their latency. ``writes``, ``estimate``, ``instead``: as in ``Asked``.
    """
    from mptk.run.amounts import should_learn_masks
    from mptk.run.checks import check_settings, read_plan
    from mptk.run.minutes import fill_in, list_undecided

    # Checks look at the settings as a run completes them (``meant``), but the run gets what was typed: it completes
    # them by what it measures.
    meant = fill_in(settings)
    learns, undecided = should_learn_masks(meant), bool(list_undecided(settings))
    refuse_idle("prune", Asked(meant, learns, writes, estimate, undecided, instead or {}))
    check_settings(meant, read_plan(meant))


@register_command(
    "recover",
    check=check_recover_options,
    examples=("recover runs/w30 --data book.txt --steps 100 --out runs/w30r",),
)
def recover_model(
    folder: Folder,
    settings: Settings,
    destination: Annotated[Path | None, make_folder_option("Folder for the trained model.")] = None,
    model: DenseOption = None,
    estimate: EstimateOption = False,
    config: Config = None,
) -> None:
    """Train a pruned folder against its dense model, prove the result, and write it to another folder."""
    from mptk.api.pruned import estimate_recovery, recover

    if estimate:
        show_needs(estimate_recovery(folder, settings, model), destination)
        return
    with open_output(destination) as (place, progress):
        show_pruned(
            recover(folder, place, settings, model=model, progress=progress, on_stage=make_pass_printer()), place
        )


def show_needs(found: Estimate, place: Path | None) -> None:
    """Show what a run needs. Raises MptkError if the machine has less."""
    from mptk.report import sections as report
    from mptk.run.estimate import check_room_for

    out.print(report.build_estimate_view(found))
    check_room_for(found, place or Path.cwd())


@contextmanager
def open_output(folder: Path | None) -> Iterator[tuple[Path, Progress]]:
    """The output folder and the progress of a run that can be resumed. Raises MptkError if no folder is given."""
    place = check_given(folder)
    with explain_stop(place), show_stages(err) as progress:
        yield place, progress


def show_pruned(result: Pruned | None, place: Path) -> None:
    """Show the result on one screen. Of several processes only the first has one."""
    from mptk.report.summary import build_summary

    if result is not None:
        for line in build_summary(result.report, place):
            out.print(line, soft_wrap=True, highlight=False)
