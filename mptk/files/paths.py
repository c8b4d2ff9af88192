"""paths: names that users give, as paths."""

from __future__ import annotations

import os
from pathlib import Path

from mptk.errors import MptkError


def check_text(name: str | Path) -> None:
    """Raise MptkError for a name that no report and no recipe could hold, as they are UTF-8."""
    try:
        str(name).encode()
    except UnicodeEncodeError as error:
        raise MptkError(f"the name {str(name)!r} is not UTF-8, which reports and recipes are; rename it") from error


def path_of(name: str | Path) -> Path:
    """``name`` as a path, with ``~`` as a home. That of a user who is not there stays as it is, as in a shell."""
    return Path(os.path.expanduser(name))
