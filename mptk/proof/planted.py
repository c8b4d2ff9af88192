"""planted: a published folder has no file that mptk would not have written for it, whatever its manifest says.

Programs act on files by their names: an adapter, a list of modules, an index of weights, a file of settings. So the
names are not searched for those: each file must be one that mptk writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from mptk.compile.changes import COMPENSATION
from mptk.config.recipe import RECIPE_FILE
from mptk.errors import ProofError
from mptk.proof.claims import LATER
from mptk.protocols.chain import Compiled, Target
from mptk.protocols.report import PROVEN_ON, REPORT_FILE
from mptk.protocols.run_folder import METRICS, TRACKER
from mptk.publish.licence import CARD, list_notices
from mptk.publish.manifest import MARKER, RUNGS, hash_file, list_files
from mptk.targets.beside import READ

ALWAYS = frozenset({"plan.json", REPORT_FILE, CARD, RECIPE_FILE, LATER, PROVEN_ON})
"""Files that any folder has, or may have."""


def check_planted(compiled: Compiled, targets: Sequence[Target], folder: Path) -> None:
    """Raise ProofError if a file of ``folder`` is not one that mptk writes for this cut, or holds more than it writes.

    ``targets``: what the folder was written for. If one is of another package and does not list its files, any may be.
    """
    found, settings, dense = list_files(folder), compiled.prepared.settings, compiled.prepared.loaded.path
    for name in (each for each in (*found, MARKER) if each.endswith(".json")):
        _check_once(folder, name)
    known = set(ALWAYS)
    for target in targets:
        files = target.files(compiled, folder)
        if files is None:
            return
        known |= files
    if settings.steps:
        known |= {METRICS, *(name for name in found if name.startswith(f"{TRACKER}/"))}
    if compiled.chosen.changes and not compiled.chosen.trained:
        known.add(COMPENSATION)
    if settings.shared:
        known |= {name for name in found if name.startswith(f"{RUNGS}/")}
    if compiled.prepared.loaded.tokenizer is None:  # of a model in memory: verify's note says that nothing reads them
        known |= {name for name in found if any(PurePosixPath(name).match(pattern) for pattern in READ)}
    known |= {each.name for each in list_notices(dense) if _is_same_file(each, folder / each.name)}
    if more := sorted(set(found) - known):
        raise ProofError(
            f"the proof fails: {more[0]} is not a file that mptk writes for this model; do not use {folder}, and prune "
            "the model again"
        )


def _is_same_file(one: Path, other: Path) -> bool:
    return other.is_file() and hash_file(one) == hash_file(other)


def _check_once(folder: Path, name: str) -> None:
    """Raise ProofError if a JSON file has a field twice: programs differ in which of both they take."""

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ProofError(
                f"the proof fails: {name} has {twice} twice; do not use {folder}, and prune the model again"
            )
        return fields

    json.loads((folder / name).read_text(encoding="utf-8"), object_pairs_hook=once)
