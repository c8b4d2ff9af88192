"""budgets: what a budget can count, and the phases whose latency can be predicted. It imports no other library."""

from __future__ import annotations

LATENCY, KV_CACHE, SERVING = "latency", "kv-cache", "serving"
BUDGETS = {
    "params": "block",
    "total": "parameters",
    "flops": "flops",
    "bytes": "bytes",
    KV_CACHE: "kv_cache",
    SERVING: "serving",
    LATENCY: "latency_ms",
}
"""Budget → field of ``Cost``."""
CACHED = (KV_CACHE, SERVING)
"""The budgets that count the KV cache."""
VOCABULARY = ("total", "bytes", SERVING)
"""The budgets that count embeddings."""

PROMPT = 512
"""Tokens of the prompt in prefill and, unless a context is given, of the KV cache in decode. The batch is 1."""
CACHE_CONTEXT = 4096
"""Tokens in the KV cache that the budgets in ``CACHED`` count, unless a context is given."""
OBJECTIVES = {"prefill": (PROMPT, 0), "decode": (1, PROMPT)}
"""Phase → (new tokens, cached tokens)."""


def list_phase_tokens(phase: str, context: int | None = None) -> tuple[int, int]:
    """New and cached tokens of a phase. ``context``: tokens in the KV cache in decode; None: ``PROMPT``."""
    new, cached = OBJECTIVES[phase]
    return new, (context or cached) if cached else 0
