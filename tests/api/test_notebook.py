"""What results and mistakes look like in a notebook: a line, a small table, and one line in place of a traceback."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

import mptk
from mptk.testing import expect_error


class Reader(HTMLParser):
    """The tags of a page that are not closed, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


@pytest.fixture(scope="module")
def pruned(laboratory):
    return mptk.Pruned.open(laboratory.open_pruned())


@pytest.mark.features
def test_results_are_a_line_and_a_table(laboratory, pruned):
    shown = [pruned, pruned.report, pruned.plan, mptk.analyze(str(laboratory.open_model()))]
    cut = pruned.report.narrower_widths
    assert cut
    for each in shown:
        assert len(repr(each)) <= 400
        assert "\n" not in repr(each)
        page = Reader(each._repr_html_())
        assert page.open == []
        assert "table" in page.tags
        assert all(name in page.text and name in repr(each) for name in cut)
    assert str(pruned.folder) in Reader(pruned._repr_html_()).text
    assert len(repr(pruned.plan.families)) <= 400


def test_what_a_model_is_called_is_no_html(pruned):
    named = replace(pruned.report, model="<script>alert(1)</script>", quality={})
    page = Reader(named._repr_html_())
    assert "script" not in page.tags
    assert "<script>" in page.text
    assert "nan" not in repr(named)


def test_a_mistake_is_one_line_in_ipython(capsys, tmp_path):
    with expect_error(mptk.InputError, name="sparsity") as refused:
        mptk.Settings(sparsity=2.0)
    assert refused.value._render_traceback_() == [f"InputError: {refused.value}"]
    interactive = pytest.importorskip("IPython.core.interactiveshell")
    interactive.InteractiveShell(ipython_dir=str(tmp_path)).run_cell("import mptk\nmptk.Settings(sparsity=2.0)")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert "InputError" in line
