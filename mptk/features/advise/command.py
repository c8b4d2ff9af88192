"""command: ``mptk advise``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mptk.cli.app import announce_reading, register_command, show_result
from mptk.cli.console import err, out, show_stages
from mptk.cli.options import (
    JsonOption,
    ModelArgument,
    make_file_option,
    make_number_option,
    parse_names,
    parse_size,
    refuse,
    refuse_idle,
)
from mptk.config import Asked, Settings, parse_share
from mptk.features.advise.advice import ADVICE, CALIBRATION_STEPS, SPARSITIES
from mptk.files import write_text

AUTO = "auto"


def check_advise(
    settings: Settings,
    sparsities: str,
    tolerance: str,
    calibrate: bool,
    types: str,
    max_decode_ms: float | None,
    max_prefill_ms: float | None,
    max_size: str | None,
    max_memory: str | None,
) -> None:
    """Check the options of ``advise``."""
    sizes = (parse_size(max_size, "max_size"), parse_size(max_memory, "max_memory"))
    limited = any(most is not None for most in (max_decode_ms, max_prefill_ms, *sizes))
    if not limited and types in ("", AUTO):
        why = "only a comparison of types makes ways; give --types int8,int4 or a limit, as --max-decode-ms 10"
        refuse(("measure",), why)
    parse_shares(sparsities)
    parse_share(tolerance, "--tolerance")
    # Without a limit, decoding is predicted for the types.
    decodes = max_decode_ms is not None or max_memory is not None or (not limited and types not in ("", AUTO))
    refuse_idle("advise", Asked(settings, writes=False, decodes=decodes))
    if not calibrate:
        refuse(("steps",), "only --calibrate trains; give --calibrate, or leave it out")


def parse_shares(sparsities: str) -> list[float]:
    """``20%,0.4`` → [0.2, 0.4]."""
    return [parse_share(share, "--sparsities") for share in parse_names(sparsities)]


@register_command(
    "advise",
    check=check_advise,
    examples=(
        "advise smollm2-135m --data code.jsonl,chat.jsonl,c4.jsonl",
        "advise smollm2-135m --data c4.jsonl --tolerance 20% --sparsities 0.1,0.2,0.3 --html advice.html",
        "advise smollm2-135m --data c4.jsonl --tolerance 50% --calibrate --steps 32",
        "advise smollm2-135m --data c4.jsonl,chat.jsonl --max-decode-ms 10 --measure",
    ),
    base=ADVICE,
)
def show_advice(
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
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help=f"Also train two of the cuts, each for --steps ({CALIBRATION_STEPS}): what do cuts cost then?",
        ),
    ] = False,
    types: Annotated[
        str,
        typer.Option(help="Types to compare each cut in; '' for none.", show_default="int8,int4 if there is a limit"),
    ] = AUTO,
    max_decode_ms: Annotated[
        float | None, make_number_option("Most milliseconds of a decoding step, as predicted.", 1e-6, 1e9)
    ] = None,
    max_prefill_ms: Annotated[
        float | None, make_number_option("Most milliseconds of a prompt of 512 tokens, as predicted.", 1e-6, 1e9)
    ] = None,
    max_size: Annotated[str | None, typer.Option(help="Largest size of the graph, as 120MB.")] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Most memory in decoding with --context tokens in the KV cache, as 300MB.")
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Make the best three ways to round or cut, time and measure them, and choose."),
    ] = False,
    json_file: JsonOption = None,
    html: Annotated[Path | None, make_file_option("Also write a page with charts to this file.", "page")] = None,
) -> None:
    """Say which sparsity is safe: measure cuts of several sizes on each text of --data, before any is made.

    Consumers are fitted, and nothing is written. Only --calibrate trains. Prints the command of the recommended cut,
    and with --calibrate the command of the cut recommended with training. With a limit also says whether to round, to
    cut, or both.
    """
    announce_reading(model, json_file=json_file)
    from mptk.features.advise.api import advise
    from mptk.features.advise.view import build_advice_view, list_commands

    cuts, most = parse_shares(sparsities), parse_share(tolerance, "--tolerance")
    with show_stages(err) as progress:
        found = advise(
            model,
            settings,
            sparsities=cuts,
            tolerance=most,
            calibrate=calibrate,
            types=None if types == AUTO else parse_names(types),
            max_decode_ms=max_decode_ms,
            max_prefill_ms=max_prefill_ms,
            max_size=parse_size(max_size, "max_size"),
            max_memory=parse_size(max_memory, "max_memory"),
            measure=measure,
            progress=progress,
        )
    if html is not None:
        from mptk.features.advise.page import render_advice_page

        write_text(html, render_advice_page(found))
    show_result(json_file, found.to_json(), build_advice_view(found))
    # Commands to copy: outside of the table, unbroken, and not in JSON, which has them as a field.
    if json_file != Path("-"):
        for line in list_commands(found):
            out.print(line, soft_wrap=True, highlight=False)
