"""Plugins that are installed only inside a ``with`` block."""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from mptk import plugins

_COUNTED = itertools.count()
_KEPT = (plugins.find_entries, plugins.load_plugins, plugins.list_features, plugins.load_parts)
"""What is found once in a process."""


@contextmanager
def install_plugin(entries: Mapping[str, Mapping[str, object]], *, package: str = "plugin-of-a-test") -> Iterator[None]:
    """Inside the block, mptk finds these entry points as it finds those of an installed package.

    Args:
        entries: group → name → object, such as ``{"mptk.features": {"mine": Feature("mine", "…")}}``.
        package: the name of the package that brings them.
    """
    module = ModuleType(f"mptk_plugin_{next(_COUNTED)}")
    lines = list[str]()
    for group, named in entries.items():
        lines.append(f"[{group}]")
        for name, made in named.items():
            attribute = f"object_{len(lines)}"
            setattr(module, attribute, made)
            lines.append(f"{name} = {module.__name__}:{attribute}")
    with tempfile.TemporaryDirectory() as folder:
        described = Path(folder) / f"{package}-1.dist-info"
        described.mkdir()
        (described / "METADATA").write_text(f"Name: {package}\nVersion: 1\n")
        (described / "entry_points.txt").write_text("\n".join(lines))
        sys.modules[module.__name__] = module
        sys.path.append(folder)
        _forget_found()
        try:
            yield
        finally:
            sys.path.remove(folder)
            del sys.modules[module.__name__]
            _forget_found()


def _forget_found() -> None:
    for each in _KEPT:
        each.cache_clear()
