"""prune: commands that write pruned folders: prune, recover, rung."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mptk.cli.app import explain_stop, register_command
from mptk.cli.console import err, make_pass_printer, out, show_stages
from mptk.cli.options import (
    Config,
    DenseOption,
    Folder,
    MaxMs,
    ModelArgument,
    make_folder_option,
    parse_names,
    parse_share,
    refuse_idle,
    with_latency,
)
from mptk.config import CUT, Asked, Settings
from mptk.errors import MptkError
from mptk.progress import Progress

if TYPE_CHECKING:
    from mptk.api.pruned import Pruned
    from mptk.cost.estimate import Estimate

EstimateOption = Annotated[
    bool, typer.Option("--estimate", help="Only estimate the memory, disk space and time that the run needs.")
]


@register_command(
    "prune",
    examples=(
        "prune smollm2-135m --sparsity 0.3 --data book.txt --out runs/m30",
        "prune smollm2-135m --sparsity 0.3 --method wanda --data c4.jsonl=0.7,code/=0.3 --out runs/w30",
        "prune smollm2-135m --max-decode-ms 15 --data wikitext2 --quantize int8 --out runs/fast",
        "prune --config runs/m30/run.yaml --sparsity 0.5 --out runs/m50",
        "prune smollm2-135m --ladder 0.2,0.3,0.5 --data book.txt --out runs/sizes",
    ),
)
def prune_to_folder(
    model: ModelArgument,
    settings: Settings,
    folder: Annotated[Path | None, make_folder_option("Folder for the result; an earlier result is replaced.")] = None,
    max_decode_ms: MaxMs = None,
    max_prefill_ms: MaxMs = None,
    ladder: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=CUT, help="Make several sizes, as 0.2,0.3,0.5: each cut further from the larger one."
        ),
    ] = None,
    estimate: EstimateOption = False,
    config: Config = None,
) -> None:
    """Cut a model, prove the result, and write it as a plain checkpoint folder and ONNX.

    maskprune learns what to cut, then trains the small model. The other methods train only with --steps.
    """
    from mptk.api.pruned import estimate_run, prune
    from mptk.run.amounts import should_learn_masks
    from mptk.run.checks import check_settings, read_plan
    from mptk.run.ladder import divide_steps
    from mptk.run.minutes import fill_in, list_undecided

    # Refuse what cannot be done or would do nothing, before the model is read. Checks look at the settings as a run
    # completes them (``meant``), but the run gets what was typed: it completes them by what it measures.
    settings = with_latency(settings, max_decode_ms, max_prefill_ms)
    meant = fill_in(settings)
    sizes = None if ladder is None else [parse_share(each, "--ladder") for each in parse_names(ladder)]
    if sizes is not None:
        divide_steps(settings, sizes)  # sizes that are wrong are the first to be refused
    asked = Asked(
        meant,
        should_learn_masks(meant),
        folder is not None,
        estimate,
        bool(list_undecided(settings)),
        {} if sizes is None else {"sparsity": "--ladder names the sizes; leave out one of both"},
    )
    refuse_idle("prune", asked)
    check_settings(meant, read_plan(meant))
    # The run itself: of several sizes, only estimated, or of one.
    if sizes is not None:
        make_ladder(model, folder, settings, sizes, estimate)
    elif estimate:
        show_needs(estimate_run(model, settings), folder)
    else:
        with open_output(folder) as (place, progress):
            show_pruned(prune(model, place, settings, progress=progress, on_stage=make_pass_printer()), place)


@register_command("recover", examples=("recover runs/w30 --data book.txt --steps 100 --out runs/w30r",))
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
    from mptk.run.minutes import fill_in

    if (steps := settings.learning.steps) == 0:
        raise MptkError("recover trains, and --steps 0 leaves nothing to do; give --steps 1 or more")
    # As in ``prune_to_folder``: what would do nothing is refused by the settings as the run completes them.
    meant = fill_in(settings, recovers=True)
    refuse_idle("recover", Asked(meant, True, destination is not None, estimate, undecided=steps is None))
    if estimate:
        show_needs(estimate_recovery(folder, settings, model), destination)
        return
    with open_output(destination) as (place, progress):
        show_pruned(
            recover(folder, place, settings, model=model, progress=progress, on_stage=make_pass_printer()), place
        )


@register_command("rung", examples=("rung runs/sizes", "rung runs/sizes 0.3 --out runs/small"))
def write_rung(
    folder: Annotated[Path, typer.Argument(help="The --out folder of `mptk prune --ladder --shared`.")],
    size: Annotated[str | None, typer.Argument(help="One of its smaller sizes; without it they are listed.")] = None,
    destination: Annotated[Path | None, make_folder_option("Folder for that size.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result that was changed.")] = False,
) -> None:
    """Write a smaller size of a ladder that shares weights: the folder that the run proved. No model runs."""
    from mptk.api import ladder
    from mptk.report import sections as report
    from mptk.report.runs import read_runs, with_rungs

    if size is None:  # list them, as a table
        ladder.list_smaller_sizes(folder)
        out.print(report.build_comparison_view(read_runs(with_rungs([folder]))))
        return
    if destination is None:
        raise MptkError("the result needs a folder; give --out FOLDER")
    ladder.rung(folder, parse_share(size, "SIZE"), destination, overwrite=overwrite)
    out.print(f"written to {destination}", soft_wrap=True)


def make_ladder(
    model: str, place: Path | None, settings: Settings, sparsities: Sequence[float], estimate: bool
) -> None:
    """Make the models of a ladder and show them side by side; or only show what they need."""
    from mptk.api import ladder
    from mptk.report import sections as report
    from mptk.report.runs import Run
    from mptk.run.ladder import name_size

    if estimate:
        show_needs(ladder.estimate_ladder(model, settings, sparsities), place)
        return
    if place is None:
        raise MptkError("the results need a folder; give --out FOLDER")
    # Sizes that share weights are one folder; others are folders in it, and a stopped run says which are finished.
    places = [place] if settings.shared else [place / name_size(each) for each in sparsities]
    with explain_stop(*places, goes_on=settings.resume), show_stages(err) as progress:
        found = ladder.ladder(model, place, sparsities, settings, progress=progress, on_stage=make_pass_printer())
    if found:
        out.print(report.build_prune_view(found[-1].report))
        out.print(report.build_comparison_view([Run(each.place.name, each.report) for each in found]))
        if settings.shared:
            smaller = ", ".join(each.place.name for each in found[1:])
            out.print(f"written to {place}; `mptk rung {place} SIZE --out FOLDER` writes {smaller}", soft_wrap=True)
        else:
            out.print(f"written to {', '.join(str(each.place) for each in found)}", soft_wrap=True)


def show_needs(found: Estimate, place: Path | None) -> None:
    """Show what a run needs. Raises MptkError if the machine has less."""
    from mptk.report import sections as report
    from mptk.run.estimate import check_room_for

    out.print(report.build_estimate_view(found))
    check_room_for(found, place or Path.cwd())


@contextmanager
def open_output(folder: Path | None) -> Iterator[tuple[Path, Progress]]:
    """The output folder and the progress of a run that can be resumed. Raises MptkError if no folder is given."""
    if folder is None:
        raise MptkError("the result needs a folder; give --out FOLDER")
    with explain_stop(folder), show_stages(err) as progress:
        yield folder, progress


def show_pruned(result: Pruned | None, place: Path) -> None:
    """Show the report of a result. Of several processes only the first has one."""
    from mptk.report import sections as report

    if result is not None:
        out.print(report.build_prune_view(result.report))
        out.print(f"written to {place}", soft_wrap=True)
