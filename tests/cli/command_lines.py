"""What a command line gives, and the files that it is about."""

from __future__ import annotations

import re
from typing import NamedTuple

SHORT = ["--method", "wanda", "--align", "8", "--samples", "4", "--length", "32"]


class Result(NamedTuple):
    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one line on stderr that is not progress."""
        (line,) = [line for line in self.stderr.splitlines() if not re.match(r" *\d+ s  |reading ", line)]
        return line


class Files(NamedTuple):
    model: str
    text: str
