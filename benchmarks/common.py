"""What all benchmarks write: one JSON file with the machine, the versions, the commit and the date beside the rows."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from mptk.files import write_text

ROOT = Path(__file__).parents[1]
PACKAGES = ("mptk", "torch", "transformers", "onnx", "onnxruntime", "onnxscript", "peft", "torch-pruning")


def result_header() -> dict[str, Any]:
    return {
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "memory_gib": _memory_gib(), "system": platform.system()},
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write_result(path: Path, header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``{**header, "rows": rows}``, whole or not at all. A row without a commit is of the header's."""
    dated = [{**row, "commit": row.get("commit", header["commit"])} for row in rows]
    write_text(path, json.dumps({**header, "rows": dated}, indent=1) + "\n")


def limit_memory(more: int) -> None:
    """Refuse this process memory beyond what it has and ``more`` bytes: a fork begins with its parent's."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit, with "-dirty" if code was changed since. Pages and results are no code: a benchmark writes them."""
    commit = _ask_git("rev-parse", "--short=8", "HEAD")
    changed = _ask_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!*.md")
    return f"{commit or 'unknown'}{'-dirty' if changed else ''}"


def _ask_git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
