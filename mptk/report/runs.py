"""runs: read what reports show of pruned folders, name folders and models, and find which runs may be compared."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from typing_extensions import TypedDict

from mptk.files import format_json
from mptk.ir import FamilyPlan, Plan, split_layer
from mptk.ort.bench import Bench
from mptk.protocols import REPORT_FILE, Report, Row
from mptk.reading import make_damage_error, make_typed, parse_json, read_as, read_text
from mptk.report.view import format_count, format_ranges

_REMEDY = "remove that file, or prune again"


@dataclass(frozen=True)
class Run:
    """A pruned folder, ``place``.

    ``metrics``: phase of training → its steps; empty if nothing was trained. ``texts``: prompt → what the dense and
    the pruned model write after it.
    """

    name: str
    report: Report
    plan: Plan = field(default_factory=lambda: Plan({}))
    bench: Bench | None = None
    metrics: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    texts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    place: Path = Path()

    @property
    def measured(self) -> bool:
        """Whether the quality of the dense and of the pruned model is known."""
        return all(isinstance(self.report.quality.get(name), int | float) for name in ("dense", "pruned"))

    @property
    def kept(self) -> dict[str, FamilyPlan]:
        """The kept units of cut families. Layers with different widths are joined to one family."""
        # A plan of single layers names them FAMILY.LAYER. A chart shows the whole family, with as many columns as the
        # widest layer has. A layer that the plan does not name keeps all of its units.
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
    return Run(name, report, plan, read_bench(folder), _read_metrics(folder / "metrics.jsonl"), place=folder)


def read_bench(folder: Path) -> Bench | None:
    """The timings of a pruned folder, if there are any. Raises MptkError if they are damaged."""
    # lexists, not exists: a link that leads nowhere is damage, and not a folder without timings.
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
    """The fields of each line of ``metrics.jsonl``, beside the metrics themselves."""

    phase: str
    step: int


def list_results(folders: Sequence[Path]) -> list[Path]:
    """``folders``, with the results in a folder in its place, the largest model first.

    A result itself comes with those of which it holds parts.
    """

    def list_within(folder: Path) -> list[Path]:
        own = (folder / REPORT_FILE).exists()
        places = [folder / name for name in Report.read(folder).settings.subfolders] if own else [folder]
        found = [each.parent for place in places for each in place.glob(f"*/{REPORT_FILE}")]
        return [folder] * own + sorted(found, key=lambda each: Report.read(each).sparsity) or [folder]

    return [result for folder in folders for result in list_within(folder)]


def name_folders(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as distinguish them. A folder that is given twice has one name."""
    paths = [Path(os.path.abspath(folder)) for folder in folders]  # ``.`` and ``..`` have no name of their own
    for count in range(1, max((len(path.parts) for path in paths), default=1)):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]


def shorten_model_name(model: str) -> str:
    """A short name of a model: a hub id, also of a cached snapshot, or the last part of an absolute path."""
    if not os.path.isabs(model):
        return model
    # The hub's cache: …/models--OWNER--NAME/snapshots/COMMIT.
    cached = re.search(r"/models--([^/]+)/snapshots/", model)
    return cached[1].replace("--", "/") if cached else Path(model).name


def name_pruned(report: Report) -> str:
    """A name of the pruned model for files of other programs."""
    return f"{shorten_model_name(report.model)}, pruned by {report.sparsity:.0%}"


def describe_legal(report: Report, family: str) -> str:
    """The widths of a family that the target can hold, in words."""
    if family not in report.legal:
        return "not recorded"
    widths = report.legal[family]["widths"]
    return format_ranges(widths) if len(widths) > 1 else "none narrower"


def explain_uncut(report: Report, family: str) -> str:
    """The reason why a family was not cut, or not further: the first that applies, the surest first."""
    settings, here = report.settings, report.families[family]
    legal = report.legal.get(family)
    narrower = None if legal is None else [w for w in legal["widths"] if w < here["width"]]
    # It was cut: what set the width?
    if here["width"] < here["of"]:
        if settings.plan is not None or family in settings.widths:
            return "this width was given"
        if narrower == []:
            return "no narrower width is legal"
        return "the budget was met at this width"
    # It is whole. The target may forbid a cut, the settings may, or the method chose so.
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
    # A family of one group runs through all layers, like the hidden width. By default it is left whole.
    if here["layers"] == 1 and not settings.families:
        return "runs through all layers: cut only if asked for"
    return "the chosen division of the budget keeps it whole"


# ---- which runs may be compared ----


@dataclass(frozen=True)
class Comparable:
    """Runs of one dense model, with quality measured in one way. ``apart``: how they differ from the first group."""

    runs: tuple[Run, ...]
    apart: str = ""

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def rises(self) -> bool:
        """Whether more is better. A report does not say so, but a perplexity is at least 1 and a share at most 1."""
        return bool(self.first.report.quality["dense"] <= 1)


def name_group(number: int, group: Comparable) -> str:
    """The title of a group. ``number``: counts from 0, the group that the others are compared with."""
    return f"{number + 1}. {group.first.report.quality['metric']} of {format_count(len(group.runs), 'run')}"


def group_runs(runs: Sequence[Run]) -> tuple[list[Comparable], list[Run]]:
    """Groups of runs that may be compared, the largest first, and the runs without a measured quality."""
    measured = [run for run in runs if run.measured]
    groups: dict[str, list[Run]] = {}
    for run in measured:
        groups.setdefault(format_json([text for _, text in list_terms(run)]), []).append(run)
    ordered = sorted(groups.values(), key=lambda group: -len(group))
    found = [Comparable(tuple(group), describe_difference(ordered[0][0], group[0])) for group in ordered]
    return found, [run for run in runs if not run.measured]


def list_terms(run: Run) -> list[tuple[str, object]]:
    """All values that must be equal in two runs to compare their quality, each with a description.

    The dense model's own value is last: it differs, too, if any other does.
    """
    report = run.report
    windows = report.data.get("evaluation", {}).get("inputs")
    return [
        ("another dense model", report.model_sha256),
        ("another kind of model", report.task),
        ("another metric", report.quality["metric"]),
        ("another protocol", report.quality["protocol"]),
        ("other text", windows),
        ("another value of the dense model", report.quality["dense"]),
    ]


def describe_difference(one: Run, other: Run) -> str:
    """The differences in ``list_terms``, in words; the last one only if nothing else differs."""
    pairs = zip(list_terms(one), list_terms(other), strict=True)
    found = [name for (name, here), (_, there) in pairs if here != there]
    return ", ".join(found[:-1] if len(found) > 1 and found[-1] == list_terms(one)[-1][0] else found)


def find_front(group: Comparable) -> list[Run]:
    """The runs on the Pareto front of removed share and quality."""
    sign = -1 if group.rises else 1
    points = [(run.report.sparsity, sign * run.report.quality["pruned"]) for run in group.runs]

    def is_beaten(point: tuple[float, float]) -> bool:
        return any(x >= point[0] and y <= point[1] and (x, y) != point for x, y in points)

    kept = [run for run, point in zip(group.runs, points, strict=True) if not is_beaten(point)]
    return sorted(kept, key=lambda run: run.report.sparsity)
