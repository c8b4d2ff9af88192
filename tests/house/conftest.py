"""One place where the product and both examples are installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def install_all(site: Path) -> None:
    """Install mptk and the examples into a folder, without what they depend on. Their sources stay as they are."""
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    with tempfile.TemporaryDirectory() as place:
        source = Path(place)
        for package in ("mptk", "passes"):
            shutil.copytree(ROOT / package, source / "product" / package, ignore=ignored)
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, source / "product")
        for example in ("plugin", "feature"):
            shutil.copytree(ROOT / "examples" / example, source / example, ignore=ignored)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        subprocess.run([*command, "--target", str(site), *map(str, source.iterdir())], check=True)


@pytest.fixture(scope="session")
def site(laboratory):
    """A folder with mptk and both examples, as pip installs them. To be read only."""
    return laboratory.keep("site", install_all)
