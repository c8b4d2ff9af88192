"""Minutes of a run that searches: how many by default, and how many tokens of them are for the trials.

It reaches for mptk.run.minutes, as timed_runs does.
"""

from __future__ import annotations

import pytest
from timed_runs import TINY, complete, given, llama, minutes_of, rates  # noqa: F401 (two are fixtures)

from mptk.config import Settings
from mptk.features.width_search import SEARCH_MINUTES

pytestmark = pytest.mark.usefixtures("rates")
SEARCH = given(TINY, search=True, search_finalists=2)


def test_a_search_has_more_minutes_by_default(llama: str) -> None:  # noqa: F811
    assert complete(SEARCH, llama).minutes == SEARCH_MINUTES
    (minutes,) = [each for each in Settings.declared if each.name == "minutes"]
    assert f"({SEARCH_MINUTES} with --search)" in minutes.setting.help


def test_a_search_gets_a_third_of_the_tokens_of_training(llama: str) -> None:  # noqa: F811
    minutes = minutes_of(llama, SEARCH, steps=90, samples=96, search_tokens=90 * 2 * 32 // 3, distil_epochs=3)
    found = complete(given(SEARCH, minutes=minutes), llama)
    assert (found.learning.steps, found.samples, found.search_tokens) == (90, 96, 1920)
    assert complete(given(SEARCH, minutes=minutes, search_tokens=256), llama).learning.steps > 90
    least = minutes_of(llama, SEARCH, steps=5, samples=20, search_tokens=2 * 3 * 2 * 32)
    found = complete(given(SEARCH, minutes=least), llama)
    assert found.search_tokens == 384, "three steps of each finalist: two of masks, one of recovery"
