"""plugins: find what features and other packages add, the latter by their entry points.

docs/plugins.md says how to write a plugin.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any, TypeVar

from mptk.errors import MptkError

Plugin = TypeVar("Plugin")


@functools.cache
def load_plugins(group: str) -> Mapping[str, Any]:
    """Name → object of every entry point of ``group`` (``mptk.rules``, ``mptk.criteria``, ``mptk.targets``, …).

    Raises:
        MptkError: a package's entry point cannot be imported.
    """
    # A plugin that fails names its package: the user has to repair or remove that, not mptk.
    found = {}
    for entry in entry_points(group=group):
        try:
            found[entry.name] = entry.load()
        except (ImportError, AttributeError) as error:
            package = entry.dist.name if entry.dist else entry.value
            raise MptkError(
                f"the plugin {entry.name} of {package} does not load: {error}; update or remove it"
            ) from error
    return found


def with_plugins(own: Mapping[str, Plugin], group: str) -> dict[str, Plugin]:
    """mptk's own objects and the plugins of ``group``, by name.

    A plugin cannot replace one of mptk's own: else an installed package would change what a recipe means.
    """
    return {**own, **{name: made for name, made in load_plugins(group).items() if name not in own}}


def find_entry(kind: str, name: str, known: Mapping[str, Plugin]) -> Plugin:
    """The entry of that name. Raises MptkError with the known names."""
    if name not in known:
        raise MptkError(f"no {kind} {name!r}; choose one of {', '.join(known)}")
    return known[name]


# ---- features ----

# Until features are found by entry points: kind → name → object.
_FEATURE_PARTS: Mapping[str, Mapping[str, str]] = {
    "loaders": {
        "packaged": "mptk.features.packaged.loader:PACKAGED",
        "gguf": "mptk.features.gguf.loader:GGUF",
        "quantized_checkpoints": "mptk.features.quantized_checkpoints.loader:QUANTIZED",
        "diffusers": "mptk.features.diffusers.loader:DIFFUSERS",
        "nemotron_nas": "mptk.features.nemotron_nas.loader:NEMOTRON_NAS",
    },
    "targets": {"nemotron-nas": "mptk.features.nemotron_nas.target:TARGET"},
    "tasks": {
        "denoising": "mptk.features.diffusers.task:DENOISING",
        "autoencoding": "mptk.features.diffusers.task:AUTOENCODING",
    },
    "inputs": {
        "timestep": "mptk.features.diffusers.latents:LATENTS",
        "sample": "mptk.features.diffusers.pictures:PICTURES",
    },
}


@functools.cache
def load_parts(kind: str) -> Mapping[str, Any]:
    """What the installed features add of a kind (``loaders``, ``targets``, ``tasks``, ``inputs``), by name."""
    found = {}
    for name, place in _FEATURE_PARTS[kind].items():
        try:
            found[name] = resolve_name(place)
        except ModuleNotFoundError as error:
            # A feature whose folder is not there is not installed. Any other module that is missing is an error.
            if not place.replace(":", ".").startswith(f"{error.name}."):
                raise
    return found
