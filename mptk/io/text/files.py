"""files: the documents of a text file, of a table (json, jsonl, csv, tsv, parquet; also compressed), of a folder."""

from __future__ import annotations

import bz2
import codecs
import gzip
import importlib
import importlib.util
import json
import lzma
import os
import random
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from mptk.errors import DataError, FileError, MptkError, PackageError, list_close_names, take_first_line
from mptk.io.aside import ASIDE_PARTS, TextPart
from mptk.reading import Damaged, Json, parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Document = Iterable[str]
"""One text, in pieces."""

PIECE = 1 << 16
"""Characters that are read, or tokenised, at once."""
ASIDE_BLOCK = 1 << 13
"""Characters of a text file of a folder that are set aside at once: several windows of 512 tokens."""

# Ending of a table → the reader of ``datasets``; endings of compressed files; bytes that tell whether a file is text.
_TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
_PACKED = (".gz", ".bz2", ".xz", ".zst")
PLAIN_TEXT = (".txt", ".text", ".md", ".raw")
"""Endings of files that are text and nothing else."""
JSON_LINES = ".jsonl"
"""Ending of files that have an object a line, and nothing else."""
_SNIFFED = 4096


def read_file_documents(
    path: Path, column: str | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[Document]:
    """The documents of a file: each row of a table, or the text file as a whole. Nothing is read in full.

    Raises:
        MptkError: it cannot be read; as ``read_row_texts``; or a column is named and the file is not a table.
    """
    suffix = _find_suffix(path)
    if suffix not in _TABLES:
        if column is not None:
            raise DataError(f"{path} is plain text and has no column {column!r}; give only the file's name", name=path)
        yield _read_pieces(path)
        return
    # An empty file has no rows; some readers raise an error for it.
    if not path.stat().st_size:
        return
    from datasets import load_dataset  # takes time, and plain text needs none of it

    options = {"delimiter": "\t"} if suffix == ".tsv" else {}
    try:
        rows: Iterable[Mapping[str, object]]
        if _TABLES[suffix] == "json":
            rows = read_json_rows(path)
        else:
            rows = load_dataset(_TABLES[suffix], data_files=str(path), split="train", streaming=True, **options)
        for text in read_row_texts(rows, str(path), column, tokenizer):
            yield [text]
    except MptkError:
        raise
    except Exception as error:  # of the library of each format: they have no base class
        raise FileError(f"cannot read {path}: {with_cause(error)}; check that it is {suffix[1:]}", name=path) from error


def read_folder_documents(
    folder: Path,
    column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    characters: int | None = None,
    least: int = 0,
    seed: int = 0,
    part: TextPart | None = None,
) -> Iterator[Document]:
    """The documents of all text files and tables in a folder and below, without hidden ones.

    Args:
        characters: how much is wanted. Then files come in a random order, and each gives a share by its size, of at
            least ``least`` characters. If None, files come whole, in the order of their paths.
        part: only what is set aside to measure on, or only the rest: each fourth row or block of text. None: all.

    Raises:
        MptkError: as ``read_file_documents``; or there is no text.
    """
    files = list_text_files(folder)
    # All of it. A column is named for the tables among the files.
    if characters is None and part is None:
        for file in files:
            yield from read_file_documents(file, column if _find_suffix(file) in _TABLES else None, tokenizer)
        return
    # A part of each: in a random order, since the reader stops when it has enough.
    numbers = {file: number for number, file in enumerate(files)}
    random.Random(seed).shuffle(files)
    total = sum(file.stat().st_size for file in files) or 1
    for file in files:
        share = None if characters is None else max(least, characters * file.stat().st_size // total)
        named = column if _is_table(file) else None
        documents = read_file_documents(file, named, tokenizer) if _is_table(file) else iter([_read_pieces(file)])
        if part is not None:
            blocks = documents if _is_table(file) else (iter([piece]) for piece in _read_pieces(file, ASIDE_BLOCK))
            documents = _choose_part(blocks, part, numbers[file])
        yield from documents if share is None else _take_characters(documents, share)


def _choose_part(documents: Iterable[Document], part: TextPart, first: int) -> Iterator[Document]:
    """The documents that are set aside, or the others. ``first``: the number of the first one.

    Files begin with other numbers, so that of many files of one document some are set aside.
    """
    for number, document in enumerate(documents, first):
        if (number % ASIDE_PARTS == 0) == (part == "measured"):
            yield document


def list_text_files(folder: Path) -> list[Path]:
    """The tables in a folder and below, and the files that begin as UTF-8 text, in the order of their paths.

    Raises:
        MptkError: no file is text.
    """
    found = [file for file in list_visible_files(folder) if _find_suffix(file) in _TABLES or _is_text(file)]
    if not found:
        raise DataError(
            f"{folder} has no text in it; give a folder with text files or {', '.join(_TABLES)}", name=folder
        )
    return found


def has_text(folder: Path) -> bool:
    """Whether a folder has ``list_text_files``."""
    return any(_find_suffix(file) in _TABLES or _is_text(file) for file in list_visible_files(folder))


def list_visible_files(folder: Path) -> list[Path]:
    """The files in a folder and below that are not hidden, in the order of their paths."""
    inside = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return [f for f in inside if not any(part.startswith(".") for part in f.relative_to(folder).parts)]


def _find_suffix(path: Path) -> str:
    """The file's suffix in lower case; if it is compressed, the suffix before that: ``a.jsonl.gz`` → ``.jsonl``."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _PACKED else suffix


def _is_table(path: Path) -> bool:
    """Whether a file of a folder is a table. A ``.json`` file is one if it is a list or has an object a line."""
    suffix = _find_suffix(path)
    if suffix != ".json" or path.suffix.lower() in _PACKED:
        return suffix in _TABLES
    # One object over many lines, such as a config.json, is text.
    with path.open(encoding="utf-8", errors="replace") as file:
        start = file.read(PIECE).lstrip()
    if start.startswith("["):
        return True
    try:
        return isinstance(json.loads(start.partition("\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(_SNIFFED)
    try:
        # Not final if there is more: the last letter may be cut in two.
        codecs.getincrementaldecoder("utf-8")().decode(start, final=len(start) < _SNIFFED)
    except UnicodeDecodeError:
        return False
    return b"\0" not in start


def check_plain_text(path: Path) -> None:
    """Raise MptkError if a text file is empty, or begins as no UTF-8 text does."""
    if not path.stat().st_size:
        raise DataError(f"{path} holds no text; give a file, folder or dataset with some", name=path)
    if os.access(path, os.R_OK) and not _is_text(path):
        raise FileError(f"{path} is not UTF-8 text; convert it, or give a .parquet file", name=path)


def _read_pieces(path: Path, size: int = PIECE) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            while piece := file.read(size):
                yield piece
    except UnicodeDecodeError as error:
        raise FileError(
            f"{path} is not UTF-8 text ({error.reason}); convert it, or give a .parquet file", name=path
        ) from error
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror}; check its rights", name=path) from error


def _take_characters(documents: Iterable[Document], characters: int) -> Iterator[Document]:
    """Documents until ``characters`` were taken from them; the last one is cut off."""
    left = characters

    def take_pieces(document: Document) -> Iterator[str]:
        nonlocal left
        for piece in document:
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                return

    for document in documents:
        yield take_pieces(document)
        if left <= 0:
            return


def list_texts(documents: Iterable[Document]) -> Iterator[str]:
    """The texts that are not blank: rows of a table, which are lists; lines of a text file, which comes in pieces."""
    for document in documents:
        if isinstance(document, list):
            yield from (text for text in document if text.strip())
            continue
        rest = ""
        for piece in document:
            *lines, rest = f"{rest}{piece}".split("\n")
            yield from (line for line in lines if line.strip())
        if rest.strip():
            yield rest


def check_ordinary(path: Path) -> None:
    """Raise MptkError if a path is neither a file nor a folder: text is read more than once, and has an end."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise FileError(f"{path} is not an ordinary file; write the text to one and give that", name=path)


def with_cause(error: BaseException) -> str:
    """The first line of an error and, in brackets, of its cause."""
    said, cause = take_first_line(error), error.__cause__
    return f"{said} ({with_cause(cause)})" if isinstance(cause, Exception) and str(cause) not in str(error) else said


# ---- the rows of a JSON file ----

# Bytes of the longest line, and of the largest file that is one list: they are parsed as a whole.
LONGEST_LINE = 1 << 28


def read_json_rows(path: Path) -> Iterator[Json]:
    """The rows of a JSON file, which may be compressed: an object a line, one at a time, or a list of objects.

    Raises:
        MptkError: a line is not an object.
    """
    # Not by ``datasets``: the readers of pyarrow, which it calls, crash the process on a line that is a number.
    number = 0

    def make_error(why: str) -> MptkError:
        return FileError(f'{path}, line {number}: {why}; write an object a line, as {{"text": "…"}}', name=path)

    with _open_unpacked(path) as file:
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise make_error(f"it has more than {LONGEST_LINE >> 20} MB")
            # An object a line never begins with a bracket.
            if number == 1 and line.lstrip()[:1] == b"[":
                yield from _read_list(line, file.read, make_error)
                return
            if line.strip():
                yield _check_object(_decode_json(line, make_error), make_error)


def _open_unpacked(path: Path) -> BinaryIO:
    """The file, unpacked as it is read."""
    suffix = path.suffix.lower()
    if suffix == ".zst" and importlib.util.find_spec("zstandard") is None:
        raise PackageError(
            f"zstandard is not installed, and it unpacks {path}; run: pip install zstandard", name="zstandard"
        )
    openers: dict[str, Callable[[Path, str], object]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    opener = importlib.import_module("zstandard").open if suffix == ".zst" else openers.get(suffix, open)
    return cast("BinaryIO", opener(path, "rb"))


def _read_list(start: bytes, read: Callable[[int], bytes], damaged: Damaged) -> Iterator[Json]:
    """The rows of a file that is a list."""
    content = start + read(LONGEST_LINE + 1 - len(start))
    if len(content) > LONGEST_LINE:
        raise damaged(f"the list has more than {LONGEST_LINE >> 20} MB")
    rows = _decode_json(content, damaged)
    for row in rows if isinstance(rows, list) else [rows]:
        yield _check_object(row, damaged)


def _decode_json(content: bytes, damaged: Damaged) -> object:
    try:
        return parse_json(content.decode("utf-8"), damaged)
    except UnicodeDecodeError as error:
        raise damaged("it is not UTF-8") from error


def _check_object(row: object, damaged: Damaged) -> Json:
    if not isinstance(row, dict):
        raise damaged(f"it holds {type(row).__name__}, and no object with columns")
    return row


# ---- the text of a table's rows: a column of strings, or a column of chats through the tokenizer's template ----

# Usual names of a column of chats.
CHATS = ("messages", "conversations", "conversation")
# The roles of the ShareGPT format → the names that templates know.
_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}


def read_row_texts(
    rows: Iterable[Mapping[str, Any]], source: str, column: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str]:
    """The text of each row.

    ``column``: by default ``text``, else a chat column of a usual name, else the only column of strings, else the only
    column of chats.

    Raises:
        MptkError: there is no such column, or more than one could be meant; a value is neither text nor a chat; or the
            tokenizer has no chat template.
    """
    from mptk.io.chat_templates import ChatTemplate  # it imports transformers

    chosen: str | None = None
    # Templates begin a chat with it, but here each window gets one.
    begin = getattr(tokenizer, "bos_token", None) or ""
    with ChatTemplate(tokenizer) as template:
        for row in rows:
            chosen = chosen or _choose_column(row, source, column)  # the first row decides for all
            value = row.get(chosen)
            if value is None:
                continue
            if isinstance(value, str):
                yield value
            elif _is_chat(value):
                check_has_template(tokenizer, source)
                text = template.render(with_roles(value), f"a chat of {source}", "name a column of text as FILE:COLUMN")
                yield text.removeprefix(begin)
            else:
                raise DataError(
                    f"{chosen} of {source} holds {type(value).__name__}; a column of text has strings, one of chats "
                    "has lists of {role, content}",
                    name=source,
                )


def _choose_column(row: Mapping[str, object], source: str, column: str | None) -> str:
    if column is not None:
        if column not in row:
            raise DataError(
                f"{source} has no column {column!r}; it has {', '.join(row)}",
                name=source,
                nearest=list_close_names(column, row, cutoff=0),
            )
        return column
    strings = [name for name, value in row.items() if isinstance(value, str)]
    chats = [name for name, value in row.items() if _is_chat(value)]
    usual = [name for name in CHATS if name in chats]
    for found in (["text"] if "text" in strings else [], usual[:1], strings or chats):
        if len(found) == 1:
            return found[0]
    # More than one could be meant, or none: never a guess.
    if not strings and not chats:
        raise DataError(
            f"{source} has no columns of strings ({', '.join(row)}); give a file with text in it", name=source
        )
    raise DataError(
        f"{source} has {len(strings or chats)} columns of {'strings' if strings else 'chats'} "
        f"({', '.join(strings or chats)}); name the one to use, as {source}:{(strings or chats)[0]}",
        name=source,
        nearest=strings or chats,
    )


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, Mapping) and ({"role", "content"} <= turn.keys() or "from" in turn) for turn in value)
    )


def check_has_template(tokenizer: PreTrainedTokenizerBase | None, source: str) -> None:
    """Raise MptkError if there is no template for the chats of ``source``."""
    if tokenizer is None or not tokenizer.chat_template:
        raise DataError(
            f"{source} holds chats, but the model's tokenizer has no chat template; name a column of text, FILE:COLUMN",
            name=source,
        )


def with_roles(turns: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A chat with ``role`` and ``content``, also if it has ShareGPT's ``from`` and ``value``."""
    return [
        {"role": turn["role"], "content": turn["content"]}
        if "role" in turn
        else {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn.get("value", "")}
        for turn in turns
    ]
