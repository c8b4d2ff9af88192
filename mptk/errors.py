"""Errors that a user can act on."""

from __future__ import annotations


class MptkError(Exception):
    """A user-facing error: one line that names the cause and the remedy. The command line prints it and exits 1."""


class ProofError(MptkError):
    """A result is not what it must be: an error of mptk's own, or of a file that was changed. Nothing is published."""
