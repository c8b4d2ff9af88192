"""A release: build the wheel, install it in an empty environment, try it there, and say what the owner types.

    make release       # python -m tests.release [--extras eval,images] [--python python3.12]

Nothing is sent anywhere. ``--extras`` also installs these extras of pyproject.toml, one after the other, and imports what
each is for; "all" takes every one for users, some GB. What must be done by hand before is an error here: a changed tree, a
changelog without the version.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mptk.errors import InputError
from mptk.version import __version__

ROOT = Path(__file__).parents[1]
DIST, EMPTY = ROOT / "dist", ROOT / "build" / "release"
IMPORTS = {
    "eval": ("lm_eval",),
    "diffusers": ("diffusers",),
    "images": ("PIL", "torchvision"),
    "quantized": ("compressed_tensors",),
    "llama-cpp": ("xllamacpp",),
    "testing": ("PIL", "pytest", "mptk.testing.fixtures"),
    "bench": ("mlx.core", "mlx_lm", "onnxruntime_genai", "scipy", "timm", "torch_pruning", "torchvision", "xllamacpp"),
}
"""Extra for users → what it is for."""
TRIED = (
    ("--version",),
    ("features",),
    ("models",),
    ("passes",),
    ("prune", "--help"),
)
"""Commands that run in the empty environment. None needs a model."""
MADE = """
import mptk, torch
net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
pruned = mptk.prune(net, sparsity=0.5, method="magnitude", example_inputs=torch.randn(2, 16))
print(pruned.model)
"""
"""A run in Python that needs no file and no network."""


def main(
    extras: Annotated[str, typer.Option(help="Extras to install and import, or all.")] = "",
    python: Annotated[str, typer.Option(help="The interpreter of the empty environment.")] = sys.executable,
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    try:
        chosen = choose_extras(extras)
        for fault in list_faults((ROOT / "CHANGELOG.md").read_text(), project):
            print(f"not ready: {fault}", file=sys.stderr)
        wheel = build_wheel()
    except InputError as error:
        raise SystemExit(f"error: {error}") from error
    try_wheel(wheel, chosen, python)
    print(list_commands(project, __version__))


def choose_extras(names: str) -> list[str]:
    """The extras of ``--extras``. Raises InputError for an unknown one."""
    chosen = list(IMPORTS) if names == "all" else [name for name in names.split(",") if name]
    if unknown := next((name for name in chosen if name not in IMPORTS), None):
        raise InputError(f"there is no extra {unknown!r}; choose one of {', '.join(IMPORTS)}, or all", name=unknown)
    return chosen


def list_faults(changelog: str, project: dict[str, Any]) -> list[str]:
    """What the owner must still do before the version is published."""
    found = []
    entry = re.search(rf"^## \[{re.escape(project['version'])}\] - (\S+)$", changelog, re.MULTILINE)
    if entry is None:
        found.append(f"CHANGELOG.md has no entry of {project['version']}; write one")
    elif entry[1] == "unreleased":
        found.append(f"CHANGELOG.md says that {project['version']} is unreleased; write the day, as 2026-12-01")
    if any("OWNER" in address for address in project["urls"].values()):
        found.append("the addresses in pyproject.toml name OWNER; write whose repository it is")
    return found


def build_wheel() -> Path:
    """``dist/`` anew: the source and the wheel, as PyPI takes them. Raises InputError for a changed tree."""
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    if changed.stdout:
        raise InputError("files differ from the commit; commit them, since a release is built of a commit", name="git")
    shutil.rmtree(DIST, ignore_errors=True)
    run([sys.executable, "-m", "build", "--outdir", str(DIST), str(ROOT)])
    run([sys.executable, "-m", "twine", "check", "--strict", *map(str, sorted(DIST.iterdir()))])
    return next(DIST.glob("*.whl"))


def try_wheel(wheel: Path, extras: Sequence[str], python: str) -> None:
    """Install the wheel where nothing else is, and run it from a folder that is not the repository."""
    shutil.rmtree(EMPTY, ignore_errors=True)
    run([python, "-m", "venv", str(EMPTY)])
    own = EMPTY / "bin"
    run([str(own / "python"), "-m", "pip", "install", "--quiet", str(wheel)])
    for words in TRIED:
        run([str(own / "mptk"), *words])
    run([str(own / "python"), "-c", MADE])
    for extra in extras:
        run([str(own / "python"), "-m", "pip", "install", "--quiet", f"{wheel}[{extra}]"])
        run([str(own / "python"), "-c", f"import {', '.join(IMPORTS[extra])}"])


def run(words: Sequence[str]) -> None:
    """Run a command in ``build/``. Its failure ends the release."""
    print("$", " ".join(words), flush=True)
    if subprocess.run(words, cwd=EMPTY.parent, check=False).returncode:
        raise SystemExit(f"error: this command failed: {' '.join(words)}")


def list_commands(project: dict[str, Any], version: str) -> str:
    """What the owner types to publish."""
    return f"""
mptk {version} is built and tried: {DIST.name}/. To publish it:

    git tag -a v{version} -m "mptk {version}" && git push origin v{version}
    python -m twine upload dist/*
    docker build -f docker/cpu.Dockerfile -t mptk:{version} . && docker run --rm mptk:{version} --version

{project["urls"]["Repository"]}/releases/new takes the entry of CHANGELOG.md as its text."""


if __name__ == "__main__":
    typer.run(main)
