"""Which row of which result is of which commit: ``python -m benchmarks.provenance`` writes ``results.md``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE / "results.md"
HEAD = """# Which result is of which commit

`python -m benchmarks.provenance` writes this page, and a test holds it to the files. A number behind a commit: rows of it.
"-dirty": the code was changed since the commit.

| result | rows | date of the last | commits |
|---|---|---|---|
"""


def read_results() -> dict[str, dict[str, Any]]:
    """Name of a file → its content."""
    return {path.name: json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))}


def count_commits(result: dict[str, Any]) -> Counter[str]:
    """Commit → rows of it. A row without one is of the commit of its file."""
    return Counter(row.get("commit", result["commit"]) for row in result["rows"])


def write_page() -> str:
    lines = []
    for name, result in read_results().items():
        commits = ", ".join(f"{commit} ({count})" for commit, count in count_commits(result).most_common())
        date = result["date"].partition(" ")[0]
        lines.append(f"| [{name}](results/{name}) | {len(result['rows'])} | {date} | {commits or result['commit']} |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(write_page())
