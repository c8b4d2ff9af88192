"""shapes: the command that ranks the legal ways to divide a budget."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

from mptk.cli.app import command, resumable, show
from mptk.cli.console import err, out
from mptk.cli.options import JsonOption, MaxMs, ModelArgument, out_file, out_folder, refuse_idle, with_latency
from mptk.cli.progress import stages
from mptk.config.setting import Asked
from mptk.config.settings import Settings
from mptk.files import write_text


@command(
    examples=(
        "shapes smollm2-135m --sparsity 0.5 --data c4.jsonl --tokens 0",
        "shapes smollm2-135m --sparsity 0.3 --data c4.jsonl --out runs/shapes --html shapes.html",
        "shapes smollm2-135m --max-decode-ms 15 --data c4.jsonl --shapes 16 --finalists 4",
    ),
    base=Settings(method="wanda", reconstruct=True, search=True, onnx=False),
)
def shapes(
    model: ModelArgument,
    settings: Settings,
    folder: Annotated[Path | None, out_folder("Folder for shapes.json; needed for --resume.")] = None,
    json_file: JsonOption = None,
    html: Annotated[Path | None, out_file("Also write a page with charts to this file.")] = None,
    max_decode_ms: MaxMs = None,
    max_prefill_ms: MaxMs = None,
) -> None:
    """Rank the legal ways to divide a budget among families and blocks, by loss and by a short training.

    Prints the command that prunes to the best shape; `mptk prune --search` does both. With maskprune, wanda scores the
    units.
    """
    from mptk.api.shapes import shapes as find_shapes
    from mptk.chain.amounts import settled
    from mptk.chain.prepare import check_settings
    from mptk.report.sections import shapes_view

    settings = with_latency(settings, max_decode_ms, max_prefill_ms)
    refuse_idle("shapes", Asked(settings, writes=folder is not None))
    check_settings(settled(settings))
    with resumable(folder) if folder is not None else nullcontext(), stages(err) as progress:
        found = find_shapes(model, folder, settings, progress=progress)
    if html is not None:
        from mptk.report.page.render import shapes_page

        write_text(html, shapes_page(found))
    show(json_file, found.to_json(), shapes_view(found))
    if json_file != Path("-"):
        out.print(found.command, soft_wrap=True, highlight=False)
