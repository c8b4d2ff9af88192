"""conform: check values read from a file against types: dataclasses, typed dicts, lists, numbers."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel

Made = TypeVar("Made")
KINDS_IN_WORDS: Mapping[type, str] = {list: "a list", dict: "an object"}
LONGEST = 80
"""Letters of a value or of a name in a message."""


def made(kind: type[Made], values: object, where: str = "") -> Made:
    """Make a dataclass or a typed dict of values read from JSON. A dataclass ignores names that it lacks.

    No value is converted (``"3"`` is not a number, ``true`` not an integer), but an int may stand for a float.

    Raises:
        ValueError: a field is missing or not of its type; the message names it.
    """
    from pydantic import ValidationError

    try:
        held = _holding(kind)  # type: ignore[arg-type]
        found = held.model_validate_json(json.dumps({"content": values}, default=asdict))
    except ValidationError as error:
        raise ValueError(_said(error.errors()[0], where)) from error
    content: Made = found.content  # type: ignore[attr-defined]
    return content


@functools.cache
def _holding(kind: Any) -> type[BaseModel]:
    """A pydantic model with one field of type ``kind``: a standard dataclass in it obeys the model's rules."""
    from pydantic import ConfigDict, create_model

    return create_model("File", __config__=ConfigDict(strict=True, allow_inf_nan=False), content=(kind, ...))


def _said(error: Mapping[str, Any], where: str) -> str:
    """Say in mptk's words what pydantic's ``error`` describes."""
    place = ".".join(brief(str(part)) for part in ([where] if where else []) + list(error["loc"][1:]))
    kind, value, message = error["type"], error["input"], error["msg"]
    if kind in ("missing", "extra_forbidden"):
        return f"{place} is {'missing' if kind == 'missing' else 'unknown'}"
    if kind == "value_error":
        return f"{place}: {message.removeprefix('Value error, ')}".removeprefix(": ")
    plain = isinstance(value, int | float | str | None)
    shown = json.dumps(value, ensure_ascii=False) if plain else KINDS_IN_WORDS[type(value)]
    return f"{place or 'it'} is {brief(shown)} and {message.removeprefix('Input ')}"


def brief(text: str, most: int = LONGEST) -> str:
    """``text``, cut to ``most`` letters."""
    return text if len(text) <= most else f"{text[:most]}…"
