"""What rules note about a call, for the functions that later cut it (``resize``) or ask where it is zero (``zero``)."""

from __future__ import annotations

from dataclasses import dataclass

from mptk.ir.axes import Term


@dataclass(frozen=True)
class Counted:
    """A number among the call's arguments counts the positions of ``term`` (groups, classes, bins)."""

    term: Term


@dataclass(frozen=True)
class Averaged:
    """A mean runs over ``terms``."""

    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Segments:
    """Dimension ``dim`` of the operand is cut in ``parts``, in order."""

    dim: int
    parts: tuple[Term, ...]


@dataclass(frozen=True)
class Picked:
    """The call reads known positions of dimension ``dim``; ``before`` is what lies before each."""

    dim: int
    before: tuple[Term, ...]


@dataclass(frozen=True)
class Repeated:
    """Each position of dimension ``dim`` of the result is repeated ``times``."""

    dim: int
    times: Term


@dataclass(frozen=True)
class Squeezed:
    """Dimensions ``gone`` of the operand, of size 1, are dropped. ``kept`` are the terms that have more positions."""

    gone: tuple[int, ...]
    kept: tuple[Term, ...]
