"""mptk: compiler-style structured pruning.

``mptk.prune`` prunes a model and returns a ``Pruned``; ``ladder`` makes several sizes in one run. ``advise`` says how
far a model can be cut, ``shapes`` ranks the ways to divide a budget, ``recover`` trains a pruned model, and
``evaluate``, ``generate`` and ``bench`` use it. Each step is a function too: ``trace``, ``analyze``, ``rewrite``,
``export`` and ``verify``. ``fetch`` and ``load`` get dense models. docs/python.md shows them all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from mptk.compat.optional import watch_imports
from mptk.errors import find_broken_package

if TYPE_CHECKING:
    from mptk.api.advice import advise as advise
    from mptk.api.advice import shapes as shapes
    from mptk.api.compiler import analyze as analyze
    from mptk.api.compiler import rewrite as rewrite
    from mptk.api.compiler import rule as rule
    from mptk.api.compiler import show as show
    from mptk.api.compiler import trace as trace
    from mptk.api.graphs import bench as bench
    from mptk.api.graphs import export as export
    from mptk.api.ladder import ladder as ladder
    from mptk.api.ladder import rung as rung
    from mptk.api.pruned import Pruned as Pruned
    from mptk.api.pruned import prune as prune
    from mptk.api.pruned import recover as recover
    from mptk.api.use import evaluate as evaluate
    from mptk.api.use import generate as generate
    from mptk.config.settings import Settings as Settings
    from mptk.errors import MptkError as MptkError
    from mptk.errors import ProofError as ProofError
    from mptk.io.models import load as load
    from mptk.io.packaged import fetch as fetch
    from mptk.ir.plan import FamilyPlan as FamilyPlan
    from mptk.ir.plan import Plan as Plan
    from mptk.ir.samples import Samples as Samples
    from mptk.proof.verification import verify as verify
    from mptk.protocols.report import Report as Report
    from mptk.version import __version__ as __version__

# The imports above are only for type checkers and editors: at run time ``__getattr__`` finds the same names here.
_HOMES = {
    "mptk.api.advice": ("advise", "shapes"),
    "mptk.api.compiler": ("analyze", "rewrite", "rule", "show", "trace"),
    "mptk.api.graphs": ("bench", "export"),
    "mptk.api.ladder": ("ladder", "rung"),
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

__all__ = sorted(name for names in _HOMES.values() for name in names)

# Before anything imports transformers: a broken package that it tries would end every run.
watch_imports()


def __getattr__(name: str) -> object:
    """The public names, imported at first use, so that ``import mptk`` stays quick."""
    if name not in __all__:
        raise AttributeError(f"module 'mptk' has no attribute {name!r}")
    try:
        return getattr(import_module(next(module for module, names in _HOMES.items() if name in names)), name)
    except (ImportError, OSError) as error:  # an OSError: a shared library that ctypes cannot load
        raise find_broken_package(error) or error from error


def __dir__() -> list[str]:
    return __all__
