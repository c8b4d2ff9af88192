"""shapes: the command that ranks the legal ways to divide a budget."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mptk.cli import choices
from mptk.cli.app import command, resumable, show
from mptk.cli.console import err, out
from mptk.cli.idle import check_shapes
from mptk.cli.options import CHOICE, Json, MaxMs, Model, settings_from, with_latency, with_settings, within
from mptk.cli.places import file_to_write, folder_to_write
from mptk.cli.progress import stages
from mptk.config.bounds import BOUNDS
from mptk.config.settings import Settings
from mptk.files import write_text

OPTIONS = (
    *("sparsity", "budget", "objective", "threads", "families", "keep", "kv_heads", "width", "portable"),
    *("multiple_of", "seed", "reconstruct", "data", "inputs", "samples", "length", "batch", "micro", "lr", "rank"),
    *("lm", "kl", "hidden", "teacher", "teacher_cache", "precision", "gradient_checkpointing", "target", "rehome"),
    *("resume", "overwrite", "memory", "device", "compute_dtype", "trust_remote_code"),
)
"""The options that it shares with ``prune``."""


Most = Annotated[
    int,
    typer.Option(
        "--shapes",
        help="Most shapes measured without training.",
        rich_help_panel=CHOICE,
        **within(*BOUNDS["search_shapes"]),
    ),
]
Finalists = Annotated[
    int,
    typer.Option(help="How many of them are trained.", rich_help_panel=CHOICE, **within(*BOUNDS["search_finalists"])),
]
Tokens = Annotated[
    int,
    typer.Option(
        help="Tokens of text trained on in all; 0: none.", rich_help_panel=CHOICE, **within(*BOUNDS["search_tokens"])
    ),
]
Method = Annotated[
    str,
    typer.Option(help="What chooses units; maskprune: those of wanda.", rich_help_panel=CHOICE, **choices.METHOD),
]


@command(
    examples=(
        "shapes smollm2-135m --sparsity 0.5 --data c4.jsonl --tokens 0",
        "shapes smollm2-135m --sparsity 0.3 --data c4.jsonl --out runs/shapes --html shapes.html",
        "shapes smollm2-135m --max-decode-ms 15 --data c4.jsonl --shapes 16 --finalists 4",
    )
)
@with_settings(*OPTIONS)
def shapes(
    model: Model,
    folder: Annotated[
        Path | None,
        typer.Option("--out", callback=folder_to_write, help="Folder for shapes.json; --resume needs it."),
    ] = None,
    json_file: Json = None,
    html: Annotated[
        Path | None, typer.Option(callback=file_to_write(), help="Also write a page with the picture to this file.")
    ] = None,
    max_decode_ms: MaxMs = None,
    max_prefill_ms: MaxMs = None,
    method: Method = "wanda",
    most: Most = Settings.search_shapes,
    finalists: Finalists = Settings.search_finalists,
    tokens: Tokens = Settings.search_tokens,
    **options: object,
) -> None:
    """Rank the legal ways to divide a budget among families, blocks included, by loss and by a short training.

    Prints the command that prunes to the best one. `mptk prune --search` does both.
    """
    from mptk.api.shapes import shapes as find_shapes
    from mptk.chain.prepare import check_settings, settled
    from mptk.report.sections import shapes_view

    if html is not None:
        from mptk.report.page.svg import require_matplotlib

        require_matplotlib()
    given = settings_from({**options, "method": method})
    settings = replace(
        with_latency(given, max_decode_ms, max_prefill_ms),
        reconstruct=given.reconstruct is not False,
        search=True,
        search_shapes=most,
        search_finalists=finalists,
        search_tokens=tokens,
        onnx=False,
    )
    check_shapes(settings, folder is not None)
    check_settings(settled(settings))
    with resumable(folder) if folder is not None else nullcontext(), stages(err) as progress:
        found = find_shapes(model, folder, settings, progress=progress)
    if html is not None:
        from mptk.report.page.render import shapes_page

        write_text(html, shapes_page(found))
    show(json_file, found.to_json(), shapes_view(found))
    if json_file != Path("-"):
        out.print(found.command, soft_wrap=True, highlight=False)
