"""command: ``mptk labels``."""

from pathlib import Path

from mptk.cli.app import register_command
from mptk.cli.console import print_text


@register_command("labels", examples=("labels runs/m30",))
def list_labels(folders: list[Path]) -> None:
    """List the labels of pruned folders."""
    from mptk import Report

    for folder in folders:
        print_text(f"{folder}: {Report.read(folder).rows.get('label', {}).get('text', 'no label')}")
