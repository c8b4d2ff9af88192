"""trust: whether a model's own Python code may run. Only the caller's word in this call lets it.

Functions that may load code take a ``Trust``, and no bool. Only ``trust_by_caller`` makes one that lets code run: from
the keyword ``trust_remote_code`` in Python and the option ``--trust-remote-code``. No file can hold one: it is not
written, and what is read by ``pickle`` lets no code run.
"""

from __future__ import annotations

from typing import final


@final
class Trust:
    """Whether code of a model may run. There are two of them; compare by identity or ask ``allows_code``."""

    __slots__ = ("_allows",)

    def __init__(self) -> None:
        self._allows = False

    @property
    def allows_code(self) -> bool:
        """Whether it may."""
        return self._allows

    def __repr__(self) -> str:
        return f"Trust(allows_code={self._allows})"

    def __copy__(self) -> Trust:
        return self

    def __deepcopy__(self, memo: object) -> Trust:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _give_no_code, ()  # another process, or a later one, hears the caller's word anew


NO_CODE = Trust()
"""No code of a model runs."""
_ALL_CODE = Trust()
_ALL_CODE._allows = True


def _give_no_code() -> Trust:
    return NO_CODE


def trust_by_caller(word: bool) -> Trust:
    """What the caller said in this call. ``word``: the value of ``trust_remote_code``.

    Raises:
        TypeError: it is no bool, as a value of a file may be.
    """
    if not isinstance(word, bool):
        raise TypeError(f"trust_remote_code is {type(word).__name__}, and must be a bool")
    return _ALL_CODE if word else NO_CODE
