"""notes: the notes of rules about a call, for its ``resize`` and ``zero`` functions."""

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
    """Dimension ``dim`` of the operand is cut into ``parts``, in order."""

    dim: int
    parts: tuple[Term, ...]


@dataclass(frozen=True)
class Picked:
    """The call reads known positions of dimension ``dim``. ``before``: the terms before each."""

    dim: int
    before: tuple[Term, ...]


@dataclass(frozen=True)
class Repeated:
    """Each position of dimension ``dim`` of the result is repeated ``times``."""

    dim: int
    times: Term


@dataclass(frozen=True)
class Squeezed:
    """Dimensions ``gone`` of the operand, of size 1, are dropped. ``kept``: the terms with more positions."""

    gone: tuple[int, ...]
    kept: tuple[Term, ...]
