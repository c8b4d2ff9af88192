"""render: turn views with charts into pages. The template escapes every text; only ``Svg`` is inserted unchanged.

A page is one file that loads nothing: styles and charts are in it, and its content policy forbids everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from mptk.files.outputs import PAGE_MARK
from mptk.plain import escape_text
from mptk.protocols import Advice, Shapes
from mptk.report import sections
from mptk.report.advice import BY_FAMILY, CUTS, SAFE, SENSITIVE, build_advice_view, list_commands
from mptk.report.page import charts
from mptk.report.page.svg import Svg
from mptk.report.view import Bad, Good, Section, View
from mptk.version import __version__

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
    """A view on a page. A section of the view and its charts find each other by the section's title.

    ``figures``: title of a section → its charts. ``tiles``: label, value, and a note on it.
    """

    view: View
    figures: Mapping[str, Sequence[Figure]]
    about: str = ""
    tiles: Sequence[tuple[str, str, str]] = ()


def render_shapes_page(found: Shapes) -> str:
    """One page about the shapes of a search."""
    view = sections.build_shapes_view(found)
    best = [Section("The best one", [found.command])] if found.command else []
    drawn = {sections.SEARCH_TITLE: draw_ranking_figures(found)}
    return fill_template([Chapter(View([*view.sections, *best], view.title), drawn)])


def render_advice_page(found: Advice) -> str:
    """One page about an advice."""
    # Some charts need what not every advice has: logits for the agreement, more layers than one.
    view = build_advice_view(found)
    bars = "Bars: two standard errors. The dashed line is the tolerance; above it the axis is logarithmic."
    bars += "" if found.recovery is None else " Shaded: after training."
    same = charts.draw_agreement_chart(found)
    drawn = {
        SAFE: [Figure("", charts.draw_change_chart(found), bars)],
        CUTS: [] if same is None else [Figure("", same)],
        BY_FAMILY: [Figure("", charts.draw_families_chart(found))],
        SENSITIVE: [Figure(name, charts.draw_layers_chart(rises, name)) for name, rises in found.layers.items()],
    }
    said = list_commands(found)
    best = [Section("The command", said)] if said else []
    first, *others = view.sections
    return fill_template([Chapter(View([first, *best, *others], view.title), drawn)])


def draw_ranking_figures(found: Shapes) -> list[Figure]:
    """The charts of a search."""
    caption = f"Rings: before training. Dots: after. Numbers as in the table. {FRONT_LINE}"
    front, training = charts.draw_front_chart(found), charts.draw_training_chart(found)
    more = "After each rung the better half of the shapes is trained for twice as long."
    trained = [] if training is None else [Figure("Training", training, more)]
    return [Figure("Cost and quality of each shape", front, caption), *trained]


def fill_template(chapters: Sequence[Chapter]) -> str:
    """A page of chapters."""
    # ``finalize`` sees every value before it is escaped: HTML escapes markup, ``escape_text`` what acts on its reader.
    # What has ``__html__`` was made here and is left alone.
    environment = Environment(
        loader=PackageLoader("mptk.report.page"),
        autoescape=True,
        finalize=lambda value: (
            escape_text(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
        ),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["mark"] = lambda cell: (
        "ok" if isinstance(cell, Good) else "bad" if isinstance(cell, Bad) else ""
    )
    return environment.get_template("page.html").render(chapters=chapters, version=__version__, generator=PAGE_MARK)
