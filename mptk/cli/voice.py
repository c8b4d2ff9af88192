"""voice: how much a command says. ``-q`` and ``-v`` of each command set it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Voice:
    """``quiet``: no progress. ``verbose``: each pass's difference, and the traceback of an error."""

    quiet: bool = False
    verbose: bool = False


VOICE = Voice()
