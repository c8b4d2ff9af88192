"""row: the row of a report that says how many KV heads were merged."""

from __future__ import annotations

from mptk.protocols import ConfigChanges, OpenRow, Row
from mptk.report.row_view import RowView


class HeadsRow(OpenRow):
    """KV heads of a layer before and after merging."""

    of: int
    kept: int
    config_changes: ConfigChanges


class HeadsView(RowView):
    """A line in the table of widths."""

    def list_widths(self, row: Row) -> list[tuple[str, int, int]]:
        return [("KV heads, merged", row["of"], row["kept"])]
