"""methods: choose the units to cut, and change the weights that stay. One file for each method."""

from __future__ import annotations

from mptk.methods.criteria import list_criteria
from mptk.methods.maskprune.method import MaskPrune
from mptk.methods.one_shot import OneShotMethod
from mptk.plugins import find_entry, with_features, with_plugins
from mptk.protocols import Method

MASKPRUNE = MaskPrune()


def list_methods() -> dict[str, Method]:
    """MaskPrune, a one-shot method for each criterion, and the methods of features and plugins, by name."""
    one_shot = {name: OneShotMethod(criterion) for name, criterion in list_criteria().items()}
    return with_plugins(with_features({MASKPRUNE.name: MASKPRUNE, **one_shot}, "methods"), "mptk.methods")


def find_method(name: str) -> Method:
    """The method of that name. Raises MptkError if there is none."""
    return find_entry("method", name, list_methods())
