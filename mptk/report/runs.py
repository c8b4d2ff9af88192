"""runs: read the data of a pruned folder that reports show."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from typing_extensions import TypedDict

from mptk.ir.plan import FamilyPlan, Plan, split_layer
from mptk.ort.bench import Bench
from mptk.protocols.report import REPORT_FILE, Report, Row
from mptk.publish.manifest import RUNGS
from mptk.reading import make_damage_error, make_typed, parse_json, read_as, read_text
from mptk.report.view import format_ranges

_REMEDY = "remove that file, or prune again"


@dataclass(frozen=True)
class Run:
    """A pruned folder.

    ``metrics``: phase of training → its steps; empty if nothing was trained. ``texts``: prompt → what the dense and
    the pruned model write after it.
    """

    name: str
    report: Report
    plan: Plan = field(default_factory=lambda: Plan({}))
    bench: Bench | None = None
    metrics: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    texts: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        """Whether the quality of the dense and of the pruned model is known."""
        return all(isinstance(self.report.quality.get(name), int | float) for name in ("dense", "pruned"))

    @property
    def kept(self) -> dict[str, FamilyPlan]:
        """The kept units of cut families. Layers with different widths are joined to one family."""
        found = {name: family for name, family in self.plan.families.items() if family.width < family.of}
        for family in sorted({split_layer(name)[0] for name in self.plan.families} - self.plan.families.keys()):
            rows = {name: row for name, row in self.report.families.items() if split_layer(name)[0] == family}
            layers = {name: found.pop(name).keep for name in rows if name in found}
            scopes = max(len(kept) for keep in layers.values() for kept in keep.values())
            of = max(row["of"] for row in rows.values())
            entire = {"": (tuple(range(of)),) * scopes}
            keep = {f"{name}{layer}": kept for name in rows for layer, kept in layers.get(name, entire).items()}
            found[family] = FamilyPlan(max(row["width"] for row in rows.values()), of, keep)
        return found


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of these folders, each with a unique name: the shortest path that distinguishes them.

    Raises:
        MptkError: a folder is not a pruned folder, or one of its files is damaged.
    """
    return [read_run(folder, name) for folder, name in zip(folders, name_folders(folders), strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """Report, plan, timings and metrics of a pruned folder. Raises MptkError as ``read_runs``."""
    report, plan = Report.read(folder), Plan.load(folder / "plan.json")
    return Run(name, report, plan, read_bench(folder), _read_metrics(folder / "metrics.jsonl"))


def read_bench(folder: Path) -> Bench | None:
    """The timings of a pruned folder, if there are any. Raises MptkError if they are damaged."""
    file = folder / "bench.json"
    return read_as(Bench, file, make_damage_error(file, _REMEDY)) if os.path.lexists(file) else None


def _read_metrics(file: Path) -> dict[str, list[Row]]:
    """Phase of training → its steps. Raises MptkError if the file is damaged."""
    phases: dict[str, list[Row]] = {}
    if not os.path.lexists(file):
        return phases
    wrong = make_damage_error(file, _REMEDY)
    for number, line in enumerate(read_text(file, wrong).splitlines(), 1):
        try:
            if line:
                row = parse_json(line, wrong)
                phases.setdefault(make_typed(MetricsLine, row)["phase"], []).append(row)
        except ValueError as error:
            raise wrong(f"line {number} is not a step of training ({error})") from error
    return phases


class MetricsLine(TypedDict):
    """The fields of each line of ``metrics.jsonl``, beside metrics."""

    phase: str
    step: int


def with_rungs(folders: Sequence[Path]) -> list[Path]:
    """``folders``, with the results of a ladder in the place of its folder, the largest model first.

    If the sizes share weights, the folder is the largest.
    """

    def rungs(folder: Path) -> list[Path]:
        own = (folder / REPORT_FILE).exists()
        found = [each.parent for each in (folder / RUNGS if own else folder).glob(f"*/{REPORT_FILE}")]
        return [folder] * own + sorted(found, key=lambda each: Report.read(each).sparsity) or [folder]

    return [rung for folder in folders for rung in rungs(folder)]


def name_folders(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as distinguish them. A folder that is given twice has one name."""
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    for count in range(1, max((len(path.parts) for path in paths), default=1)):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]


def name_model(model: str) -> str:
    """A short name of a model: a hub id, also of a cached snapshot, or the last part of an absolute path."""
    if not os.path.isabs(model):
        return model
    cached = re.search(r"/models--([^/]+)/snapshots/", model)
    return cached[1].replace("--", "/") if cached else Path(model).name


def name_pruned(report: Report) -> str:
    """A name of the pruned model that says so."""
    return f"{name_model(report.model)}, pruned by {report.sparsity:.0%}"


def describe_legal(report: Report, family: str) -> str:
    """The widths of a family that the target can hold, in words."""
    if family not in report.legal:
        return "not recorded"
    widths = report.legal[family]["widths"]
    return format_ranges(widths) if len(widths) > 1 else "none narrower"


def explain_uncut(report: Report, family: str) -> str:
    """The reason why a family was not cut, or not further."""
    settings, here = report.settings, report.families[family]
    legal = report.legal.get(family)
    narrower = None if legal is None else [w for w in legal["widths"] if w < here["width"]]
    if here["width"] < here["of"]:
        if settings.plan is not None or family in settings.widths:
            return "this width was given"
        if narrower == []:
            return "no narrower width is legal"
        return "the budget was met at this width"
    if legal is not None and legal["refused"]:
        return str(legal["refused"])
    if narrower == []:
        return "no narrower width is legal"
    names = {family, split_layer(family)[0]}  # of a layer also its family's
    if names & {*settings.keep}:
        return "kept whole on request (--keep)"
    if settings.plan is not None:
        return "the given plan keeps it whole"
    if settings.families and not names & {*settings.families}:
        return "not among the requested --families"
    if settings.only_layers is not None and here["layers"] == 1 and "." in family:
        return f"outside of the requested --layers {settings.layers}"
    if here["layers"] == 1 and not settings.families:
        return "runs through all layers: cut only if asked for"
    return "the chosen division of the budget keeps it whole"
