"""svg: charts as inline SVG. Their colours come from the style sheet, so they follow light and dark mode.

matplotlib draws. Its SVG is rewritten: colours become CSS variables, text stays text, and ids get a prefix for each
chart: an id must be unique in a page, and matplotlib gives each chart the same ones.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mptk.plain import escape_text, hash_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.0
"""Width in inches: 360 units, so that a phone shows the text in full size."""

# In matplotlib these are colours of a light page. In the SVG they are only keys of ``CSS``.
INK, QUIET, LINE, PAPER = "#1f2328", "#59636e", "#d8dee4", "#ffffff"
SERIES = ("#2a78d6", "#d9601a", "#1f9254", "#8455d1", "#c23f83", "#1a8a94")
BAD = "#cf222e"
CSS = {
    INK: "currentColor",
    QUIET: "var(--quiet)",
    LINE: "var(--line)",
    PAPER: "var(--paper)",
    BAD: "var(--bad)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)},
}
"""Colours of a light page → variables of the style sheet, so that a dark page has its own."""

STYLE: dict[object, object] = {
    "axes.edgecolor": QUIET,
    "axes.facecolor": "none",
    "axes.labelcolor": QUIET,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.size": 9.5,
    "grid.color": LINE,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",  # text as text, not as outlines: it can be searched, and takes less space
    "svg.hashsalt": "mptk",  # the same chart has the same ids, so a page of the same run has the same bytes
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is not a formula
    "text.usetex": False,
    "xtick.color": QUIET,
    "xtick.labelsize": 9,
    "ytick.color": QUIET,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 9.5,
}
# matplotlib writes xlink:href. HTML knows only href.
XLINK = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Svg:
    """An SVG element. Templates take it as it is, since its text was escaped when it was made."""

    text: str

    def __html__(self) -> str:
        return self.text


def save(draw: Callable[[Axes], None], height: float, width: float, write: Callable[[Figure], None]) -> None:
    """Call ``write`` with a figure: ``draw`` fills its axes of ``width`` × ``height`` inches."""
    import matplotlib
    from matplotlib.figure import Figure

    # From the defaults, so that a user's matplotlibrc changes no page. A Figure without pyplot needs no display, and
    # leaves the caller's figures alone.
    settings: dict[Any, Any] = {**matplotlib.rcParamsDefault, **STYLE}
    settings.pop("backend", None)  # to name one would load it
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        write(figure)


def draw_chart(draw: Callable[[Axes], None], label: str, height: float, width: float = WIDTH) -> Svg:
    """An SVG element with a chart; ``draw`` fills its axes. Screen readers read ``label``."""
    # Without the date, so that equal charts are equal files.
    file = io.StringIO()
    save(draw, height, width, lambda f: f.savefig(file, format="svg", transparent=True, metadata={"Date": None}))
    return inline_svg(escape_text(file.getvalue()), label)  # XML has no place for control characters


def inline_svg(drawn: str, label: str) -> Svg:
    """matplotlib's SVG as an element of a page. ``label`` is its name for screen readers."""
    root = ET.fromstring(drawn)
    # Metadata names the tool; matplotlib's style element would hold for the whole page.
    for parent in root.iter():
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    # The prefix comes from the content, so it is the same for the same chart. Ids that nothing uses go.
    own = hash_text(f"{label}\0{drawn}", 8)
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", drawn))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        if XLINK in element.attrib:
            element.set("href", element.attrib.pop(XLINK))
        for name, value in list(element.attrib.items()):
            if name == "id" and value not in used:
                del element.attrib[name]
            else:
                element.set(name, _adapt_value(name, value, own))
    for name in ("width", "height", "version"):  # the style sheet gives the width; viewBox keeps the ratio
        root.attrib.pop(name, None)
    root.attrib |= {"class": "chart", "role": "img", "aria-label": escape_text(label)}
    return Svg(ET.tostring(root, encoding="unicode"))


def _adapt_value(name: str, value: str, own: str) -> str:
    """An attribute's value with the page's colours, and with the prefix ``own`` in names."""
    if name == "id":
        return f"{own}-{value}"
    if name == "href":
        return value.replace("#", f"#{own}-", 1) if value.startswith("#") else value
    value = value.replace("url(#", f"url(#{own}-")
    if name in ("style", "fill", "stroke"):
        value = re.sub(r"#[0-9a-f]{6}\b", lambda found: CSS.get(found[0], found[0]), value)
    return value
