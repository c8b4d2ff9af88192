"""trust: whether a model's own Python code may run. Only the caller decides, anew in each call.

Functions that may load code take a ``Trust`` and not a bool, so that a value from a file cannot pass for consent. Only
``trust_by_caller`` makes one that allows code: from the keyword ``trust_remote_code`` in Python and the option
``--trust-remote-code``. No file can hold one: it is not written, and what ``pickle`` reads allows no code.
"""

from __future__ import annotations

from typing import final


@final
class Trust:
    """Whether code of a model may run. There are two instances: ``NO_CODE`` and one that allows code."""

    __slots__ = ("_allows",)

    # The constructor takes no argument, so that code cannot be allowed by ``Trust(value_from_a_file)``.
    def __init__(self) -> None:
        self._allows = False

    @property
    def allows_code(self) -> bool:
        """Whether code may run."""
        return self._allows

    def __repr__(self) -> str:
        return f"Trust(allows_code={self._allows})"

    # There are only two instances, so a copy is one of them.
    def __copy__(self) -> Trust:
        return self

    def __deepcopy__(self, memo: object) -> Trust:
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _give_no_code, ()  # another process must be told by its own caller


NO_CODE = Trust()
"""No code of a model runs."""
_ALL_CODE = Trust()
_ALL_CODE._allows = True


def _give_no_code() -> Trust:
    return NO_CODE


def trust_by_caller(word: bool) -> Trust:
    """The trust that the caller gives in this call. ``word``: the value of ``trust_remote_code``.

    Raises:
        TypeError: ``word`` is not a bool: text such as ``"false"`` from a file would count as true.
    """
    if not isinstance(word, bool):
        raise TypeError(f"trust_remote_code is {type(word).__name__}, and must be a bool")
    return _ALL_CODE if word else NO_CODE
