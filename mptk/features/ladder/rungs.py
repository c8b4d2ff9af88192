"""rungs: the smaller sizes of a ladder inside the folder of the largest, whose weights they share.

``rungs/SIZE`` has each file that differs from the largest size's folder or is missing there, and of each file of
weights only what is not a slice of the larger weights (``slices.py``). Its manifest lists the files of the whole
folder, as the size was proven.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from mptk.compile.cut import COMPENSATION
from mptk.errors import FileError, ProofError
from mptk.features.ladder import RUNGS
from mptk.features.ladder.slices import Places, open_file_weights, restore_file, write_part
from mptk.ir import Weights
from mptk.publish.manifest import MARKER, hash_file, list_files, read_manifest

PART_SUFFIX = ".part"
"""The end of a part's name. With it no program that looks for ``*.safetensors`` takes a part for weights."""


def list_rung_sizes(folder: Path) -> list[str]:
    """The names of the smaller sizes in a folder, the largest model first."""
    return sorted((place.parent.name for place in (folder / RUNGS).glob(f"*/{MARKER}")), key=read_size)


def read_size(name: str) -> float:
    """The sparsity in the name of a size; infinite if it is another name, which somebody gave a folder."""
    try:
        return float(name)
    except ValueError:
        return math.inf


def keep_rung(full: Path, folder: Path, places: Places) -> None:
    """Keep the published folder ``full`` of a size within ``folder``, which is being made for the largest size."""
    rung, larger = folder / RUNGS / full.name, _open_weights(folder)
    for name in [*list_files(full), MARKER]:
        file, same = full / name, folder / name
        place = rung / name
        if _has_weights(name):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_part(file, larger, places, rung / f"{name}{PART_SUFFIX}")
        elif not same.is_file() or hash_file(same) != hash_file(file):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def restore_rung(folder: Path, size: str, new: Path) -> None:
    """Write the whole folder of a size into the empty folder ``new``.

    Raises:
        MptkError: a file is missing or damaged, or is not as the size was proven.
    """
    rung = folder / RUNGS / size
    own, shared, larger = {*list_files(rung)}, {*list_files(folder)}, _open_weights(folder)
    for name, digest in read_manifest(rung).items():
        part, file = f"{name}{PART_SUFFIX}", new / name
        if not {name, part} & (own | shared):  # a manifest may name anything; only listed files are opened
            raise FileError(f"{folder} lacks {name} of size {size}; do not use it, prune again", name=name)
        file.parent.mkdir(parents=True, exist_ok=True)
        if part in own:
            restore_file(rung / part, larger, file)
        else:
            shutil.copyfile((rung if name in own else folder) / name, file)
        # The rebuilt folder is what was proven only if each file has the same bytes.
        if hash_file(file) != digest:
            raise ProofError(
                f"{name} of size {size} is not as it was proven; do not use {folder}, prune again", name=name
            )


def _open_weights(folder: Path) -> Weights:
    return open_file_weights(sorted(file for file in folder.glob("*.safetensors") if _has_weights(file.name)))


def _has_weights(name: str) -> bool:
    """Whether a file holds weights of the folder's checkpoint, unlike FLAP's biases and the proof's inputs."""
    return "/" not in name and name.endswith(".safetensors") and name != COMPENSATION
