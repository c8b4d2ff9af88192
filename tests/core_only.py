"""Run the core's tests on a copy of the tree without any feature: ``python tests/core_only.py [arguments of pytest]``.

It copies what git knows, without ``mptk/features`` and its tests. Files of tests that import a feature are left out, as
are tests marked with the features that they need (``conftest.py``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build" / "core"
SKIPPED = ("mptk/features/", "tests/features/", "tests/house/test_features.py", "tests/house/test_example_feature.py")
ONLY_THE_COPY = """import sys

# An editable installation finds modules of a package that the copy lacks.
sys.meta_path[:] = [each for each in sys.meta_path if "Editable" not in getattr(each, "__name__", "")]
"""


def main() -> int:
    shutil.rmtree(COPY, ignore_errors=True)
    known = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, known.split("\0")):
        if not name.startswith(SKIPPED) and (ROOT / name).is_file():
            (COPY / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, COPY / name)
    (COPY / "sitecustomize.py").write_text(ONLY_THE_COPY)
    command = [sys.executable, "-m", "pytest", *sys.argv[1:]]
    return subprocess.run(command, cwd=COPY, env=os.environ | {"PYTHONPATH": str(COPY)}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
