"""optional: packages that mptk does not need count as not installed if they cannot be imported.

transformers, accelerate and peft import them if they are installed. A torchaudio of another torch, or mlx without its
library, would end each run, some of them after minutes. This module imports nothing that is heavy.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

IMPORTED = {
    "bitsandbytes": "bitsandbytes",
    "mistral_common": "mistral_common",
    "mlx": "mlx.core",
    "sentencepiece": "sentencepiece",
    "soundfile": "soundfile",
    "soxr": "soxr",
    "torchao": "torchao",
    "torchaudio": "torchaudio",
}
"""Package → its module that shows whether it works. ``IMPORTERS`` import these packages, whatever the model is."""
IMPORTERS = ("accelerate", "datasets", "peft", "transformers")


class BeforeImporters(MetaPathFinder):
    """Finds nothing. The first import of one of ``IMPORTERS`` asks it, and then the packages are tried."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in IMPORTERS and self in sys.meta_path:
            sys.meta_path.remove(self)  # before the packages are tried, which may import the importers
            hide_broken()
        return None


def watch_imports() -> None:
    """Hide broken packages as soon as one of ``IMPORTERS`` is imported; at once if one was before."""
    # Not before: ``import mptk`` and commands without a model stay quick.
    if any(name in sys.modules for name in IMPORTERS):
        for name in hide_broken():
            _forget(name)
    elif not any(isinstance(finder, BeforeImporters) for finder in sys.meta_path):
        sys.meta_path.insert(0, BeforeImporters())


def hide_broken() -> list[str]:
    """Import the packages that are installed; a package that fails counts as not installed in this process."""
    broken = []
    for name, module in IMPORTED.items():
        if name in sys.modules or find_spec(name) is None:
            continue
        try:
            import_module(module)
        except Exception as error:  # noqa: BLE001  # a package may raise anything
            said = str(error).strip().partition("\n")[0] or type(error).__name__
            warnings.warn(f"{name} is installed, but does not import ({said}); mptk goes on without it", stacklevel=2)
            # Python's own sign for a module that cannot be imported, which ``find_spec`` looks at, too. It stays to the
            # end of the process, since libraries ask again and again.
            sys.modules[name] = None  # type: ignore[assignment]
            broken.append(name)
    return broken


def _forget(name: str) -> None:
    """Make transformers, which was imported before, forget that a package is there."""
    # It keeps the answer in two places: a cached function, and a flag that was set when the module was imported.
    utils = sys.modules.get("transformers.utils.import_utils")
    known = getattr(utils, f"is_{name}_available", None)
    if known is not None and hasattr(known, "cache_clear"):
        known.cache_clear()
    generic = sys.modules.get("transformers.utils.generic")
    if hasattr(generic, f"_is_{name}_available"):
        setattr(generic, f"_is_{name}_available", False)
