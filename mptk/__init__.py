"""mptk: compiler-style structured pruning for language models.

The main job is ``mptk.prune``. Its steps are functions too: ``trace``, ``analyze``, ``rewrite``, ``export`` and
``verify``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mptk.driver.api import analyze, bench, export, rewrite, rule, show, trace
    from mptk.driver.prune import prune
    from mptk.driver.verification import verify
    from mptk.errors import MptkError, ProofError
    from mptk.ir.plan import FamilyPlan, Plan
    from mptk.run.report import Report
    from mptk.run.settings import Settings
    from mptk.version import __version__

__all__ = [
    "FamilyPlan",
    "MptkError",
    "Plan",
    "ProofError",
    "Report",
    "Settings",
    "__version__",
    "analyze",
    "bench",
    "export",
    "prune",
    "rewrite",
    "rule",
    "show",
    "trace",
    "verify",
]

_HOMES = {
    "FamilyPlan": "mptk.ir.plan",
    "MptkError": "mptk.errors",
    "Plan": "mptk.ir.plan",
    "ProofError": "mptk.errors",
    "Report": "mptk.run.report",
    "Settings": "mptk.run.settings",
    "__version__": "mptk.version",
    "prune": "mptk.driver.prune",
    "verify": "mptk.driver.verification",
}


def __getattr__(name: str) -> object:
    """The public names, imported at first use: ``import mptk`` alone stays quick."""
    if name not in __all__:
        raise AttributeError(f"module 'mptk' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "mptk.driver.api")), name)


def __dir__() -> list[str]:
    return __all__
