"""keywords: the types of settings as keywords. ``python docs/tables.py`` writes this file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, TypedDict

from mptk.config import Learning, LossWeights, Rates, Training


class RecoverKeywords(TypedDict, total=False):
    """The settings of ``mptk.recover``."""

    seed: int
    length: int
    eval_windows: int
    eval_length: int
    minutes: float | None
    steps: int | None
    batch: int
    micro: int
    lr: float | None
    optimizer: str
    warmup: float
    clip: float
    lm: float
    kl: float
    hidden_loss: float
    save_every: int
    rank: int | None
    teacher: str
    teacher_cache: str | Path | None
    precision: str
    quantize_aware: bool
    gradient_checkpointing: bool
    tracker: str
    rates: Rates
    max_shard_size: int | None
    onnx: bool
    logits: Literal["all", "last"]
    quantize: str | list[str] | tuple[str, ...]
    onnx_dtype: str
    overwrite: bool
    strict: bool
    resume: bool
    proof_length: int
    memory: int | None
    device: str
    compute_dtype: str
    trust_remote_code: bool
    learning: Learning
    training: Training
    losses: LossWeights


class CutKeywords(RecoverKeywords, total=False):
    """The settings of ``mptk.prune`` and ``mptk.ladder``."""

    budget: str
    context: int | None
    max_ms: float | None
    objective: str
    threads: int
    families: str | list[str] | tuple[str, ...]
    keep: str | list[str] | tuple[str, ...]
    vocabulary: str | Path | Iterable[str] | None
    kv_heads: int | None
    widths: Mapping[str, int]
    layers: str
    plan: str | Path | None
    larger: str | Path | None
    portable: bool
    engines: str | list[str] | tuple[str, ...]
    align: int | str
    tensor_parallel: int
    tolerance: float
    method: str
    reconstruct: bool | None
    distil_epochs: int | None
    distil_lr: float
    search: bool
    search_shapes: int
    search_finalists: int
    search_tokens: int | None
    inputs: str | Path | None
    samples: int | None
    mask_share: float | None
    masks: str
    target: str
    dtype: str
    rehome: bool


class PruneKeywords(CutKeywords, total=False):
    """The settings of ``mptk.prune``."""

    sparsity: float | str
