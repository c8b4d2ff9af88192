"""reading: read files of unknown origin: within bounds of time and memory, in their folder, of the expected types."""

from __future__ import annotations

import functools
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from mptk.errors import FileError, MptkError

if TYPE_CHECKING:
    from pydantic import BaseModel

Made = TypeVar("Made")
Json = dict[str, Any]
"""An object of a JSON file."""
KINDS_IN_WORDS: Mapping[type, str] = {list: "a list", dict: "an object"}
LONGEST = 80
"""Most letters of a value or a name in a message: a file of others may hold a megabyte in one string."""


def make_typed(kind: type[Made], values: object, where: str = "") -> Made:
    """A dataclass or a typed dict of values that were read from JSON. A dataclass ignores names that it lacks.

    No value is converted (``"3"`` is not a number, ``true`` not an integer), but an int may stand for a float.
    ``where``: the place of ``values`` in the file, for messages.

    Raises:
        ValueError: a field is missing or not of its type; the message names it.
    """
    from pydantic import ValidationError

    try:
        held = _make_model(kind)  # type: ignore[arg-type]
        # Through JSON text: pydantic's strict mode then takes a list for a tuple, as JSON has only lists.
        found = held.model_validate_json(json.dumps({"content": values}, default=asdict))
    except ValidationError as error:
        raise ValueError(_describe_error(error.errors()[0], where)) from error
    content: Made = found.content  # type: ignore[attr-defined]
    return content


@functools.cache  # building one takes longer than using it
def _make_model(kind: Any) -> type[BaseModel]:
    """A pydantic model with one field of type ``kind``: a standard dataclass in it obeys the model's config."""
    from pydantic import ConfigDict, create_model

    return create_model("File", __config__=ConfigDict(strict=True, allow_inf_nan=False), content=(kind, ...))


def _describe_error(error: Mapping[str, Any], where: str) -> str:
    """pydantic's ``error`` in mptk's words. The path begins with ``content``, the field of ``_make_model``."""
    place = ".".join(shorten_text(str(part)) for part in ([where] if where else []) + list(error["loc"][1:]))
    kind, value, message = error["type"], error["input"], error["msg"]
    if kind in ("missing", "extra_forbidden"):
        return f"{place} is {'missing' if kind == 'missing' else 'unknown'}"
    if kind == "value_error":
        return f"{place}: {message.removeprefix('Value error, ')}".removeprefix(": ")
    plain = isinstance(value, int | float | str | None)
    shown = json.dumps(value, ensure_ascii=False) if plain else KINDS_IN_WORDS[type(value)]
    return f"{place or 'it'} is {shorten_text(shown)} and {message.removeprefix('Input ')}"


def shorten_text(text: str, most: int = LONGEST) -> str:
    """``text``, cut to ``most`` letters."""
    return text if len(text) <= most else f"{text[:most]}…"


MOST_BYTES = 1 << 26
"""Largest JSON file that is read, in bytes: a large model's report or plan has a hundredth of it."""
MOST_DEPTH = 64
"""Deepest nesting of objects and lists: code that walks a file may recurse without a check of its own."""
Damaged = Callable[[str], MptkError]
"""Text that says what is wrong with a file → the error to raise."""


def make_damage_error(file: Path, remedy: str = "download or export the model again") -> Damaged:
    """A function that makes the error for a file of what is wrong with it."""
    return lambda why: FileError(f"{file} is damaged: {why}; {remedy}", name=file)


