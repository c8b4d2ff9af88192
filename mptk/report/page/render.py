"""render: values to pages. Templates lay out, every text is escaped; only ``Svg`` goes in as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mptk.ir.families import Analysis
from mptk.plain import plain
from mptk.protocols.report import unreadable
from mptk.protocols.shapes import Shapes
from mptk.report.page import charts, shapes, words
from mptk.report.page.compare import Comparable, front, grouped, pareto_chart
from mptk.report.page.coupling import coupled, coupling_chart
from mptk.report.page.runs import Run, model_name, whole
from mptk.report.page.svg import Svg, require_matplotlib
from mptk.version import __version__
from passes.targets.legalize import LegalWidths


@dataclass(frozen=True)
class Ranking:
    """The shapes of a search. ``training`` is None if none was trained."""

    found: Shapes
    front: Svg
    training: Svg | None
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class RunView:
    """A run with its charts. ``kept``: family → its map. ``traces``: phase → its charts."""

    run: Run
    title: str
    tiles: Sequence[tuple[str, str, str]]
    families: Sequence[Mapping[str, str]]
    widths: Svg
    cost: Svg
    kept: Mapping[str, Svg]
    traces: Mapping[str, Sequence[Svg]]
    proof: Svg | None
    bench: Svg | None
    search: Ranking | None
    stages: Svg


@dataclass(frozen=True)
class GroupView:
    """Runs that may be compared, with their chart. ``best``: the names of those that no other beats."""

    group: Comparable
    chart: Svg
    best: Sequence[str]


def report_page(runs: Sequence[Run]) -> str:
    """One page about pruned folders; about several, first those side by side that may be compared.

    Raises:
        MptkError: matplotlib is not installed; or a report is not as ``mptk prune`` writes it.
    """
    require_matplotlib()
    views = [run_view(run) for run in runs]
    groups, unmeasured = grouped(runs) if len(runs) > 1 else ([], [])
    compared = [GroupView(g, pareto_chart(g), [run.name for run in front(g)]) for g in groups]
    return _filled("report.html", views=views, groups=compared, unmeasured=unmeasured)


def analysis_page(model: str, analysis: Analysis, legal: LegalWidths, blocked: Sequence[tuple[str, ...]]) -> str:
    """One page about a model: what can be cut, and the matrices of one layer that are cut together.

    Args:
        model: as the user named it.
        analysis: of the model.
        legal: what the target can hold.
        blocked: axes that cannot be cut, each with its size, its weights and the reason.

    Raises:
        MptkError: matplotlib is not installed.
    """
    require_matplotlib()
    layer = coupled(analysis, legal)
    chart = coupling_chart(layer) if layer.edges else None
    return _filled(
        "analysis.html",
        model=model_name(model),
        analysis=analysis,
        legal=legal,
        blocked=blocked,
        layer=layer,
        chart=chart,
    )


def shapes_page(found: Shapes) -> str:
    """One page about the shapes of a search. Raises MptkError if matplotlib is not installed."""
    require_matplotlib()
    return _filled("shapes.html", model=model_name(found.model), view=ranking(found))


def ranking(found: Shapes) -> Ranking:
    """The charts and the table of a search."""
    front, training = shapes.front_chart(found), shapes.training_chart(found)
    return Ranking(found, front, training, shapes.columns(found), shapes.rows(found))


def _filled(template: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("mptk.report.page"),
        autoescape=True,
        finalize=lambda value: plain(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": words.figure, "large": words.large, "ranges": words.ranges}
    environment.globals["version"] = __version__
    return environment.get_template(template).render(values)


def run_view(run: Run) -> RunView:
    """The charts and the words of one run. Raises MptkError if its report is not as ``mptk prune`` writes it."""
    try:
        return RunView(
            run=run,
            title=f"{model_name(run.report.model)} pruned by {run.report.settings.method}",
            tiles=tiles(run),
            families=family_rows(run),
            widths=charts.widths_chart(run),
            cost=charts.cost_chart(run),
            kept={name: charts.kept_chart(run, name) for name in run.kept},
            traces={phase: charts.trace_charts(run, phase) for phase in run.metrics},
            proof=charts.proof_chart(run) if run.report.proof else None,
            bench=charts.bench_chart(run, run.bench) if run.bench is not None else None,
            search=ranking(Shapes.from_json(run.report.search)) if run.report.search else None,
            stages=charts.stages_chart(run),
        )
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise unreadable(run.name, error) from error


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """The figures that a reader wants first: what, how much, and from what to what."""
    report = run.report
    dense, pruned = report.cost["dense"], report.cost["pruned"]
    held = sum(bool(stage["ok"]) for stage in report.proof)
    found = [
        ("removed", f"{report.sparsity:.1%}", "of the block parameters"),
        ("parameters", words.large(pruned["parameters"]), f"of {words.large(dense['parameters'])}"),
        ("size", f"{pruned['bytes'] / 1e6:,.0f} MB", f"of {dense['bytes'] / 1e6:,.0f} MB"),
    ]
    if run.measured:
        quality = report.quality
        found.append(
            (str(quality["metric"]), words.figure(quality["pruned"]), f"dense {words.figure(quality['dense'])}")
        )
    found.append(("proof", "holds" if held == len(report.proof) else "FAILED", f"{held} of {len(report.proof)} stages"))
    return found


def family_rows(run: Run) -> list[dict[str, str]]:
    """Each family: its width, the legal ones, and why it was not cut further."""
    return [
        {
            "name": name,
            "layers": str(family["layers"]),
            "width": f"{family['of']} → {family['width']}" if family["width"] < family["of"] else str(family["of"]),
            "legal": legal_widths(run, name),
            "why": whole(run, name),
        }
        for name, family in run.report.families.items()
    ]


def legal_widths(run: Run, family: str) -> str:
    """The widths of a family that the target can hold, in words."""
    if family not in run.report.legal:
        return "not recorded"
    widths = run.report.legal[family]["widths"]
    return words.ranges(widths) if len(widths) > 1 else "none narrower"
