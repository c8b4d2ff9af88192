"""Which tests are quick: ``durations.json`` has the processor time of those that are not. ``make durations`` writes it.

A test's time is its call, its set-up, and its share of the module's fixtures: the tests that need a fixture share its
time equally. What the laboratory makes counts for no test, because it is made once for all of them. Times are processor
time, because a busy machine changes the clock's time.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).with_name("durations.json")
QUICK_S = 0.2
"""Below it a test is quick. Three quarters of the tests are."""


SUITES = ("all", "quick", "rest", "network")
"""``quick`` is what ``make test`` runs, ``rest`` what ``make test-all`` runs beside it; ``all`` is both."""


def is_in_suite(item: pytest.Item, suite: str) -> bool:
    """Whether a suite runs a test. A test that needs a network is only in the suite ``network``."""
    if suite == "network" or item.get_closest_marker("network"):
        return suite == "network" and item.get_closest_marker("network") is not None
    quick = item.get_closest_marker("slow") is None or item.get_closest_marker("always") is not None
    return suite == "all" or quick == (suite == "quick")


def read_durations() -> dict[str, float]:
    """Test → seconds of processor time, of each that is not quick."""
    found: dict[str, float] = json.loads(FILE.read_text()) if FILE.exists() else {}
    return found


def sum_by_file(durations: Mapping[str, float]) -> Mapping[str, float]:
    """File → seconds of its tests that are not quick."""
    sums: dict[str, float] = defaultdict(float)
    for name, seconds in durations.items():
        sums[name.partition("::")[0]] += seconds
    return sums


def _measure() -> float:
    """Processor seconds of this process and its ended children, without the time of the laboratory."""
    from mptk.testing import Laboratory

    return sum(os.times()[:4]) - Laboratory.seconds


class Recorder:
    """A plugin of pytest. In a worker it measures; the process that prints the results gathers and writes them."""

    def __init__(self) -> None:
        self.fixtures: dict[Any, float] = {}
        """Fixture that is wider than a test → seconds of its set-up, without other fixtures in it."""
        self.users: dict[Any, list[str]] = defaultdict(list)
        """Fixture of a module → the tests that need it, which bear its set-up in equal parts."""
        self.found: dict[str, float] = {}
        self.inside: list[float] = []
        self.own = 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        start = _measure()
        self.inside.append(0.0)
        try:
            return (yield)
        finally:
            taken = _measure() - start
            nested = self.inside.pop()
            if self.inside:
                self.inside[-1] += taken
            if fixturedef.scope != "function":
                self.fixtures[fixturedef] = taken - nested
                self.own -= taken - nested

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        start, self.own = _measure(), 0.0
        result = yield
        self.found[item.nodeid] = self.own + _measure() - start
        for definition in {each for some in item._fixtureinfo.name2fixturedefs.values() for each in some}:
            if definition.scope in ("module", "class", "package"):
                self.users[definition].append(item.nodeid)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, nextitem: Any) -> Iterator[None]:
        start = _measure()
        try:
            return (yield)
        finally:
            if nextitem is None:  # it ends what all tests share, too: the process of fresh.py, with all that it took
                self.own -= _measure() - start

    def pytest_sessionfinish(self, session: Any) -> None:
        for definition, users in self.users.items():
            for name in users:
                self.found[name] += self.fixtures.get(definition, 0.0) / len(users)
        if (output := getattr(session.config, "workeroutput", None)) is not None:
            output["durations"] = self.found
        else:
            self.write(session)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.found |= node.workeroutput["durations"]

    def write(self, session: Any) -> None:
        """Renew the entries of the files that ran, and drop those of files that are gone."""
        ran = {name.partition("::")[0] for name in self.found}
        root = session.config.rootpath
        others = {
            name: seconds
            for name, seconds in read_durations().items()
            if (file := name.partition("::")[0]) not in ran and (root / file).exists()
        }
        slow = {name: round(seconds, 1) for name, seconds in self.found.items() if seconds >= QUICK_S}
        FILE.write_text(json.dumps(dict(sorted((others | slow).items())), indent=0) + "\n")
