"""command: ``mptk prune --ladder`` and ``mptk rung``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mptk.cli.app import announce_reading, explain_stop, extend_command, register_command
from mptk.cli.console import err, make_pass_printer, out, show_stages
from mptk.cli.options import MaxMs, ModelArgument, make_folder_option, parse_names, refuse_surely_idle, with_latency
from mptk.cli.prune import check_given, check_prune, show_needs
from mptk.config import CUT, Asked, Settings, parse_share
from mptk.errors import InputError


def check_ladder_options(
    model: str,
    settings: Settings,
    ladder: str,
    folder: Path | None,
    max_decode_ms: float | None,
    max_prefill_ms: float | None,
    estimate: bool,
) -> None:
    """Check the options of ``prune --ladder``."""
    settings, sizes = with_latency(settings, max_decode_ms, max_prefill_ms), parse_sizes(ladder)
    instead = {"sparsity": "--ladder names the sizes; leave out one of both"}
    refuse_surely_idle("prune", Asked(settings, writes=folder is not None, estimate=estimate, instead=instead))
    announce_reading(model)
    from mptk.features.ladder.ladder import divide_steps

    divide_steps(settings, sizes)  # sizes that are wrong are the first to be refused
    check_prune(settings, folder is not None, estimate, instead)
    if folder is None and not estimate:
        raise InputError("the results need a folder; give --out FOLDER", name="out")


def parse_sizes(ladder: str) -> list[float]:
    """``20%,0.4`` → [0.2, 0.4]."""
    return [parse_share(each, "--ladder") for each in parse_names(ladder)]


def check_rung(size: str | None, destination: Path | None) -> None:
    """Check the options of ``rung``."""
    if size is not None:
        check_given(destination)
        parse_share(size, "SIZE")


@extend_command(
    "prune",
    check=check_ladder_options,
    after="max_prefill_ms",
    examples=("prune smollm2-135m --ladder 0.2,0.3,0.5 --data book.txt --out runs/sizes",),
)
def prune_to_sizes(
    model: ModelArgument,
    settings: Settings,
    folder: Path | None = None,
    max_decode_ms: MaxMs = None,
    max_prefill_ms: MaxMs = None,
    ladder: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=CUT, help="Make several sizes, as 0.2,0.3,0.5: each cut further from the larger one."
        ),
    ] = None,
    estimate: bool = False,
) -> None:
    """Make the models of a ladder and show them side by side; or only show what they need."""
    from mptk.features.ladder import api
    from mptk.features.ladder.ladder import name_size, should_share_weights
    from mptk.report import sections as report
    from mptk.report.runs import Run
    from mptk.report.summary import build_summary

    assert ladder is not None, "without it another function carries out the command"
    settings = with_latency(settings, max_decode_ms, max_prefill_ms)
    sizes = parse_sizes(ladder)
    if estimate:
        show_needs(api.estimate_ladder(model, settings, sizes), folder)
        return
    assert folder is not None, "without a folder the options are refused"
    # Sizes that share weights are one folder; others are folders in it, and a stopped run says which are finished.
    shared = should_share_weights(settings)
    places = [folder] if shared else [folder / name_size(each) for each in sizes]
    with explain_stop(*places, goes_on=settings.resume), show_stages(err) as progress:
        found = api.ladder(model, folder, sizes, settings, progress=progress, on_stage=make_pass_printer())
    if found:
        # All sizes side by side, then the smallest on one screen: `mptk report FOLDER` has the rest.
        out.print(report.build_comparison_view([Run(each.place.name, each.report) for each in found]))
        for line in build_summary(found[-1].report, found[-1].place):
            out.print(line, soft_wrap=True, highlight=False)
        if shared:
            smaller = ", ".join(each.place.name for each in found[1:])
            out.print(f"written to {folder}; `mptk rung {folder} SIZE --out FOLDER` writes {smaller}", soft_wrap=True)
        else:
            out.print(f"written to {', '.join(str(each.place) for each in found)}", soft_wrap=True)


@register_command("rung", check=check_rung, examples=("rung runs/sizes", "rung runs/sizes 0.3 --out runs/small"))
def write_rung(
    folder: Annotated[Path, typer.Argument(help="The --out folder of `mptk prune --ladder --shared`.")],
    size: Annotated[str | None, typer.Argument(help="One of its smaller sizes; without it they are listed.")] = None,
    destination: Annotated[Path | None, make_folder_option("Folder for that size.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result that was changed.")] = False,
) -> None:
    """Write a smaller size of a ladder that shares weights: the folder that the run proved. No model runs."""
    from mptk.features.ladder import api
    from mptk.report import sections as report
    from mptk.report.runs import list_results, read_runs

    if size is None:  # list them, as a table
        api.list_smaller_sizes(folder)
        out.print(report.build_comparison_view(read_runs(list_results([folder]))))
        return
    api.rung(folder, parse_share(size, "SIZE"), check_given(destination), overwrite=overwrite)
    out.print(f"written to {destination}", soft_wrap=True)
