"""render: turn views into pages with charts. The template escapes every text; only ``Svg`` is inserted unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from mptk.files.outputs import PAGE_MARK
from mptk.ir.families import Analysis
from mptk.plain import plain
from mptk.protocols.advice import Advice
from mptk.protocols.report import Row, unreadable
from mptk.protocols.shapes import Shapes
from mptk.reading import made
from mptk.report import sections
from mptk.report.advice import BY_FAMILY, CUTS, SAFE, SENSITIVE, advice_view, commands
from mptk.report.analysis import analysis_view
from mptk.report.compare import grouped, heading
from mptk.report.page import advice, charts
from mptk.report.page.coupling import coupled, coupling_chart
from mptk.report.page.svg import Svg
from mptk.report.runs import Run
from mptk.report.view import Bad, Good, Section, Table, View, figure, large, megabytes
from mptk.version import __version__
from passes.targets.legalize import LegalWidths

FRONT_LINE = "The dashed line is the Pareto front."


@dataclass(frozen=True)
class Figure:
    """A chart with its caption. The text of its section is beside it, or below it if it is ``wide``."""

    title: str
    chart: Svg
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Chapter:
    """A view on a page. ``figures``: title of a section → its charts. ``tiles``: label, value, and a note on it."""

    view: View
    figures: Mapping[str, Sequence[Figure]]
    about: str = ""
    tiles: Sequence[tuple[str, str, str]] = ()


def report_page(runs: Sequence[Run]) -> str:
    """One page about pruned folders. Of several, comparable ones come first, side by side.

    Raises:
        MptkError: a report is not as ``mptk prune`` writes it.
    """
    chapters = [chapter(run, f"{run.name}: " if len(runs) > 1 else "") for run in runs]
    return _filled(chapters if len(runs) == 1 else [side_by_side(runs), *chapters])


def side_by_side(runs: Sequence[Run]) -> Chapter:
    """Comparable runs, with their charts."""
    groups, _ = grouped(runs)
    drawn = {
        heading(number, group): [Figure("Quality over the share removed", charts.pareto_chart(group), FRONT_LINE)]
        for number, group in enumerate(groups)
    }
    about = "Runs are compared if the dense model, the metric, the protocol and the text are the same."
    return Chapter(sections.comparison_view(runs), drawn, f"{about} The details of each run follow.")


def chapter(run: Run, name: str = "") -> Chapter:
    """The text and the charts of one run. ``name``: the beginning of its title.

    Raises:
        MptkError: its report is damaged or was changed.
    """
    try:
        view, drawn = sections.prune_view(run.report, run.bench, run.texts), figures(run)
        cut, *others = view.sections
        drawings = [Section(title, []) for title in drawn if title not in {section.title for section in view.sections}]
        about = f"{run.name} · {run.report.task} · written by mptk {run.report.mptk}"
        return Chapter(View([cut, *drawings, *others], f"{name}{view.title}"), drawn, about, tiles(run))
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise unreadable(run.name, error) from error


def figures(run: Run) -> dict[str, list[Figure]]:
    """The charts of a run, by section."""
    kept = "A row is a layer, and an empty cell a unit that was removed. Of more than 192 units, each layer's share."
    drawings = {name: drawn for name in run.kept if (drawn := charts.kept_chart(run, name)) is not None}
    dots = "A dot is the difference, a hollow diamond a difference of 0. The vertical mark is the tolerance."
    ideal = "The mark is the ideal: the ratio of operations in prefill, of bytes in decode."
    found = {
        "Kept units in each layer": [Figure(name, drawn, kept) for name, drawn in drawings.items()],
        **{
            f"Training: {phase}": [Figure("", drawn) for drawn in charts.trace_charts(run, phase)]
            for phase in run.metrics
        },
    }
    if run.report.search:
        found[sections.SEARCH_TITLE] = ranking_figures(made(Shapes, run.report.search))
    if run.report.proof:
        found[sections.PROOF_TITLE] = [
            Figure("Difference from what each stage must equal", charts.proof_chart(run), dots)
        ]
    if run.bench is not None:
        found[sections.TIMES] = [Figure("Time and ideal time", charts.bench_chart(run, run.bench), ideal)]
    return {title: drawn for title, drawn in found.items() if drawn}


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """The main figures: label, value, and a note on it."""
    report = run.report
    dense, pruned = report.cost["dense"], report.cost["pruned"]
    held = sum(bool(stage["ok"]) for stage in report.proof)
    found = [
        ("removed", f"{report.sparsity:.1%}", "of the block parameters"),
        ("parameters", large(pruned["parameters"]), f"of {large(dense['parameters'])}"),
        ("size", megabytes(pruned["bytes"]), f"of {megabytes(dense['bytes'])}"),
    ]
    if run.measured:
        quality = report.quality
        found.append((quality["metric"], figure(quality["pruned"]), f"dense {figure(quality['dense'])}"))
    holds = Good("holds") if held == len(report.proof) else Bad("FAILED")
    return [*found, ("proof", holds, f"{held} of {len(report.proof)} stages")]


def analysis_page(said: Row, analysis: Analysis, legal: LegalWidths) -> str:
    """One page about a model: the families, and the matrices of one layer that are cut together.

    ``said``: the JSON of the analysis and the legal widths.
    """
    view, layer = analysis_view(said), coupled(analysis, legal)
    if not layer.edges:
        return _filled([Chapter(view, {})])
    title = f"One layer: {layer.name or 'the whole model'}"
    caption = (
        "A coloured box is a family, with its number of units in a layer. A cut removes a unit from every matrix "
        "with its colour: at the left from the first dimension, at the top from the second. The target refuses "
        "the grey families."
    )
    drawn = Section(title, [Table("lll", ["weight", "shape", "families in each dimension"], layer.rows)])
    figures = {title: [Figure("", coupling_chart(layer), caption, wide=True)]}
    return _filled([Chapter(View([drawn, *view.sections], view.title), figures)])


def shapes_page(found: Shapes) -> str:
    """One page about the shapes of a search."""
    view = sections.shapes_view(found)
    best = [Section("The best one", [found.command])] if found.command else []
    drawn = {sections.SEARCH_TITLE: ranking_figures(found)}
    return _filled([Chapter(View([*view.sections, *best], view.title), drawn)])


def advice_page(found: Advice) -> str:
    """One page about an advice."""
    view = advice_view(found)
    bars = "Bars: two standard errors. The dashed line is the tolerance; above it the axis is logarithmic."
    bars += "" if found.recovery is None else " Shaded: after training."
    same = advice.agreement_chart(found)
    drawn = {
        SAFE: [Figure("", advice.change_chart(found), bars)],
        CUTS: [] if same is None else [Figure("", same)],
        BY_FAMILY: [Figure("", advice.families_chart(found))],
        SENSITIVE: [Figure(name, advice.layers_chart(rises, name)) for name, rises in found.layers.items()],
    }
    said = commands(found)
    best = [Section("The command", said)] if said else []
    first, *others = view.sections
    return _filled([Chapter(View([first, *best, *others], view.title), drawn)])


def ranking_figures(found: Shapes) -> list[Figure]:
    """The charts of a search."""
    caption = f"Rings: before training. Dots: after. Numbers as in the table. {FRONT_LINE}"
    front, training = advice.front_chart(found), advice.training_chart(found)
    more = "After each rung the better half of the shapes is trained for twice as long."
    trained = [] if training is None else [Figure("Training", training, more)]
    return [Figure("Cost and quality of each shape", front, caption), *trained]


def _filled(chapters: Sequence[Chapter]) -> str:
    environment = Environment(
        loader=PackageLoader("mptk.report.page"),
        autoescape=True,
        finalize=lambda value: plain(value) if isinstance(value, str) and not hasattr(value, "__html__") else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["mark"] = lambda cell: (
        "ok" if isinstance(cell, Good) else "bad" if isinstance(cell, Bad) else ""
    )
    return environment.get_template("page.html").render(chapters=chapters, version=__version__, generator=PAGE_MARK)
