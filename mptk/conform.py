"""conform: whether a value that was read from a file is what a type says: dataclasses, typed dicts, lists, numbers."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypeVar, Union, get_args, get_origin, get_type_hints

Made = TypeVar("Made")


def misfit(value: object, hint: Any, where: str = "") -> str | None:
    """What of ``value`` is not as ``hint`` says, and where; None if all is. A whole number may stand for a float."""
    if hint is Any or hint is object:
        return None
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is NotRequired:
        return misfit(value, arguments[0], where)
    if origin in (Union, types.UnionType):
        return None if any(misfit(value, each, where) is None for each in arguments) else _wrong(value, where)
    if origin is Literal:
        return None if value in arguments else _wrong(value, where)
    if typing.is_typeddict(hint):
        return _fields(value, get_type_hints(hint, include_extras=True), where)
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return _first(
            misfit(getattr(value, f.name, None), hints[f.name], _within(where, f.name))
            for f in dataclasses.fields(hint)
        )
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            return _wrong(value, where)
        return _first(
            misfit(k, arguments[0], where) or misfit(v, arguments[1], _within(where, k)) for k, v in value.items()
        )
    if origin is not None and issubclass(origin, Sequence):
        if not isinstance(value, list | tuple):
            return _wrong(value, where)
        return _first(misfit(each, arguments[0], _within(where, i)) for i, each in enumerate(value))
    kind = int | float if hint is float else types.NoneType if hint is None else hint
    right = isinstance(value, kind) and (hint is bool or not isinstance(value, bool))
    if hint is float and isinstance(value, int):  # of any number of digits
        right = right and abs(value) <= sys.float_info.max
    return None if right else _wrong(value, where)


def made(kind: type[Made], values: object, where: str) -> Made:
    """A dataclass of ``values``, whose other names are left out.

    Raises:
        ValueError: a field is missing, or is not of its type; with its name.
    """
    if not isinstance(values, Mapping):
        raise ValueError(_wrong(values, where))
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    named = {f.name: values[f.name] for f in fields if f.name in values}
    needed = [f for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    lacking = [f.name for f in needed if f.name not in named]
    if lacking:
        raise ValueError(f"{_within(where, lacking[0])} is missing")
    hints = get_type_hints(kind)
    wrong = _first(misfit(value, hints[name], _within(where, name)) for name, value in named.items())
    if wrong is not None:
        raise ValueError(wrong)
    return kind(**named)


def _fields(value: object, hints: Mapping[str, Any], where: str) -> str | None:
    if not isinstance(value, Mapping):
        return _wrong(value, where)
    for name, hint in hints.items():
        if name not in value and get_origin(hint) is not NotRequired:
            return f"{_within(where, name)} is missing"
    return _first(misfit(value[name], hint, _within(where, name)) for name, hint in hints.items() if name in value)


def _first(found: typing.Iterable[str | None]) -> str | None:
    return next((wrong for wrong in found if wrong is not None), None)


def _within(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)


def _wrong(value: object, where: str) -> str:
    said = repr(value) if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"
    return f"{where or 'it'} is {said if len(said) <= 40 else said[:40] + '…'}"
