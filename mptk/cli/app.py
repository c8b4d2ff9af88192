"""app: the typer application, its consoles, and its error handling."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console

from mptk.errors import MptkError, explained

app = typer.Typer(
    help="Structured pruning for language models: analyse, cut, prove, emit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)


def main() -> None:
    """Run the command line. A user's error prints one line to stderr and exits with 1; an interrupt exits with 130."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Weights come and go: with large pages torch makes a float32 weight in half the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    warnings.filterwarnings("ignore")
    try:
        with explained():
            app()
    except MptkError as error:
        err.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("interrupted; nothing was published")
        sys.exit(130)


def _show_version(wanted: bool) -> None:
    if wanted:
        from mptk.version import __version__

        typer.echo(f"mptk {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Structured pruning for language models: analyse, cut, prove, emit."""
