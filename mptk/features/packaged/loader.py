"""loader: a packaged alias as a model's name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mptk.features.packaged import wheels
from mptk.io.loaders import Loader


class PackagedLoader(Loader):
    """An alias stands for a file or a folder that a wheel on PyPI holds."""

    @property
    def names(self) -> str:
        return f"packaged alias ({', '.join(sorted(wheels.ALIASES))})"

    @property
    def aliases(self) -> Sequence[str]:
        return sorted(wheels.ALIASES)

    def takes_name(self, name: str) -> bool:
        return name in wheels.ALIASES

    def find_local_copy(self, name: str) -> Path | None:
        return wheels.find_cached(name)

    def fetch(self, name: str) -> Path:
        return wheels.fetch(name)

    def find_licence(self, name: str) -> str:
        return wheels.ALIASES[name].licence


PACKAGED = PackagedLoader()
