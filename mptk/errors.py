"""Errors that a user can act on."""

from __future__ import annotations


class MptkError(Exception):
    """A user-facing error: one line that names the cause and the remedy. The command line prints it and exits 1."""
