"""Every row of ``tests/bad_inputs``: an error of one line, of its class, about what is wrong; nothing is changed.

Rows call the parser of options or the reader of a file. Some go through the whole command.
"""

from __future__ import annotations

import re

import pytest

from mptk.errors import MptkError
from tests.bad_inputs import COMMANDS, ROWS
from tests.bad_inputs.table import Place, find_subject, listing, lose_patience, run

REMEDY = re.compile(r"[;:,.] ?\S|give|do not use|check|write|choose|see|add|remove", re.I)


@pytest.fixture(scope="module")
def sources(tiny_folders):
    """The folders that rows copy."""
    folders = [folder for folder in tiny_folders.values() if folder.is_dir()]
    before = list(map(listing, folders))
    yield tiny_folders
    assert list(map(listing, folders)) == before


@pytest.mark.features
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input(row, sources, tmp_path, go_to):
    place = Place(tmp_path, sources)
    for step in row.prepare:
        step(place)
    call, about = row.make_call(place), row.fill(row.about, place)
    go_to(tmp_path)
    before = listing(tmp_path)
    with lose_patience(), pytest.raises(row.kind) as refused:
        call()
    assert find_subject(refused.value) == about
    if isinstance(refused.value, MptkError):
        assert type(refused.value) is row.kind
        assert "\n" not in str(refused.value)
        assert REMEDY.search(str(refused.value))
    assert listing(tmp_path) == before


@pytest.mark.features
@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: row.name)
def test_bad_input_of_a_command(row, sources, tmp_path, go_to):
    """One line on stderr, the exit code, no traceback, nothing changed."""
    place = Place(tmp_path, sources)
    for step in row.prepare:
        step(place)
    words = [row.fill(word, place) for word in str(row.does).split(" ")]
    go_to(tmp_path)
    before = listing(tmp_path)
    result = run(words)
    assert result.code == (1 if issubclass(row.kind, MptkError) else 2), result.stderr
    assert len(result.errors) == 1, result.stderr
    (line,) = result.errors
    assert line.startswith("error: ")
    assert REMEDY.search(line.removeprefix("error: ")), line
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", result.stdout + result.stderr)
    assert listing(tmp_path) == before
