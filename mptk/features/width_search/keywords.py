"""keywords: the types of settings as keywords. ``python docs/tables.py`` writes this file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from mptk.config import Learning, LossWeights, Rates, Training


class ShapesKeywords(TypedDict, total=False):
    """The settings of ``mptk.shapes``."""

    sparsity: float | str
    budget: str
    context: int | None
    max_ms: float | None
    objective: str
    threads: int
    families: str | list[str] | tuple[str, ...]
    keep: str | list[str] | tuple[str, ...]
    kv_heads: int | None
    widths: Mapping[str, int]
    portable: bool
    engines: str | list[str] | tuple[str, ...]
    align: int | str
    tensor_parallel: int
    tolerance: float
    method: str
    reconstruct: bool | None
    search_shapes: int
    search_finalists: int
    search_tokens: int | None
    seed: int
    inputs: str | Path | None
    samples: int | None
    length: int
    batch: int
    micro: int
    lr: float | None
    optimizer: str
    warmup: float
    clip: float
    lm: float
    kl: float
    hidden_loss: float
    rank: int | None
    teacher: str
    teacher_cache: str | Path | None
    precision: str
    gradient_checkpointing: bool
    rates: Rates
    target: str
    rehome: bool
    overwrite: bool
    resume: bool
    memory: int | None
    device: str
    compute_dtype: str
    trust_remote_code: bool
    learning: Learning
    training: Training
    losses: LossWeights
