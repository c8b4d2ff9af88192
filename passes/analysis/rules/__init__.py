"""Axis rules by op family. Importing this package fills the table."""

from mptk.plugins import load_plugins
from passes.analysis.rules import (  # noqa: F401
    contract,
    convolution,
    index,
    move,
    opaque,
    order,
    pointwise,
    positions,
    recurrent,
    reduce,
    shape,
)
from passes.analysis.rules.context import Value
from passes.analysis.rules.pointwise import POINTWISE
from passes.analysis.rules.table import RULES, Result, Rule, rule

__all__ = ["POINTWISE", "RULES", "Result", "Rule", "Value", "list_rules", "load_rules", "rule"]


def load_rules() -> dict[str, Rule]:
    """All rules by op: mptk's, and the rules that plugins register when they are imported (group ``mptk.rules``)."""
    # At the analysis and not at import: a plugin imports this package itself.
    load_plugins("mptk.rules")
    return RULES


def list_rules() -> list[dict[str, str]]:
    """The ops that have an axis rule, by name: ``op``, the ``file`` of its rule and the rule's ``axes`` equation."""
    return [
        {
            "op": name,
            "file": found.propagate.__module__.replace(".", "/") + ".py",
            "axes": (found.propagate.__doc__ or "").partition("\n")[0],
        }
        for name, found in sorted(load_rules().items())
    ]
