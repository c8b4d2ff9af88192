"""view: the ranking of a search in words and tables, on the terminal, on the model card and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mptk.features.width_search.shapes import Shapes
from mptk.protocols import Row
from mptk.reading import make_typed
from mptk.report.row_view import RowView
from mptk.report.runs import shorten_model_name
from mptk.report.view import Name, Section, Table, View, format_count, format_figure, format_large

if TYPE_CHECKING:
    from mptk.report.page.render import Figure

SEARCH_TITLE = "The search of the shape"
FRONT = "★ Pareto-optimal at its stage: no shape that reached it is both cheaper and better"


class RankingView(RowView):
    """A section of its own, with charts."""

    def build_sections(self, row: Row) -> Sequence[Section]:
        return [Section(SEARCH_TITLE, describe_ranking(make_typed(Shapes, row)))]

    def draw_figures(self, row: Row) -> dict[str, Sequence[Figure]]:
        from mptk.features.width_search.page import draw_ranking_figures  # only pages need what it imports

        return {SEARCH_TITLE: draw_ranking_figures(make_typed(Shapes, row))}


def build_shapes_view(found: Shapes) -> View:
    """``mptk shapes``: a search."""
    title = f"{format_count(len(found.shapes), 'shape')} of {shorten_model_name(found.model)}, by {found.metric}"
    return View([Section(SEARCH_TITLE, describe_ranking(found))], title)


def describe_ranking(found: Shapes) -> list[Table | str]:
    """Each shape with its costs and its losses: the dense model, then the best first."""
    # Columns appear only if any shape has their values: fitting, a latency, and each rung of training.
    front, fits, timed = found.front, found.best.reconstructed is not None, found.dense.latency_ms is not None
    tokens = sorted({rung.tokens for shape in found.shapes for rung in shape.rungs})
    rows = []
    for number, shape in enumerate((found.dense, *found.shapes)):
        after = {rung.tokens: rung.loss for rung in shape.rungs}
        losses = [shape.masked, *([shape.reconstructed] if fits else []), *map(after.get, tokens)]
        rows.append(
            [
                "dense" if not number else f"{number} ★" if shape in front else f"{number}",
                *(str(shape.widths[family]) for family in found.best.widths),
                f"{shape.sparsity:.1%}",
                format_large(shape.parameters),
                *([] if shape.latency_ms is None else [f"{shape.latency_ms:.2f}"]),
                *("" if loss is None else format_figure(found.to_figure(loss)) for loss in losses),
            ]
        )
    columns = ["shape", *map(Name, found.best.widths), "removed", "parameters", *["ms"] * timed, "masked"]
    columns += [*["reconstructed"] * fits, *(f"{count:,} tokens" for count in tokens)]
    table = Table("r" * len(columns), columns, rows, ends=[0])
    return [table, FRONT, Name(f"{found.metric}: {found.protocol}")]
