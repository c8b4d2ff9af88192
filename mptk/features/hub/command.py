"""command: ``mptk push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mptk.cli.app import register_command
from mptk.cli.console import err, print_text, show_stages


@register_command("push", examples=("push runs/m30 me/smollm2-pruned --private",))
def push_folder(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that mptk wrote.")],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made if missing.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Make a new repository private or public; default: your account's."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch; made if missing. Default: the main one.")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the folder and list what would go.")] = False,
) -> None:
    """Upload a folder that mptk wrote, with its model card, to the hub. Its files must be unchanged.

    report.json and run.yaml name the dense model and the data as you gave them, local paths included.
    """
    from mptk.features.hub.push import push_files

    with show_stages(err) as progress:
        progress("upload", 0, 0)
        print_text(push_files(folder, repo, private=private, revision=revision, message=message, dry_run=dry_run))
