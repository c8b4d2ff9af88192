"""beside: files beside weights and graphs that other programs read, against what dense model and plan give."""

from __future__ import annotations

import filecmp
from collections.abc import Callable
from pathlib import Path

from mptk.files import scratch
from mptk.io.checkpoint import copy_processors, save_tokenizer
from mptk.io.models import Loaded
from mptk.io.untrusted import read_object
from mptk.publish.manifest import listed
from mptk.targets.fields import compare, fail

READ = ("*token*", "vocab*", "merges*", "*.model", "*chat_template*", "*chat_templates/*", "*processor_config.json")
"""Files that a tokenizer or a processor reads if they are there."""


def check_beside(folder: Path, write: Callable[[Path], object], *, all_known: bool = True) -> None:
    """Compare files in ``folder`` with those that ``write`` puts into another folder, field by field if they are JSON.

    ``all_known``: whether these are all that a tokenizer or a processor may read.

    Raises:
        ProofError: one is missing, differs, or is one more for a tokenizer or a processor to read.
    """
    with scratch() as place:
        write(place.folder)
        names = listed(place.folder)
        for name in names:
            _same(name, folder / name, place.folder / name)
    if not all_known:
        return
    more = sorted({path.relative_to(folder).as_posix() for pattern in READ for path in folder.glob(pattern)} - {*names})
    if more:
        fail(f"{more[0]} is no file of the dense model")


def _same(name: str, file: Path, expected: Path) -> None:
    if not file.is_file():
        fail(f"{name} is missing")
    if filecmp.cmp(file, expected, shallow=False):
        return
    if file.suffix == ".json":
        compare(name, read_object(file), read_object(expected))
    else:
        fail(f"{name} is not the dense model's")


def write_beside(loaded: Loaded, folder: Path, *, same_features: bool) -> None:
    """Write what stands beside the weights of a model: the tokenizer's files, and those of processors."""
    if loaded.tokenizer is not None:
        save_tokenizer(loaded.tokenizer, folder)
    copy_processors(loaded.path, folder, same_features=same_features)
