"""Width search: rank the ways to divide a budget among families and blocks, by loss and by a short training.

``mptk shapes MODEL --sparsity 0.5`` prints the ranking, and ``mptk prune --search`` cuts to its first. docs/shapes.md
tells more.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from mptk.config import CHOICE, CHOOSER, DIVIDER, PRUNE, READER, SEARCH, WRITER, CoreSettings, Idle, declare_setting
from mptk.errors import InputError
from mptk.protocols import Command, Feature

TRIAL_TOKENS = 131_072
"""Tokens on which a search trains, if minutes do not count: 64 steps of eight windows of 256."""
SEARCH_MINUTES = 60
"""Default minutes of a run that searches: the trials take a quarter of an hour even for a small model."""
NO_SEARCH = Idle(lambda a: not a.settings.search, "only --search ranks shapes", "give --search, or leave it out")
QUICK = Idle(
    lambda a: a.settings.search and not a.settings.trial_tokens,
    "the search trains nothing",
    "give {search_tokens}, or leave it out",
)


@dataclass(frozen=True, init=False, repr=False, eq=False)  # only the joined settings are made: start-up counts
class WidthSearchSettings(CoreSettings):
    """The settings of this feature.

    Raises:
        MptkError: a search is combined with a plan or with a larger folder.
    """

    search: bool = declare_setting(
        False,
        "First rank ways to divide the budget, as `mptk shapes` does; then cut to the best.",
        CHOICE,
        PRUNE,
        in_plan=True,
        after="distil_lr",
    )
    search_shapes: int = declare_setting(
        64,
        "Most shapes to measure without training.",
        CHOICE,
        SEARCH,
        (NO_SEARCH,),
        within=(1, 100_000),
        renamed={"shapes": "shapes"},
        after="distil_lr",
    )
    search_finalists: int = declare_setting(
        6,
        "Shapes of these to train.",
        CHOICE,
        SEARCH,
        (NO_SEARCH, QUICK),
        within=(1, 100_000),
        renamed={"shapes": "finalists"},
        after="distil_lr",
    )
    search_tokens: int | None = declare_setting(
        None,
        f"Tokens to train them on in all; 0: no training; default: {TRIAL_TOKENS:,}, or as --minutes choose.",
        CHOICE,
        SEARCH,
        (NO_SEARCH,),
        within=(0, 10**12),
        renamed={"shapes": "tokens"},
        after="distil_lr",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search and self.plan is not None:
            raise InputError(
                "--plan says which units stay, so --search has nothing to choose; leave out one of both", name="search"
            )
        if self.search and self.larger is not None:
            raise InputError(
                "a larger folder is cut further in all layers alike, by one method; leave out --search", name="search"
            )

    def with_widths(self, widths: Mapping[str, int]) -> Self:
        return replace(super().with_widths(widths), search=False)

    @property
    def trial_tokens(self) -> int:
        """Tokens on which a search trains; ``TRIAL_TOKENS`` if the number is not set yet."""
        return TRIAL_TOKENS if self.search_tokens is None else self.search_tokens

    @property
    def divider(self) -> str:
        return "--search" if self.search else super().divider

    @property
    def divisions(self) -> int | None:
        return self.search_shapes if self.search else super().divisions

    @property
    def trains(self) -> bool:
        return super().trains or bool(self.search and self.trial_tokens)

    @property
    def training_option(self) -> str:
        # A search trains on tokens of its own, without --steps.
        return "{search_tokens}" if self.search else super().training_option

    @property
    def default_minutes(self) -> float:
        return SEARCH_MINUTES if self.search else super().default_minutes

    @property
    def further_numbers(self) -> Mapping[str, int]:
        return {**super().further_numbers, **({"search_tokens": self.trial_tokens} if self.search else {})}


FEATURE = Feature(
    "width_search",
    "rank the ways to divide a budget",
    page="docs/shapes.md",
    settings=WidthSearchSettings,
    commands=[
        Command(
            "shapes",
            "mptk.features.width_search.command",
            "Prune a model",
            after="rung",
            roles=(CHOOSER, DIVIDER, READER, WRITER),
        )
    ],
    stages={"width_search": "mptk.features.width_search.stage:SEARCH_STAGE"},
    rows={"search": "mptk.features.width_search.shapes:Shapes"},
    views={"search": "mptk.features.width_search.view:RankingView"},
)
