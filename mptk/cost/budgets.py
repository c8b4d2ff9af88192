"""budgets: what a budget can count, and the phases that a latency can be of. A leaf: it imports no library."""

from __future__ import annotations

from mptk.errors import MptkError

LATENCY = "latency"
BUDGETS = {"params": "block", "flops": "flops", "bytes": "bytes", LATENCY: "latency_ms"}
"""What a budget counts → the field of ``Cost``."""

PROMPT = 512
"""Tokens of the prompt in prefill, and in the KV cache in decode; batch 1."""
OBJECTIVES = {"prefill": (PROMPT, 0), "decode": (1, PROMPT)}
"""Phase → (new tokens, cached tokens)."""


def phase(objective: str) -> tuple[int, int]:
    """New and cached tokens of a phase. Raises MptkError for an unknown one."""
    if objective not in OBJECTIVES:
        raise MptkError(f"no objective {objective!r}; choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective]
