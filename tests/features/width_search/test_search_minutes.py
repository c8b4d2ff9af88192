"""Minutes of a run that searches: how many by default, and how many tokens of them are for the trials."""

from __future__ import annotations

from mptk.config import Learning, Settings, Training
from mptk.features.width_search import SEARCH_MINUTES
from mptk.features.width_search.stage import SearchStage

SEARCH = Settings(
    search=True, search_finalists=2, length=32, learning=Learning(rank=2, training=Training(batch=2, micro=2))
)


def test_a_search_has_more_minutes_by_default():
    assert SEARCH.default_minutes == SEARCH_MINUTES
    (minutes,) = [each for each in Settings.declared if each.name == "minutes"]
    assert f"({SEARCH_MINUTES} with --search)" in minutes.setting.help


def test_a_search_gets_a_third_of_the_tokens_of_training():
    assert SearchStage().choose_numbers(SEARCH, 90 * 2 * 32) == {"search_tokens": 1920}
    assert SearchStage().choose_numbers(SEARCH, 5 * 2 * 32) == {"search_tokens": 384}, (
        "masks for two steps, recovery one"
    )
