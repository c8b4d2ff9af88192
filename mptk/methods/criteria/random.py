"""random: the baseline that each criterion must beat."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from mptk.ir import Variable
from mptk.methods.criteria.base import Criterion, Scores


def score_at_random(seed: int, variables: Sequence[Variable]) -> Scores:
    """Uniform numbers in [0, 1).

    The seed and a variable's name give its stream, so others do not change its numbers.
    """
    scores = {}
    for variable in variables:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {variable.name}".encode()))
        scores[variable.name] = torch.rand(len(variable.groups), variable.scopes, variable.size, generator=generator)
    return scores


RANDOM = Criterion(
    "random",
    "random choice, from the seed",
    lambda given: given.seed,
    score_at_random,
    passes=0,
    judges=("channels", "blocks"),
)
