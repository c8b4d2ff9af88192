"""narrow: a model with the rows of some tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mptk.conversions.vocabulary.ids import renumbered
from mptk.conversions.vocabulary.tokens import trimmed_tokenizer
from mptk.io import models
from mptk.io.models import Loaded
from mptk.io.remade import remade
from mptk.ir.weights import Weights


def narrowed(loaded: Loaded, weights: Weights, kept: Sequence[int], rows: int) -> tuple[Loaded, dict[str, list[Any]]]:
    """The model with ``weights``, which have rows of the tokens ``kept`` of ``rows`` alone, and its config's changes.

    Raises:
        MptkError: the class has other weights for so many tokens; or the tokenizer cannot be trimmed.
    """
    new = {old: i for i, old in enumerate(kept)}
    config, changes = renumbered(loaded.model.config, new, rows)
    stored, _ = renumbered(models.config_in(loaded), new, rows)
    generation = getattr(loaded.model, "generation_config", None)
    if generation is not None:
        generation, more = renumbered(generation, new, rows)
        changes = {**more, **changes}
    small = remade(
        loaded,
        config,
        stored,
        weights,
        tokenizer=None if loaded.tokenizer is None else trimmed_tokenizer(loaded.tokenizer, kept),
        generation=generation,
        what=f"{len(kept)} tokens",
        remedy="leave out --vocabulary",
    )
    return small, changes
