"""Page: one HTML page, without network or scripts, that draws pruned folders or the coupling of a model's layer.

``mptk report DIR … --html FILE`` shows folders, several side by side. ``mptk analyze MODEL --html FILE`` draws which
matrices of a layer are cut together. docs/report.md tells more.

``render``: the pages. ``charts``: of pruned folders. ``coupling``: of a layer.
"""

from mptk.protocols import Feature

FEATURE = Feature(
    "page",
    "draw reports and analyses as HTML pages",
    page="docs/report.md",
    options=["mptk.features.page.command"],
)
