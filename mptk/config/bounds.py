"""bounds: the least and the largest value of each number among the settings. The command line takes them from here."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from mptk.arguments import check_arguments
from mptk.errors import MptkError

COUNT = 10**9
"""More windows, tokens or steps than any run has."""
SEED = 2**32 - 1

BOUNDS: dict[str, tuple[float, float]] = {
    "sparsity": (0.0, 0.99),
    "max_ms": (1e-6, 1e9),
    "threads": (0, 1024),
    "multiple": (1, 1 << 20),
    "kv_heads": (1, 1 << 20),
    "tolerance": (0.0, 1.0),
    "samples": (1, COUNT),
    "length": (8, COUNT),
    "eval_windows": (1, COUNT),
    "eval_length": (2, COUNT),
    "proof_length": (48, COUNT),
    "memory": (1, 2**60),
    "max_shard_size": (1, 2**60),
    "distil_epochs": (0, COUNT),
    "distil_lr": (0.0, 100.0),
    "search_shapes": (1, 100_000),
    "search_finalists": (1, 100_000),
    "search_tokens": (0, 10**12),
    "seed": (0, SEED),
    "steps": (0, COUNT),
    "mask_share": (0.0, 1.0),
    "rank": (0, 1 << 16),
    "batch": (1, 1 << 20),
    "micro": (1, 1 << 20),
    "lr": (0.0, 100.0),
    "warmup": (0.0, 1.0),
    "clip": (0.0, 1e9),
    "save_every": (1, COUNT),
    "lm": (0.0, 1e6),
    "kl": (0.0, 1e6),
    "hidden": (0.0, 1e6),
}
"""Field of ``Settings``, ``Learning``, ``Training`` or ``LossWeights`` → the least and the largest value."""


def outside(value: float, least: float, most: float) -> str | None:
    """What is wrong with a number that is not finite or not in these bounds; None if nothing is."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is no finite number"
    if value < least:
        return f"{shown(value)} is less than {shown(least)}"
    return f"{shown(value)} is more than {shown(most)}" if value > most else None


def shown(value: float) -> str:
    """A number; of a very long one only that it is one."""
    if isinstance(value, int) and abs(value) >= 10**24:
        return "a number of many digits"
    return str(value)


def check_bounds(record: Any) -> None:
    """Raise MptkError if a field of a dataclass is of another type, or a number is not within its bounds."""
    for field in fields(record):
        value = getattr(record, field.name)
        if field.name not in BOUNDS or value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise MptkError(f"{field.name} is {value!r}, which is no number; give one")
        if (wrong := outside(value, *BOUNDS[field.name])) is not None:
            least, most = BOUNDS[field.name]
            raise MptkError(f"{field.name}: {wrong}; give a number from {shown(least)} to {shown(most)}")
    check_arguments(type(record), {field.name: getattr(record, field.name) for field in fields(record)})
