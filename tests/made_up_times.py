"""Operators of made-up times, which stand for a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mptk.cost.operator_times import ATTENTION, MATMUL, Operator


def milliseconds(operator: Operator) -> float:
    """Multilinear in each size, as most machines nearly are. Element-wise operators are free."""
    if operator.kind == MATMUL:
        rows, k, n = operator.sizes
        return 0.01 + rows * k * n * 1e-5
    if operator.kind == ATTENTION:
        tokens, past, heads, groups, dim, value_dim = operator.sizes
        return 0.02 + (tokens + past) * (heads * tokens + groups) * (dim + value_dim) * 1e-6
    return 0.0


def times(operators: Sequence[Operator]) -> Mapping[Operator, float]:
    return {operator: milliseconds(operator) for operator in operators}
