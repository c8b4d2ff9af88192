"""advise: the command that says how far a model can be cut, before any cut is made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mptk.cli.app import command, show
from mptk.cli.console import err, out
from mptk.cli.options import JsonOption, ModelArgument, out_file, refuse_idle
from mptk.cli.parse import names, parse_share
from mptk.cli.progress import stages
from mptk.config.setting import Asked
from mptk.config.settings import Settings
from mptk.files import write_text
from mptk.protocols.advice import ADVICE, SPARSITIES


@command(
    examples=(
        "advise smollm2-135m --data code.jsonl,chat.jsonl,c4.jsonl",
        "advise smollm2-135m --data c4.jsonl --tolerance 20% --sparsities 0.1,0.2,0.3 --html advice.html",
    ),
    base=ADVICE,
)
def advise(
    model: ModelArgument,
    settings: Settings,
    sparsities: Annotated[
        str,
        typer.Option(
            help="Shares of the budget to remove; the nearest legal cuts are measured.",
            show_default=f"{len(SPARSITIES)} from {SPARSITIES[0]:.0%} to {SPARSITIES[-1]:.0%}",
        ),
    ] = ",".join(f"{share:.0%}" for share in SPARSITIES),
    tolerance: Annotated[
        str,
        typer.Option(
            help="Largest safe rise of the perplexity; of a model without one, largest share of other predictions."
        ),
    ] = "5%",
    json_file: JsonOption = None,
    html: Annotated[Path | None, out_file("Also write a page with charts to this file.")] = None,
) -> None:
    """Say which sparsity is safe: measure cuts of several sizes on each text of --data, before any is made.

    Consumers are fitted; nothing is trained and nothing is written. Prints the command of the recommended cut.
    """
    from mptk.api.advice import advise as measure
    from mptk.report.advice import advice_view

    cuts = [parse_share(share, "--sparsities") for share in names(sparsities)]
    most = parse_share(tolerance, "--tolerance")
    refuse_idle("advise", Asked(settings, writes=False))
    with stages(err) as progress:
        found = measure(model, settings, sparsities=cuts, tolerance=most, progress=progress)
    if html is not None:
        from mptk.report.page.render import advice_page

        write_text(html, advice_page(found))
    show(json_file, found.to_json(), advice_view(found))
    if json_file != Path("-") and found.command:
        out.print(found.command, soft_wrap=True, highlight=False)
