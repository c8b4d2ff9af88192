"""mptk: compiler-style structured pruning.

``mptk.prune`` prunes a model and returns a ``Pruned``; ``ladder`` makes several sizes in one run. ``advise`` says how
far a model can be cut, ``shapes`` ranks the ways to divide a budget, ``recover`` trains a pruned model, and
``evaluate``, ``generate`` and ``bench`` use it. Each step is a function too: ``trace``, ``analyze``, ``rewrite``,
``export`` and ``verify``. ``fetch`` and ``load`` get dense models. docs/python.md shows them all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mptk.api.advice import advise, shapes
    from mptk.api.compiler import analyze, rewrite, rule, show, trace
    from mptk.api.graphs import bench, export
    from mptk.api.ladder import ladder
    from mptk.api.pruned import Pruned, prune, recover
    from mptk.api.use import evaluate, generate
    from mptk.config.settings import Settings
    from mptk.errors import MptkError, ProofError
    from mptk.io.models import load
    from mptk.io.packaged import fetch
    from mptk.ir.plan import FamilyPlan, Plan
    from mptk.ir.samples import Samples
    from mptk.proof.verification import verify
    from mptk.protocols.report import Report
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
    "advise",
    "analyze",
    "bench",
    "evaluate",
    "export",
    "fetch",
    "generate",
    "ladder",
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
    "mptk.api.advice": ("advise", "shapes"),
    "mptk.api.graphs": ("bench", "export"),
    "mptk.api.ladder": ("ladder",),
    "mptk.api.pruned": ("Pruned", "prune", "recover"),
    "mptk.api.use": ("evaluate", "generate"),
    "mptk.config.settings": ("Settings",),
    "mptk.errors": ("MptkError", "ProofError"),
    "mptk.io.models": ("load",),
    "mptk.io.packaged": ("fetch",),
    "mptk.ir.plan": ("FamilyPlan", "Plan"),
    "mptk.ir.samples": ("Samples",),
    "mptk.proof.verification": ("verify",),
    "mptk.protocols.report": ("Report",),
    "mptk.version": ("__version__",),
}


def __getattr__(name: str) -> object:
    """The public names, imported at first use, so that ``import mptk`` stays quick."""
    if name not in __all__:
        raise AttributeError(f"module 'mptk' has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), "mptk.api.compiler")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return __all__
