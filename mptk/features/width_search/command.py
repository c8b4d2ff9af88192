"""command: ``mptk shapes``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

from mptk.cli.app import announce_reading, explain_stop, register_command, show_result
from mptk.cli.console import err, out, show_stages
from mptk.cli.options import (
    JsonOption,
    MaxMs,
    ModelArgument,
    make_file_option,
    make_folder_option,
    refuse_idle,
    with_latency,
)
from mptk.config import Asked, Settings, with_keywords
from mptk.files import write_text


def check_shapes(
    model: str,
    settings: Settings,
    folder: Path | None,
    json_file: Path | None,
    max_decode_ms: float | None,
    max_prefill_ms: float | None,
) -> None:
    """Check the options of ``shapes``, as ``check_prune`` does: by the settings as a run completes them."""
    announce_reading(model, json_file=json_file)
    from mptk.run.checks import check_settings
    from mptk.run.minutes import fill_in

    settings = with_latency(settings, max_decode_ms, max_prefill_ms)
    refuse_idle("shapes", Asked(settings, writes=folder is not None))
    check_settings(fill_in(settings))


@register_command(
    "shapes",
    check=check_shapes,
    examples=(
        "shapes smollm2-135m --sparsity 0.5 --data c4.jsonl --tokens 0",
        "shapes smollm2-135m --sparsity 0.3 --data c4.jsonl --out runs/shapes --html shapes.html",
        "shapes smollm2-135m --max-decode-ms 15 --data c4.jsonl --shapes 16 --finalists 4",
    ),
    base=with_keywords(Settings(method="wanda", reconstruct=True, onnx=False), {"search": True}),
)
def show_shapes(
    model: ModelArgument,
    settings: Settings,
    folder: Annotated[Path | None, make_folder_option("Folder for shapes.json; needed for --resume.")] = None,
    json_file: JsonOption = None,
    html: Annotated[Path | None, make_file_option("Also write a page with charts to this file.", "page")] = None,
    max_decode_ms: MaxMs = None,
    max_prefill_ms: MaxMs = None,
) -> None:
    """Rank the legal ways to divide a budget among families and blocks, by loss and by a short training.

    Prints the command that prunes to the best shape; `mptk prune --search` does both. With maskprune, wanda scores the
    units.
    """
    from mptk.features.width_search.api import shapes as find_shapes
    from mptk.features.width_search.view import build_shapes_view

    settings = with_latency(settings, max_decode_ms, max_prefill_ms)
    # Without a folder a stopped search keeps nothing, so there is nothing to say about it.
    with explain_stop(folder) if folder is not None else nullcontext(), show_stages(err) as progress:
        found = find_shapes(model, folder, settings, progress=progress)
    if html is not None:
        from mptk.features.width_search.page import render_shapes_page

        write_text(html, render_shapes_page(found))
    show_result(json_file, found.to_json(), build_shapes_view(found))
    if json_file != Path("-"):
        out.print(found.command, soft_wrap=True, highlight=False)
