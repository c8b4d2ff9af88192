"""Random programs: small modules composed of every op family that has rules, and what must hold of each when cut.

``catalogue`` holds the steps by name, ``program`` the description of a program and its module, ``strategy`` draws
descriptions from seeds, ``oracles`` checks one. A new step is a function in the file of its op family.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from .catalogue import CATALOGUE, Step
from .oracles import FAILURES, Outcome, check
from .program import Program, build, inputs_of
from .reducing import cause_of, reduced
from .strategy import seeded

__all__ = [
    "CATALOGUE",
    "FAILURES",
    "Outcome",
    "Program",
    "Step",
    "build",
    "cause_of",
    "check",
    "inputs_of",
    "reduced",
    "seeded",
]
for part in iter_modules(__path__):
    import_module(f"{__name__}.{part.name}")  # each puts its steps into the catalogue
