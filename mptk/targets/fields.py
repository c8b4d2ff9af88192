"""fields: JSON that other programs read, field by field against what the dense model and the plan give."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from typing import Any, NoReturn

from mptk.errors import ProofError

STAGE = "config"
MISSING = object()
LISTED = 8
"""A longer list is compared element by element, so that the first that differs is named."""
SHOWN = 60
"""Characters of a value that an error shows."""
Json = Mapping[str, object]


def compare(file: str, found: Json, expected: Json, listed: Set[str] = frozenset()) -> None:
    """All fields must be equal, except the ``listed`` ones and those nested in them.

    Raises:
        ProofError: one is not; it names the file and the field.
    """
    one, other = dict(leaves(found)), dict(leaves(expected))
    for path in sorted(one.keys() | other.keys()):
        if not any(path == name or path.startswith(f"{name}.") for name in listed):
            require(file, path, one.get(path, MISSING), other.get(path, MISSING))


def require(file: str, field: str, found: object, expected: object) -> None:
    """Raise ProofError unless a field has the value, and the type, that is expected."""
    if type(found) is not type(expected) or found != expected:
        fail(f"{field} of {file} is {_said(found)}, but {_said(expected)} in the dense model cut to the plan")


def fail(what: str) -> NoReturn:
    """Raise the ProofError of this stage."""
    raise ProofError(f"the proof fails at '{STAGE}': {what}; do not use it, and prune the model again")


def leaves(body: Json, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted path → value of each field that is not an object with fields of its own."""
    for key, value in body.items():
        inner = _inner(value)
        if inner:
            yield from leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _inner(value: Any) -> Json:
    """The fields of an object, and of a long list or one of objects; empty if there are none."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list) and (len(value) > LISTED or any(isinstance(each, Mapping) for each in value)):
        return dict(zip(map(str, range(len(value))), value, strict=True))
    return {}


def _said(value: object) -> str:
    text = "missing" if value is MISSING else json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
