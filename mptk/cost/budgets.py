"""budgets: what a budget can count, and the phases whose latency can be predicted. It imports no other library."""

from __future__ import annotations

LATENCY = "latency"
BUDGETS = {"params": "block", "flops": "flops", "bytes": "bytes", LATENCY: "latency_ms"}
"""Budget → field of ``Cost``."""

PROMPT = 512
"""Tokens of the prompt in prefill, and of the KV cache in decode. The batch is 1."""
OBJECTIVES = {"prefill": (PROMPT, 0), "decode": (1, PROMPT)}
"""Phase → (new tokens, cached tokens)."""
