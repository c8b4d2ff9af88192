"""stage: the search within a run of ``mptk prune``: its checks, its numbers, what it costs, and the widths it finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from mptk.config import Settings
from mptk.cost.estimate import ModelSizes, Pass
from mptk.distributed.processes import connect_processes
from mptk.errors import InputError
from mptk.features.width_search import WidthSearchSettings
from mptk.features.width_search.search import JUDGED, count_least_tokens, plan_search_rungs, search_shapes
from mptk.methods import find_method
from mptk.methods.division.budget import find_widths
from mptk.methods.maskprune.learner import estimate_training_memory
from mptk.protocols import Context, Prepared, Rows, SampleSets, Stage

TRIALS = 3
"""With minutes the trials of a search get a third of the tokens of training."""


class SearchStage(Stage):
    """Ranks the divisions of the budget, and leaves the widths of the best."""

    shorter = MappingProxyType({"train shapes": "fewer --search-finalists", "shapes": "fewer --search-shapes"})

    def check(self, settings: Settings) -> None:
        s = WidthSearchSettings.of(settings)
        if not s.search:
            return
        # For its errors only. The number of shapes is not known yet; there are at most this many finalists.
        plan_search_rungs(settings, s.search_finalists)
        if connect_processes().num_processes > 1:
            raise InputError(
                "a search runs in one process; run `mptk shapes` in one, and give prune the --width that it prints"
            )

    def choose_numbers(self, settings: Settings, tokens: int) -> Mapping[str, int]:
        return {"search_tokens": max(tokens // TRIALS, count_least_tokens(settings))}

    def describe_numbers(self, settings: Settings) -> Sequence[str]:
        s = WidthSearchSettings.of(settings)
        return [f"{s.trial_tokens:,} tokens for the search"] if s.search else []

    def count_training_samples(self, settings: Settings) -> int:
        s = WidthSearchSettings.of(settings)
        planned = plan_search_rungs(settings, s.search_finalists) if s.search else []
        return sum(steps for _, steps in planned) * settings.learning.training.batch  # those of the longest training

    def count_held_out(self, settings: Settings, samples: int) -> int:
        return min(JUDGED, max(1, samples // 4)) if WidthSearchSettings.of(settings).search else 0

    def estimate(self, settings: Settings, sizes: ModelSizes, kept: float) -> Mapping[str, Pass]:
        s = WidthSearchSettings.of(settings)
        if not s.search:
            return {}
        measured = s.search_shapes * 2 * kept * self.count_held_out(settings, s.windows) * s.length
        fits = s.search_shapes * sizes.fit * bool(s.reconstruct)
        learns = find_method(s.method).learns and s.trial_tokens > 0
        fits += s.search_finalists * sizes.fit * learns
        trains = estimate_training_memory(settings, sizes, kept) if s.trial_tokens else 0
        return {
            "shapes": Pass(s.windows * s.length + measured, s.length, flops=fits),
            "train shapes": Pass(4 * s.trial_tokens, s.length, reads=0, training=trains),
        }

    def divide(self, prepared: Prepared, sets: SampleSets, context: Context) -> tuple[Prepared, Rows]:
        if not WidthSearchSettings.of(prepared.settings).search:
            return prepared, {}
        found = search_shapes(prepared, sets, context)
        # Only the widths of the best shape are left, as if --width had fixed them.
        fixed = replace(prepared, settings=prepared.settings.with_widths(found.best.widths))
        return replace(fixed, candidates=tuple(find_widths(fixed))), {"search": found.to_json()}


SEARCH_STAGE = SearchStage()
