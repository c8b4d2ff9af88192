"""Models with the inputs and gradients of their layers (``criteria_cases``), once in a process."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def gqa():
    import criteria_cases

    return criteria_cases.grouped_queries()


@pytest.fixture(scope="session")
def gpt2():
    import criteria_cases

    return criteria_cases.fused_heads()


@pytest.fixture(scope="session")
def moe():
    import criteria_cases

    return criteria_cases.packed_experts()
