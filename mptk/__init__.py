"""mptk: compiler-style structured pruning for language models.

The main job is ``mptk.prune``. Its steps are functions too: ``trace``, ``analyze``, ``rewrite``, ``export`` and
``verify``.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mptk.api import analyze, bench, export, rewrite, rule, trace
    from mptk.errors import MptkError, ProofError
    from mptk.plan import FamilyPlan, Plan
    from mptk.pruning import prune
    from mptk.settings import Settings
    from mptk.verification import verify

__version__ = metadata.version("mptk")
__all__ = [
    "FamilyPlan",
    "MptkError",
    "Plan",
    "ProofError",
    "Settings",
    "analyze",
    "bench",
    "export",
    "prune",
    "rewrite",
    "rule",
    "trace",
    "verify",
]

_HOMES = {
    "FamilyPlan": "mptk.plan",
    "MptkError": "mptk.errors",
    "Plan": "mptk.plan",
    "ProofError": "mptk.errors",
    "Settings": "mptk.settings",
    "prune": "mptk.pruning",
    "verify": "mptk.verification",
}


def __getattr__(name: str) -> Any:
    """The public names, imported at first use: ``import mptk`` alone stays quick."""
    if name not in __all__:
        raise AttributeError(f"module 'mptk' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "mptk.api")), name)