def check_regular(file: Path, most: int | None = None) -> None:
    """Refuse pipes and devices, which could block or never end, and files above ``most`` bytes."""
    try:
        state = file.stat()
    except OSError as error:
        raise make_damage_error(file)(f"it cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(state.st_mode):
        raise make_damage_error(file)("it is not an ordinary file")
    if most is not None and state.st_size > most:
        raise make_damage_error(file)(f"it has {state.st_size >> 20} MB")


def read_bytes(path: Path, damaged: Damaged, most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file. Raises ``damaged`` for any other, or if it cannot be read or exceeds ``most``."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            # Of the open file, not of its name: the name may lead elsewhere a moment later.
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise damaged("it is not a regular file")
            # A read takes the memory of what it asks for, so it asks for the size first. That may lie, as in /proc, or
            # grow: a second read asks for the rest.
            content = file.read(min(state.st_size, most) + 1)
            if state.st_size < len(content) <= most:
                content += file.read(most + 1 - len(content))
    except OSError as error:
        raise damaged(str(error.strerror or error)) from error
    except ValueError as error:  # a null character in the name
        raise damaged(str(error)) from error
    if len(content) > most:
        raise damaged(f"it has more than {most >> 20} MB")
    return content


def read_text(path: Path, damaged: Damaged, most: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file; errors as in ``read_bytes``."""
    try:
        return read_bytes(path, damaged, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise damaged("it is not UTF-8 text") from error


def read_json(path: Path, damaged: Damaged) -> Any:
    """The content of a JSON file. It refuses NaN, infinity and nesting deeper than ``MOST_DEPTH``."""
    return parse_json(read_text(path, damaged), damaged)


def read_json_object(path: Path, damaged: Damaged) -> Json:
    """The content of a JSON file that holds an object."""
    content = read_json(path, damaged)
    if not isinstance(content, dict):
        raise damaged("it is not an object")
    return content


def read_as(kind: type[Made], path: Path, damaged: Damaged) -> Made:
    """The content of a JSON file as a ``kind`` (``make_typed``)."""
    try:
        return make_typed(kind, read_json(path, damaged))
    except ValueError as error:
        raise damaged(str(error)) from error


def parse_json(text: str, damaged: Damaged) -> Any:
    """``text`` as JSON, within the same bounds."""
    try:
        content = json.loads(text, parse_constant=_refuse_number)  # Python's parser takes NaN and Infinity otherwise
    except json.JSONDecodeError as error:
        # Of a line of a file the number is known already, and another one beside it would confuse.
        line = f"line {error.lineno}: " if "\n" in text.strip() else ""
        raise damaged(f"it is not JSON ({line}{error.msg})") from error
    except ValueError as error:  # NaN, or an integer of more digits than Python reads
        raise damaged(f"it is not JSON ({str(error).partition(';')[0]})") from error
    except RecursionError as error:
        raise damaged("it is nested too deep") from error
    if _measure_depth(content) > MOST_DEPTH:
        raise damaged("it is nested too deep")
    # Half of a surrogate pair can only be written as an escape (\ud800), and fails much later, when it is printed.
    if "\\ud" in text.lower() and not _is_text(content):
        raise damaged("it has half of a surrogate pair")
    return content


def _is_text(content: object) -> bool:
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _measure_depth(content: object) -> int:
    """How deep objects and lists are nested, up to ``MOST_DEPTH`` + 1: level by level, as recursion could fail."""
    level: list[object] = [content]
    for depth in range(MOST_DEPTH + 1):
        level = [inner for outer in level for inner in _list_inner(outer)]
        if not level:
            return depth
    return MOST_DEPTH + 1


def _list_inner(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; a named pipe without waiting for somebody to write into it. Windows has no such flag."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


# ---- what leads out of a folder ----


def check_inside(folder: Path) -> None:
    """Raise MptkError if a link or a shard index in a checkpoint folder leads out of the folder.

    A snapshot in the hub's cache may link to its own model's files there.
    """
    home = folder.resolve()
    homes = [home, *([home.parent.parent] if home.parent.name == "snapshots" else [])]
    for entry in sorted(folder.iterdir()):
        # A link is how a folder from a stranger would make mptk read, and publish, another file of this machine.
        if entry.is_symlink() and not any(_follow_link(entry).is_relative_to(place) for place in homes):
            raise FileError(
                f"{entry} is a link to {_follow_link(entry)}, outside of its folder; put the file itself there",
                name=entry,
            )
    for index in sorted(folder.glob("*.index.json")):
        _check_shards(index)


def _follow_link(link: Path) -> Path:
    """Where a link leads. For a circle of links Python before 3.13 raises an error; later versions stop at a link."""
    circle = FileError(f"{link} is a link that leads in a circle; put the file itself there", name=link)
    try:
        end = link.resolve()
    except (OSError, RuntimeError) as error:
        raise circle from error
    if end.is_symlink():
        raise circle
    return end


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a null character
        return False


def _check_shards(index: Path) -> None:
    wrong = make_damage_error(index, "download the model again")
    content = read_json(index, wrong)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise wrong("it lacks weight_map, which maps weights to files")
    for name in sorted(set(shards.values())):
        if name != Path(name).name or name in ("", ".", ".."):
            raise FileError(f"{index} names {name}, which is outside of its folder; do not use this model", name=index)
        if not _is_file(index.parent / name):
            raise wrong(f"it names {name[:80]}, which does not exist")
