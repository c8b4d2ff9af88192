"""command: ``mptk rerun``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from mptk.cli.app import explain_stop, register_command, show_result
from mptk.cli.console import err, make_pass_printer, show_stages
from mptk.cli.options import DenseOption, Folder, JsonOption, make_folder_option
from mptk.config import Settings, collect_values
from mptk.errors import ChangedError

RERUN = "mptk-rerun/1"


@register_command("rerun", examples=("rerun runs/m30 --out runs/again",))
def show_rerun(
    folder: Folder,
    destination: Annotated[Path, make_folder_option("Folder for the new result.")],
    settings: Settings,
    model: DenseOption = None,
    json_file: JsonOption = None,
) -> None:
    """Repeat the run that made a folder, from its report, and show what differs. Exits with 1 if a result differs."""
    from mptk.features.rerun.api import list_differing_results, repeat_run
    from mptk.features.rerun.view import build_rerun_view

    with explain_stop(destination), show_stages(err) as progress:
        found = repeat_run(
            folder,
            destination,
            progress,
            model=model,
            on_stage=make_pass_printer(),
            **collect_values(settings, "rerun"),
        )
    # Of several processes only the first has rows. The table comes before the error, which names only what differs.
    if found is not None:
        show_result(
            json_file,
            {"format": RERUN, "folder": str(folder), "out": str(destination), "rows": found},
            build_rerun_view(found),
        )
        if differ := list_differing_results(found):
            raise ChangedError(
                f"the result differs from {folder} in {', '.join(differ)}; compare the versions in both reports",
                name=differ[0],
            )
