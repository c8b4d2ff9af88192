"""What ``make mutants`` lets live."""

from __future__ import annotations

from pathlib import Path

from tests.mutants import SUBJECTS
from tests.mutants_allowed import ALLOWED

ROOT = Path(__file__).parents[2]


def test_each_allowed_mutant_is_of_code_that_is_there():
    there = {line for file in SUBJECTS for line in (ROOT / file).read_text().splitlines()}
    changed = [line[1:] for change in ALLOWED for line in change.splitlines() if line.startswith("-")]
    assert [line for line in changed if line not in there] == []
