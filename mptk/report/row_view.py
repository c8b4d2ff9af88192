"""row_view: the protocol of what a feature shows of its row of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mptk.protocols import Row
from mptk.report.view import Section

if TYPE_CHECKING:
    from mptk.report.page.render import Figure


class RowView:
    """What reports, cards and pages show of a feature's row."""

    def list_widths(self, row: Row) -> Sequence[tuple[str, int, int]]:
        """Lines for the table of widths: what it is, the units before, and those after the run."""
        return []

    def build_sections(self, row: Row) -> Sequence[Section]:
        """Sections below the quality."""
        return []

    def draw_figures(self, row: Row) -> Mapping[str, Sequence[Figure]]:
        """The charts of a page: title of a section → its charts."""
        return {}
