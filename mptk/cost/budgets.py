"""budgets: what a budget can count, and the phases whose latency can be predicted. It imports no other library."""

from __future__ import annotations

from mptk.errors import MptkError

LATENCY = "latency"
BUDGETS = {"params": "block", "flops": "flops", "bytes": "bytes", LATENCY: "latency_ms"}
"""Budget → field of ``Cost``."""

PROMPT = 512
"""Tokens of the prompt in prefill, and of the KV cache in decode. The batch is 1."""
OBJECTIVES = {"prefill": (PROMPT, 0), "decode": (1, PROMPT)}
"""Phase → (new tokens, cached tokens)."""


def phase(objective: str) -> tuple[int, int]:
    """(new tokens, cached tokens) of a phase. Raises MptkError if it is unknown."""
    if objective not in OBJECTIVES:
        raise MptkError(f"no objective {objective!r}; choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective]
