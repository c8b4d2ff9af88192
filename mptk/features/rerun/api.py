"""rerun: repeat the run that made a folder, from its report, and compare the two reports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mptk.api.pruned import prune, recover
from mptk.config import IN_MEMORY, RECIPE_FILE, read_recipe
from mptk.errors import FileError
from mptk.files.outputs import check_apart
from mptk.ir import PassRecord
from mptk.progress import Progress
from mptk.protocols import METRICS, REPORT_FILE, TRACKER, Report
from mptk.publish.licence import CARD
from mptk.publish.manifest import check_manifest, read_manifest
from mptk.reading import Json
from mptk.run.describe import PACKAGES

VARYING = (REPORT_FILE, RECIPE_FILE, CARD, METRICS, "bench.json")
"""Files that differ between equal runs: they name folders and times."""


def repeat_run(
    folder: str | Path,
    out: str | Path,
    progress: Progress | None = None,
    *,
    model: str | None = None,
    on_stage: Callable[[PassRecord], None] | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> list[Json] | None:
    """Repeat the ``prune`` or ``recover`` that made ``folder``, and write the result to ``out``.

    Settings, data and, unless ``model`` is given, the model come from the folder's report. They may be downloaded. Code
    of the model runs only with ``trust_remote_code``. ``overwrite``: as in ``Settings``.

    Returns:
        Rows with ``what`` was compared, ``before``, ``now``, and whether they are the ``same``. If several processes
        run, only the first gets them; the others get None.

    Raises:
        MptkError: as ``prune`` and ``recover``; or the folder has no report, or was changed.
    """
    # What cannot be repeated: a folder without a recipe, and what was in the memory of a Python program.
    folder = Path(folder)
    before = Report.read(folder)
    check_manifest(folder)
    if not (folder / RECIPE_FILE).is_file():
        raise FileError(
            f"{folder} has no {RECIPE_FILE}; it was written by an earlier mptk, so run `mptk prune` with its settings",
            name=folder,
        )
    if before.changed:
        raise FileError(
            f"the weights of {folder} were changed in memory, which mptk rerun cannot repeat; prune again", name=folder
        )
    if IN_MEMORY in before.settings.sources:
        raise FileError(f"{folder} was pruned in Python with samples in memory; run that program again", name=folder)
    if before.settings.not_alone:
        raise FileError(
            f"{folder} shares its weights with other sizes; run `mptk prune --config {folder / RECIPE_FILE}`",
            name=folder,
        )
    # Only the recipe says whether it was a recovery, and of which folder. All else is in the report.
    start = read_recipe(folder / RECIPE_FILE).get("folder")
    check_apart(out, folder)
    settings = replace(before.settings, resume=False, overwrite=overwrite, trust_remote_code=trust_remote_code)
    # A report does not choose where this machine writes: neither a folder nor the user's account.
    settings = replace(settings, learning=replace(settings.learning, teacher_cache=None, tracker="none"))
    if start is not None:
        found = recover(str(start), out, settings, model=model, progress=progress, on_stage=on_stage)
    else:
        if settings.plan is not None:  # the folder's copy of it, which also has its conversions
            settings = settings.with_plan(str(folder / "plan.json"))
        found = prune(model or before.model, out, settings, progress=progress, on_stage=on_stage)
    return None if found is None else compare_reports(before, found.report) + compare_files(folder, Path(out))


def compare_reports(before: Report, now: Report) -> list[Json]:
    """Compare two reports, as rows of ``repeat_run``."""
    first, second = _list_facts(before), _list_facts(now)
    names = list(dict.fromkeys([*first, *second]))
    rows = [{"what": name, "before": first.get(name, ""), "now": second.get(name, "")} for name in names]
    return [{**row, "same": row["before"] == row["now"]} for row in rows]


def compare_files(before: Path, now: Path) -> list[Json]:
    """Compare the files of two folders, as rows of ``repeat_run``, except files that hold paths or times."""
    first, second = read_manifest(before), read_manifest(now)
    names = sorted(name for name in first | second if name not in VARYING and not name.startswith(f"{TRACKER}/"))
    rows = [(name, first.get(name, "")[:12], second.get(name, "")[:12]) for name in names]
    return [{"what": f"written {name}", "before": a, "now": b, "same": a == b} for name, a, b in rows]


def list_differing_results(rows: Sequence[Json]) -> list[str]:
    """The results that differ in rows of ``repeat_run``. Versions do not count."""
    return [row["what"] for row in rows if not row["same"] and row["what"] not in ("mptk", "python", *PACKAGES)]


def _list_facts(report: Report) -> dict[str, object]:
    sets = {name: each for name, each in report.data.items() if name != "files"}
    return {
        "model": report.model_sha256[:12],
        "plan": report.plan_sha256[:12],
        "weights": report.weights_sha256[:12],
        **{
            f"{name} data ({key})": found["sha256"][:12]
            for name, each in sets.items()
            for key, found in each["inputs"].items()
        },
        **{f"file {path}": found[:12] for path, found in report.data.get("files", {}).items()},
        **{f"quality of {name}": value for name, value in report.quality.items() if name not in ("protocol", "metric")},
        "mptk": report.mptk,
        **report.versions,
    }
