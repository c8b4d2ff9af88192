"""compare: several pruned folders: which of them may be compared, and what is best among those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mptk.files import json_text
from mptk.report.runs import Run
from mptk.report.view import plural


@dataclass(frozen=True)
class Comparable:
    """Runs of one dense model whose quality was measured in one way. ``apart``: what sets them apart from the first."""

    runs: tuple[Run, ...]
    apart: str = ""

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def rises(self) -> bool:
        """Whether more is better. A perplexity is at least 1; of a share, the dense model has 1."""
        return bool(self.first.report.quality["dense"] <= 1)


def heading(number: int, group: Comparable) -> str:
    """The title of a group. ``number``: from 0, the group that others are compared with."""
    return f"{number + 1}. {group.first.report.quality['metric']} of {plural(len(group.runs), 'run')}"


def grouped(runs: Sequence[Run]) -> tuple[list[Comparable], list[Run]]:
    """Groups of runs that may be compared, the largest first, and the runs without a measured quality."""
    measured = [run for run in runs if run.measured]
    groups: dict[str, list[Run]] = {}
    for run in measured:
        groups.setdefault(json_text([text for _, text in terms(run)]), []).append(run)
    ordered = sorted(groups.values(), key=lambda group: -len(group))
    found = [Comparable(tuple(group), difference(ordered[0][0], group[0])) for group in ordered]
    return found, [run for run in runs if not run.measured]


def terms(run: Run) -> list[tuple[str, Any]]:
    """All that must be the same in two runs whose quality is compared, each with its name."""
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


def difference(one: Run, other: Run) -> str:
    """What of ``terms`` differs, in words; the last only if nothing else does."""
    pairs = zip(terms(one), terms(other), strict=True)
    found = [name for (name, here), (_, there) in pairs if here != there]
    return ", ".join(found[:-1] if len(found) > 1 and found[-1] == terms(one)[-1][0] else found)


def front(group: Comparable) -> list[Run]:
    """The runs that no other of the group beats: none removes as much and is as good, and better in one of both."""
    sign = -1 if group.rises else 1
    points = [(run.report.sparsity, sign * run.report.quality["pruned"]) for run in group.runs]

    def beaten(point: tuple[float, float]) -> bool:
        return any(x >= point[0] and y <= point[1] and (x, y) != point for x, y in points)

    kept = [run for run, point in zip(group.runs, points, strict=True) if not beaten(point)]
    return sorted(kept, key=lambda run: run.report.sparsity)
