"""random: the baseline that each criterion must beat."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from mptk.ir.families import Family
from mptk.methods.criteria.base import Criterion, Scores


def score_at_random(seed: int, families: Sequence[Family]) -> Scores:
    """Uniform numbers in [0, 1).

    The seed and a family's name give its stream, so other families do not change its numbers.
    """
    scores = {}
    for family in families:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {family.name}".encode()))
        scores[family.name] = torch.rand(len(family.groups), family.scopes, family.size, generator=generator)
    return scores


RANDOM = Criterion(
    "random",
    "random choice, from the seed",
    lambda given: given.seed,
    score_at_random,
    passes=0,
    judges=("channels", "blocks"),
)
