"""manifest: ``mptk.json`` lists all files of a published folder and marks it as an output of mptk. It is written last.

``{"format": "mptk-output/1", "files": {path: sha256}}``. It reveals damage and later edits, but is not a signature.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mptk.errors import ChangedError, FileError, MptkError
from mptk.files import format_json, write_text
from mptk.plugins import list_features
from mptk.reading import read_json

MARKER = "mptk.json"
MANIFEST_FORMAT = "mptk-output/1"
REPORT_FILE = "report.json"
"""What a pruned folder says of itself (``mptk/protocols/report.py``)."""

# A digest is remembered only if the file's last change is at least this many nanoseconds old: file systems have coarse
# clocks, and one more change in the same tick would not show in the file's times.
SETTLED = 10**8
# Identity of a file → its digest.
_read_known: dict[tuple[int, ...], str] = {}


def hash_file(path: Path) -> str:
    """SHA-256 of a file. A process reads a file again only if it was touched since."""
    with path.open("rb") as file:
        key, began = identify_file(file.fileno()), time.time_ns()
        if key not in _read_known:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            # It changed while it was read, or may change without a trace.
            if identify_file(file.fileno()) != key or began - max(key[-2:]) < SETTLED:
                return digest
            _read_known[key] = digest
        return _read_known[key]


def compute_digests(paths: Iterable[Path]) -> list[str]:
    """``hash_file`` of each file, several at a time."""
    # Threads will do: hashlib lets others run while it hashes.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(hash_file, paths))


def identify_file(file: int | Path) -> tuple[int, ...]:
    """What changes whenever a file's content does; its two times come last. ``file``: a path or a descriptor."""
    # Anybody can set a file's own time (``cp -p`` does), but nobody the last one, the time when the inode changed.
    state = os.stat(file)
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


def list_files(folder: Path) -> list[str]:
    """All files of a folder except the manifest, sorted, with ``/`` between folders."""
    paths = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return sorted(name for p in paths if (name := p.relative_to(folder).as_posix()) != MARKER)


def hash_weight_files(folder: Path) -> str:
    """SHA-256 of the SHA-256 of each weight file of the folder, in the order of their names."""
    digests = compute_digests(sorted(folder.glob("*.safetensors")))
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def write_manifest(folder: Path) -> None:
    """Write ``mptk.json`` for the files that are in the folder now."""
    names = list_files(folder)
    _write(folder, dict(zip(names, compute_digests(folder / name for name in names), strict=True)))


def update_manifest(folder: Path, *names: str) -> None:
    """Add files to the manifest of a published folder, or update their entries. Other entries stay."""
    files = read_manifest(folder)
    _write(folder, {**files, **{name: hash_file(folder / name) for name in names}})


def read_manifest(folder: Path) -> dict[str, str]:
    """Path → sha256 of each file. Raises MptkError if the folder has no manifest, or a damaged one."""
    files = is_ours(folder).get("files")
    if not isinstance(files, dict):
        raise FileError(
            f"{folder} has no {MARKER} that lists its files; write the folder again with this mptk", name=folder
        )
    return files


def check_whole(folder: Path) -> None:
    """Raise MptkError if a folder is only a part, as a size of a ladder: it shares files with the folder around it."""
    place = folder.absolute().parent
    commands = {name: command for feature in list_features().values() for name, command in feature.subfolders.items()}
    if place.name in commands and is_ours(whole := place.parent):
        command = f"mptk {commands[place.name]} {whole} {folder.name} --out DIR"
        raise FileError(f"{folder} is a part of {whole}; write it first: `{command}`", name=folder)


def check_manifest(folder: Path) -> None:
    """Raise MptkError if a file is missing, new or changed, or if the folder's report names other weights."""
    check_whole(folder)
    check_listed(folder, others=False)
    _check_weights(folder)  # somebody may have written the manifest again after the weights were lost


def check_listed(folder: Path, *, others: bool = True) -> None:
    """``check_manifest`` for the files that the manifest lists. ``others``: whether a user may have added more."""
    files, there = read_manifest(folder), set(list_files(folder))
    # First, so that no file is opened under a name that leads out of the folder: the list could be anybody's.
    if missing := files.keys() - there:
        raise ChangedError(
            f"{min(missing)} is missing in {folder} since it was published; do not use it, write it again",
            name=min(missing),
        )
    if not others and (added := there - files.keys()):
        raise ChangedError(
            f"{min(added)} was added in {folder} since it was published; do not use it, write it again", name=min(added)
        )
    if linked := next((name for name in sorted(files) if (folder / name).is_symlink()), None):
        raise ChangedError(
            f"{linked} in {folder} is a link, which mptk never writes; do not use it, write it again", name=linked
        )
    if changed := list_edited(folder) or [name for name in sorted(files) if not (folder / name).is_file()]:
        raise ChangedError(
            f"{changed[0]} in {folder} was changed since it was published; do not use it, write it again",
            name=changed[0],
        )


def _check_weights(folder: Path) -> None:
    """Raise MptkError if a folder lacks the weights that its report names. Exports have no report."""
    if not (folder / REPORT_FILE).is_file():
        return
    report = read_json(folder / REPORT_FILE, FileError)
    said = report.get("weights_sha256") if isinstance(report, dict) else None
    if said is not None and said != hash_weight_files(folder):
        raise ChangedError(
            f"weights_sha256 in {REPORT_FILE} is wrong: {folder} has other weights, or none; do not use it, and prune "
            "the model again",
            name=REPORT_FILE,
        )


def copy_listed(folder: Path, new: Path) -> None:
    """Copy the files that a published folder lists. Raises MptkError if one was changed since."""
    files = read_manifest(folder)
    check_listed(folder)
    # The copies are compared, too: the folder may change after the check.
    for name in files:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, new / name)
    copies = compute_digests(new / name for name in files)
    if changed := next((name for name, copy in zip(files, copies, strict=True) if copy != files[name]), None):
        raise ChangedError(
            f"{changed} in {folder} changed while it was copied; do not use it, write it again", name=changed
        )


def list_foreign(folder: Path) -> list[str]:
    """Files in a published folder that its manifest does not list, and folders without any that it lists."""
    files = read_manifest(folder)
    # Only folders with listed files are entered. Any other is the user's as a whole, and is named as one.
    inner = {place.as_posix() for name in files for place in Path(name).parents}

    def find_within(place: Path, above: str) -> Iterator[str]:
        for entry in sorted(place.iterdir()):
            name = above + entry.name
            if name in inner and entry.is_dir() and not entry.is_symlink():
                yield from find_within(entry, f"{name}/")
            elif name not in files and name != MARKER:
                yield name

    return list(find_within(folder, ""))


def list_edited(folder: Path) -> list[str]:
    """Files that the manifest of a published folder lists, and that were changed since."""
    files = read_manifest(folder)
    there = [name for name in sorted(files) if (folder / name).is_file()]
    digests = compute_digests(folder / name for name in there)
    return [name for name, digest in zip(there, digests, strict=True) if digest != files[name]]


def is_ours(folder: Path) -> dict[str, object]:
    """The content of a folder's ``mptk.json``; empty if it is missing or has another format."""
    try:
        content = read_json(folder / MARKER, FileError)
    except MptkError:
        return {}
    return content if isinstance(content, dict) and content.get("format") == MANIFEST_FORMAT else {}


def _write(folder: Path, files: dict[str, str]) -> None:
    write_text(
        folder / MARKER, format_json({"format": MANIFEST_FORMAT, "files": dict(sorted(files.items()))}, indent=1) + "\n"
    )
