"""render: turn views with charts into pages. The template escapes every text; only ``Svg`` is inserted unchanged.

A page is one file that loads nothing: styles and charts are in it, and its content policy forbids everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from mptk.files.outputs import PAGE_MARK
from mptk.plain import escape_text
from mptk.report.page.svg import Svg
from mptk.report.view import Bad, Command, Good, View
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
    environment.tests["command"] = lambda part: isinstance(part, Command)
    return environment.get_template("page.html").render(chapters=chapters, version=__version__, generator=PAGE_MARK)
