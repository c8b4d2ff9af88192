"""paths: names that users give, as paths."""

from __future__ import annotations

import os
from pathlib import Path


def path_of(name: str | Path) -> Path:
    """``name`` as a path, with ``~`` as a home. That of a user who is not there stays as it is, as in a shell."""
    return Path(os.path.expanduser(name))
