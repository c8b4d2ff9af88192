"""compare: find which of several pruned folders may be compared, and the best among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mptk.files import format_json
from mptk.report.runs import Run
from mptk.report.view import format_count


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
        """Whether more is better: a perplexity is at least 1, a share at most 1."""
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
    """All values that must be equal in two runs to compare their quality, each with a description."""
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

    def beaten(point: tuple[float, float]) -> bool:
        return any(x >= point[0] and y <= point[1] and (x, y) != point for x, y in points)

    kept = [run for run, point in zip(group.runs, points, strict=True) if not beaten(point)]
    return sorted(kept, key=lambda run: run.report.sparsity)
