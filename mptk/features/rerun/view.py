"""view: what ``mptk rerun`` shows."""

from __future__ import annotations

from collections.abc import Sequence

from mptk.protocols import Row
from mptk.report.view import Bad, Good, Section, Table, View


def build_rerun_view(rows: Sequence[Row]) -> View:
    """The compared values, before and now, and a sentence."""
    cells = [
        [row["what"], str(row["before"]), str(row["now"]), Good("same") if row["same"] else Bad("DIFFERS")]
        for row in rows
    ]
    differ = [row["what"] for row in rows if not row["same"]]
    said = f"differs in {', '.join(differ)}" if differ else "the run gave the same result"
    return View([Section("", [Table("llll", ["", "before", "now", "result"], cells), said])])
