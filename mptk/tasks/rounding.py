"""rounding: how far a quantised graph may be from its float graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from passes.targets.onnx.check_quantized import DIVERGENCES, divergence
from passes.verify import Difference

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Outputs of the quantised graph and of the float graph."""

DISTANCES = {"fp16": 0.01, "int8": 0.1, "int4": 0.5}
"""Allowed distance of features, relative to their norm."""


def logits_apart(scheme: str, pairs: Pairs) -> Difference:
    """The divergence of the distributions, in nats."""
    apart = max(divergence(*pair) for pair in pairs)
    return Difference(f"{scheme} logits", apart, apart, DIVERGENCES[scheme])


def features_apart(scheme: str, pairs: Pairs) -> Difference:
    """The distance of the features, relative to their norm."""
    apart = max(_distance(*pair) for pair in pairs)
    return Difference(f"{scheme} features", apart, apart, DISTANCES[scheme])


def _distance(found: Tensor, reference: Tensor) -> float:
    """‖f − f*‖ / ‖f*‖. NaN counts as infinite."""
    apart = ((found.double() - reference.double()).norm() / reference.double().norm()).item()
    return apart if apart == apart else float("inf")
