"""Values read from files: nothing is converted, what is wrong is named with its place, and no message is long."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mptk.errors import FileError
from mptk.reading import LONGEST, make_typed, read_bytes


@dataclass(frozen=True)
class Inner:
    share: float
    count: int = 1


@dataclass(frozen=True)
class Outer:
    inner: Inner
    names: tuple[str, ...] = ()
    by_step: Mapping[int, float | None] = field(default_factory=dict)


def test_a_file_gives_the_value_that_was_written():
    said = {"inner": {"share": 1, "later": 3}, "names": ["a"], "by_step": {"5": None, "7": 0.1}}
    assert make_typed(Outer, said) == Outer(Inner(1.0), ("a",), {5: None, 7: 0.1})


@pytest.mark.parametrize(
    ("said", "place"),
    [
        ({}, "inner is missing"),
        ([], "it is a list and should be an object"),
        ({"inner": {"share": "3"}}, 'inner.share is "3" and should be'),
        ({"inner": {"share": True}}, "inner.share is true and should be"),
        ({"inner": {"share": math.nan}}, "inner.share is NaN and should be"),
        ({"inner": {"share": 10**400}}, "inner.share is 1000"),
        ({"inner": {"share": 1, "count": True}}, "inner.count is true and should be"),
        ({"inner": {"share": 1, "count": 2.0}}, "inner.count is 2.0 and should be"),
        ({"inner": {"share": 1}, "names": "abc"}, 'names is "abc" and should be'),
        ({"inner": {"share": 1}, "names": [None]}, "names.0 is null and should be"),
        ({"inner": {"share": 1}, "by_step": {"x": 1}}, "by_step.x"),
        ({"inner": {"share": "no " * 999}}, "inner.share is "),
        ({"inner": {"share": 1}, "by_step": {"x" * 999: 1}}, "by_step.xxx"),
    ],
)
def test_what_does_not_fit_is_named(said, place):
    with pytest.raises(ValueError, match=r"^.+$") as raised:
        make_typed(Outer, said)
    assert str(raised.value).startswith(place)
    assert len(str(raised.value)) < 4 * LONGEST


def test_a_small_file_takes_little_memory_however_large_it_may_be(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 1000)
    tracemalloc.start()
    assert len(read_bytes(tmp_path / "a", FileError, 1 << 31)) == 1000
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    # The size of a file in /proc is said to be none.
    assert b"Name:" in read_bytes(Path("/proc/self/status"), FileError)
