"""Every row of ``tests/bad_inputs``: one line with cause and remedy, the exit code, nothing changed, no traceback."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from test_cli import surroundings  # noqa: F401 (a fixture)

from tests.bad_inputs import ROWS
from tests.bad_inputs.table import Place, Row, listing, run

REMEDY = re.compile(r"[;:,.] ?\S|give|do not use|check|write|choose|see|add|remove", re.I)


def test_the_table_is_large_and_each_row_has_a_name_of_its_own() -> None:
    assert len(ROWS) >= 250
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.features
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input(row: Row, tiny_folders: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, tiny_folders)
    arguments = row.arguments(place)
    for step in row.prepare:
        step(place)
    monkeypatch.chdir(tmp_path)
    before, sources = listing(tmp_path), [listing(folder) for folder in tiny_folders.values() if folder.is_dir()]
    result = run(arguments)
    after = listing(tmp_path)
    assert "Traceback" not in result.stderr
    if row.done:
        assert (result.code, result.errors[:-1]) == (0, [])
    else:
        assert result.code == row.code, result.stderr
        assert len(result.errors) == 1, result.stderr
        (line,) = result.errors
        assert line.startswith("error: ")
        assert REMEDY.search(line.removeprefix("error: ")), line
        assert after == before
    said = result.stdout + result.stderr
    assert [words for words in row.says if words not in said] == [], said
    assert said.isprintable() or not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said), "control characters are shown"
    assert sources == [listing(folder) for folder in tiny_folders.values() if folder.is_dir()]
