"""row: the row of a report that says how many tokens were removed."""

from __future__ import annotations

from mptk.protocols import ConfigChanges, OpenRow, Row
from mptk.report.row_view import RowView


class VocabularyRow(OpenRow):
    """Tokens of the dense and of the pruned model, the text that decided, and token ids that changed."""

    of: int
    kept: int
    corpus: str
    config_changes: ConfigChanges


class VocabularyView(RowView):
    """A line in the table of widths."""

    def list_widths(self, row: Row) -> list[tuple[str, int, int]]:
        return [("vocabulary", row["of"], row["kept"])]
