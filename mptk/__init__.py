"""mptk: compiler-style structured pruning.

The main job is ``mptk.prune``, which gives a ``Pruned``; ``shapes`` says how a budget is best divided; ``recover``
trains it; ``evaluate``, ``generate`` and ``bench`` use it. The steps are functions too: ``trace``, ``analyze``,
``rewrite``, ``export`` and ``verify``. ``fetch`` and ``load`` get dense models.
docs/python.md shows all of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mptk.driver.api import analyze, bench, export, rewrite, rule, show, trace
    from mptk.driver.pruned import Pruned, prune, recover
    from mptk.driver.shapes import shapes
    from mptk.driver.use import evaluate, generate
    from mptk.driver.verification import verify
    from mptk.errors import MptkError, ProofError
    from mptk.io.models import load
    from mptk.io.packaged import fetch
    from mptk.ir.plan import FamilyPlan, Plan
    from mptk.ir.samples import Samples
    from mptk.run.report import Report
    from mptk.run.settings import Settings
    from mptk.version import __version__

__all__ = [
    "FamilyPlan",
    "MptkError",
    "Plan",
    "ProofError",
    "Pruned",
    "Report",
    "Samples",
    "Settings",
    "__version__",
    "analyze",
    "bench",
    "evaluate",
    "export",
    "fetch",
    "generate",
    "load",
    "prune",
    "recover",
    "rewrite",
    "rule",
    "shapes",
    "show",
    "trace",
    "verify",
]

_HOMES = {
    "FamilyPlan": "mptk.ir.plan",
    "MptkError": "mptk.errors",
    "Plan": "mptk.ir.plan",
    "ProofError": "mptk.errors",
    "Pruned": "mptk.driver.pruned",
    "Report": "mptk.run.report",
    "Samples": "mptk.ir.samples",
    "Settings": "mptk.run.settings",
    "__version__": "mptk.version",
    "evaluate": "mptk.driver.use",
    "fetch": "mptk.io.packaged",
    "generate": "mptk.driver.use",
    "load": "mptk.io.models",
    "prune": "mptk.driver.pruned",
    "recover": "mptk.driver.pruned",
    "shapes": "mptk.driver.shapes",
    "verify": "mptk.driver.verification",
}


def __getattr__(name: str) -> object:
    """The public names, imported at first use: ``import mptk`` alone stays quick."""
    if name not in __all__:
        raise AttributeError(f"module 'mptk' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "mptk.driver.api")), name)


def __dir__() -> list[str]:
    return __all__
