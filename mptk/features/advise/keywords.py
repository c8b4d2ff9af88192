"""keywords: the types of settings as keywords. ``python docs/tables.py`` writes this file."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict


class AdviseKeywords(TypedDict, total=False):
    """The settings of ``mptk.advise``."""

    budget: str
    context: int | None
    families: str | list[str] | tuple[str, ...]
    keep: str | list[str] | tuple[str, ...]
    portable: bool
    engines: str | list[str] | tuple[str, ...]
    align: int | str
    tensor_parallel: int
    method: str
    reconstruct: bool | None
    seed: int
    inputs: str | Path | None
    samples: int | None
    length: int
    eval_windows: int
    steps: int | None
    target: str
    memory: int | None
    device: str
    compute_dtype: str
    trust_remote_code: bool
