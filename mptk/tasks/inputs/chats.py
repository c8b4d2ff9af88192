"""chats: chats with images: a folder with captions as ``datasets`` reads it, or a table of chats."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

from mptk.errors import DataError, FileError
from mptk.files import expand_path
from mptk.io import CHATS, ChatTemplate, has_text, read_json_rows

METADATA = ("metadata.jsonl", "metadata.csv")
"""Names of the file of captions in a folder of images."""
TABLES = (".jsonl", ".json")
"""Suffixes of a table of chats."""
FILE = "file_name"
"""The column of images in a file of captions, relative to the folder."""
IMAGES = "images"
"""The column of a chat's images, if its turns do not name them."""


@dataclass(frozen=True)
class Chat:
    """Turns of {role, content}, whose content is a list of {type: text, text} and {type: image}.

    ``images``: the files of the images, in their order. ``where``: the row that it is from, for errors.
    """

    turns: list[dict[str, Any]]
    images: list[Path]
    where: str

    @property
    def caption(self) -> str:
        """The texts of all turns."""
        return " ".join(part["text"] for turn in self.turns for part in turn["content"] if part["type"] == "text")

    def render(self, processor: ProcessorMixin, template: ChatTemplate, *, asks: bool = False) -> str:
        """The chat as ``template``, the processor's, writes it; without one its texts, after the token of each image.

        ``asks``: the template goes on to where the answer begins.
        """
        if getattr(processor, "chat_template", None):
            return template.render(self.turns, self.where, "change the chat", add_generation_prompt=asks)
        token = getattr(processor, "boi_token", None) or getattr(processor, "image_token", "<image>")
        parts = [part for turn in self.turns for part in turn["content"]]
        return "\n".join(part["text"] if part["type"] == "text" else str(token) for part in parts)


def read_chats(data: str) -> list[Chat]:
    """The chats of ``data``: a folder of images with ``metadata.csv`` or ``metadata.jsonl``, or a .jsonl of chats."""
    place = expand_path(data)
    if place.is_dir():
        found = list(_read_captions(place))
    elif place.is_file() and place.suffix in TABLES:
        found = [_read_chat(row, place.parent, f"row {i} of {data}") for i, row in enumerate(read_json_rows(place), 1)]
    else:
        raise DataError(
            f"this model reads images with text, and {data} is neither a folder of images with {' or '.join(METADATA)} "
            "nor a .jsonl file of chats; give one with --data, or random",
            name=data,
        )
    if not found:
        raise DataError(f"{data} holds no images with text; give a folder or a file with some", name=data)
    return found


def has_images(data: str) -> bool:
    """Whether ``data`` is images with text: a folder with captions or without any text, or a table of such chats."""
    place = expand_path(data)
    if place.is_dir():
        return any((place / name).is_file() for name in METADATA) or not has_text(place)
    if not place.is_file() or place.suffix not in TABLES:
        return False
    row = next(iter(read_json_rows(place)), {})
    turns: list[object] = next((row[name] for name in CHATS if isinstance(row.get(name), list)), [])
    parts = [part for turn in turns if isinstance(turn, Mapping) for part in _list_parts(turn.get("content"))]
    return bool(row.get(IMAGES)) or any(part.get("type") == "image" for part in parts)


def _list_parts(content: object) -> list[Mapping[str, object]]:
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []


def _read_captions(folder: Path) -> Iterator[Chat]:
    """A chat for each caption: the user shows the image, the assistant says the caption."""
    file = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if file is None:
        raise DataError(
            f"{folder} has no {' or '.join(METADATA)} with captions; write one with the column {FILE}", name=folder
        )
    for number, row in enumerate(_read_rows(file), 1):
        where = f"row {number} of {file}"
        # The column of captions may have any name, so it must be the only one with text.
        texts = [name for name, value in row.items() if name != FILE and isinstance(value, str)]
        if len(texts) != 1 or not isinstance(row.get(FILE), str):
            raise DataError(
                f"{where} needs {FILE} and one column of text; it has {', '.join(map(str, row))}", name=where
            )
        said = {"role": "assistant", "content": [{"type": "text", "text": row[texts[0]]}]}
        turns = [{"role": "user", "content": [{"type": "image"}]}, said]
        yield Chat(turns, [_resolve_image(folder, row[FILE], where)], where)


def _read_rows(file: Path) -> Iterable[Mapping[str, Any]]:
    if file.suffix == ".jsonl":
        yield from read_json_rows(file)
        return
    with file.open(encoding="utf-8", newline="") as opened:
        yield from csv.DictReader(opened)


def _read_chat(row: Mapping[str, Any], folder: Path, where: str) -> Chat:
    """A row with turns, whose images are named in the turns or in a column beside them."""
    turns = next((row[name] for name in CHATS if isinstance(row.get(name), list)), None)
    if turns is None or not all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in turns):
        raise DataError(
            f"{where} has no chat: a list of {{role, content}} in a column {' or '.join(CHATS)}", name=where
        )
    # Images without a name in the turns are those of the column, in their order.
    named = list(row.get(IMAGES) or [])
    plain, images = [], list[Path]()
    for turn in turns:
        content = turn["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part.get("type") == "image":
                name = part.get("path") or part.get("image") or part.get("url") or (named.pop(0) if named else None)
                if not isinstance(name, str):
                    raise DataError(
                        f'{where} has an image without a file; name it as {{"type": "image", "path": …}}', name=where
                    )
                images.append(_resolve_image(folder, name, where))
        # A template gets only what it may write: text, and where an image is.
        shown = [part if part.get("type") == "text" else {"type": "image"} for part in parts]
        plain.append({"role": turn["role"], "content": shown})
    if not images:
        raise DataError(f'{where} has no image; put {{"type": "image", "path": …}} into a turn', name=where)
    return Chat(plain, images, where)


def _resolve_image(folder: Path, name: str, where: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise FileError(f"{where} names {name}, and there is no such file in {folder}; check the path", name=name)
    return path
