"""render: the page about pruned folders, and the one about a model. ``mptk/report/page`` makes pages of chapters."""

from __future__ import annotations

from collections.abc import Sequence

from mptk.features.page import charts
from mptk.features.page.coupling import choose_layer, draw_coupling_chart
from mptk.ir import Analysis
from mptk.protocols import Row, make_report_error
from mptk.report import sections
from mptk.report.analysis import build_analysis_view
from mptk.report.page.render import FRONT_LINE, Chapter, Figure, fill_template
from mptk.report.runs import Run, group_runs, name_group
from mptk.report.summary import build_summary_section
from mptk.report.view import Bad, Good, Section, Table, View, format_figure, format_large, format_megabytes
from passes.targets.legalize import LegalWidths


def render_report_page(runs: Sequence[Run]) -> str:
    """One page about pruned folders. Of several, comparable ones come first, side by side.

    Raises:
        MptkError: a report is not as ``mptk prune`` writes it.
    """
    chapters = [build_run_chapter(run, f"{run.name}: " if len(runs) > 1 else "") for run in runs]
    return fill_template(chapters if len(runs) == 1 else [build_comparison_chapter(runs), *chapters])


def build_comparison_chapter(runs: Sequence[Run]) -> Chapter:
    """Comparable runs, with their charts."""
    groups, _ = group_runs(runs)
    drawn = {
        name_group(number, group): [
            Figure("Quality over the share removed", charts.draw_pareto_chart(group), FRONT_LINE)
        ]
        for number, group in enumerate(groups)
    }
    about = "Runs are compared if the dense model, the metric, the protocol and the text are the same."
    return Chapter(sections.build_comparison_view(runs), drawn, f"{about} The details of each run follow.")


def build_run_chapter(run: Run, name: str = "") -> Chapter:
    """The text and the charts of one run. ``name``: the beginning of its title."""
    try:
        view, drawn = sections.build_prune_view(run.report, run.bench, run.texts), draw_figures(run)
        # Charts without a text of their own (kept units, training) get an empty section, after what was cut.
        cut, *others = view.sections
        drawings = [Section(title, []) for title in drawn if title not in {section.title for section in view.sections}]
        about = f"{run.name} · {run.report.task} · written by mptk {run.report.mptk}"
        short = build_summary_section(run.report, run.place)
        return Chapter(View([short, cut, *drawings, *others], f"{name}{view.title}"), drawn, about, list_tiles(run))
    # The types of a report's fields were checked when it was read, but rows are plain JSON to the code that draws them.
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise make_report_error(run.name, error) from error


def draw_figures(run: Run) -> dict[str, Sequence[Figure]]:
    """The charts of a run, by section."""
    kept = "A row is a layer, and an empty cell a unit that was removed. Of more than 192 units, each layer's share."
    drawings = {name: drawn for name in run.kept if (drawn := charts.draw_kept_chart(run, name)) is not None}
    dots = "A dot is the difference, a hollow diamond a difference of 0. The vertical mark is the tolerance."
    ideal = "The mark is the ideal: the ratio of operations in prefill, of bytes in decode."
    found: dict[str, Sequence[Figure]] = {
        "Kept units in each layer": [Figure(name, drawn, kept) for name, drawn in drawings.items()],
        **{
            f"Training: {phase}": [Figure("", drawn) for drawn in charts.draw_trace_charts(run, phase)]
            for phase in run.metrics
        },
    }
    for row, view in sections.list_row_views(run.report):
        found |= view.draw_figures(row)
    if run.report.proof:
        found[sections.PROOF_TITLE] = [
            Figure("Difference from what each stage must equal", charts.draw_proof_chart(run), dots)
        ]
    if run.bench is not None:
        found[sections.TIMES] = [Figure("Time and ideal time", charts.draw_bench_chart(run, run.bench), ideal)]
    return {title: drawn for title, drawn in found.items() if drawn}


def list_tiles(run: Run) -> list[tuple[str, str, str]]:
    """The main figures: label, value, and a note on it."""
    report = run.report
    dense, pruned = report.cost["dense"], report.cost["pruned"]
    held = sum(bool(stage["ok"]) for stage in report.proof)
    found = [
        ("removed", f"{report.sparsity:.1%}", "of the block parameters"),
        ("parameters", format_large(pruned["parameters"]), f"of {format_large(dense['parameters'])}"),
        ("size", format_megabytes(pruned["bytes"]), f"of {format_megabytes(dense['bytes'])}"),
    ]
    if run.measured:
        quality = report.quality
        found.append((quality["metric"], format_figure(quality["pruned"]), f"dense {format_figure(quality['dense'])}"))
    holds = Good("holds") if held == len(report.proof) else Bad("FAILED")
    return [*found, ("proof", holds, f"{held} of {len(report.proof)} stages")]


def render_analysis_page(said: Row, analysis: Analysis, legal: LegalWidths) -> str:
    """One page about a model: the families, and the matrices of one layer that are cut together.

    ``said``: the JSON of the analysis and the legal widths.
    """
    view, layer = build_analysis_view(said), choose_layer(analysis, legal)
    if not layer.edges:  # nothing can be cut, so there is nothing to draw
        return fill_template([Chapter(view, {})])
    title = f"One layer: {layer.name or 'the whole model'}"
    caption = (
        "A coloured box is a family, with its number of units in a layer. A cut removes a unit from every matrix "
        "with its colour: at the left from the first dimension, at the top from the second. The target refuses "
        "the grey families."
    )
    drawn = Section(title, [Table("lll", ["weight", "shape", "families in each dimension"], layer.rows)])
    figures = {title: [Figure("", draw_coupling_chart(layer), caption, wide=True)]}
    return fill_template([Chapter(View([drawn, *view.sections], view.title), figures)])
