"""mptk: compiler-style structured pruning.

``mptk.prune`` prunes a model and returns a ``Pruned``; ``ladder`` makes several sizes in one run. ``advise`` says how
far a model can be cut, ``shapes`` ranks the ways to divide a budget, ``recover`` trains a pruned model, and
``evaluate``, ``generate`` and ``bench`` use it. Each step is a function too: ``trace``, ``analyze``, ``rewrite``,
``export`` and ``verify``. ``fetch`` and ``load`` get dense models. docs/python.md shows them all.
"""

from __future__ import annotations

import lazy_loader

from mptk.compat.optional import watch_imports
from mptk.errors import find_broken_package

watch_imports()

_load_name, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    """The public names. If a package that one of them needs is broken, the error says which.

    Raises:
        AttributeError: there is no such name, or it is of a feature that is not installed.
    """
    try:
        return _load_name(name)
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("mptk.features."):
            raise AttributeError(f"mptk.{name} needs {error.name}, and that feature is not installed") from error
        raise find_broken_package(error) or error from error
