"""conf: the site that `make docs` builds, by sphinx with the pages' own Markdown, so that GitHub shows them too."""

from __future__ import annotations

from importlib.metadata import version as installed
from pathlib import Path

from sphinx.application import Sphinx

CONTENTS = {
    "Start": "docs/tutorial docs/command-line docs/python docs/troubleshooting",
    "How to": "docs/how-to/README docs/how-to/own-class docs/how-to/encoder docs/how-to/vit docs/how-to/kv-heads "
    "docs/how-to/vision-language docs/how-to/dual-encoder docs/how-to/diffusion docs/how-to/how-far docs/how-to/budget "
    "docs/how-to/ladder docs/how-to/pass docs/data docs/kinds docs/latency docs/shapes docs/vocabulary "
    "docs/recovery docs/scale docs/onnx docs/deploy docs/plugins docs/adding-an-op docs/tracing",
    "Look up": "docs/glossary docs/settings docs/api docs/plan docs/report docs/architectures docs/python-versions",
    "Understand": "docs/architecture docs/analysis docs/criteria docs/maskprune",
    "Benchmarks": "benchmarks/README benchmarks/maskprune benchmarks/recovery benchmarks/criteria benchmarks/shapes "
    "benchmarks/depth benchmarks/kv-heads benchmarks/vocabulary benchmarks/latency benchmarks/cut-or-round "
    "benchmarks/onnx benchmarks/programs benchmarks/scale benchmarks/advice benchmarks/ladder benchmarks/results",
    "Take part": "CONTRIBUTING SECURITY examples/plugin/README examples/feature/README CHANGELOG",
}
"""Parts of the site's list of contents → pages. A page that is missing here is a warning, and so an error."""

project = "mptk"
version = release = installed("mptk")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "benchmarks/*.md", "examples/**.md"]
html_theme = "furo"
html_title = "mptk"
html_additional_pages = {"index": "to_readme.html"}
templates_path = ["templates"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
add_module_names = False
python_maximum_signature_line_length = 100


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """Give the first page the list of contents, which GitHub would show as a block of text."""
    if page == root_doc:
        for part, pages in CONTENTS.items():
            there = [name for name in pages.split() if Path(app.srcdir, f"{name}.md").exists()]
            source[0] += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {part}", "", *there, "```", ""])


def setup(app: Sphinx) -> None:
    """Called by sphinx."""
    app.connect("source-read", add_contents)
