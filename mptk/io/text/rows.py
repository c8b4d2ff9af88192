"""rows: the text of a table's rows: a column of strings, or a column of chats through the tokenizer's template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from mptk.errors import MptkError
from mptk.io.chat_templates import ChatTemplate

CHATS = ("messages", "conversations", "conversation")
"""Usual names of a column of chats."""

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
    chosen: str | None = None
    begin = getattr(tokenizer, "bos_token", None) or ""  # each window gets one
    with ChatTemplate(tokenizer) as template:
        for row in rows:
            chosen = chosen or _choose_column(row, source, column)
            value = row.get(chosen)
            if value is None:
                continue
            if isinstance(value, str):
                yield value
            elif _is_chat(value):
                check_has_template(tokenizer, source)
                text = template.text(with_roles(value), f"a chat of {source}", "name a column of text as FILE:COLUMN")
                yield text.removeprefix(begin)
            else:
                raise MptkError(
                    f"{chosen} of {source} holds {type(value).__name__}; a column of text has strings, one of chats "
                    "has lists of {role, content}"
                )


def _choose_column(row: Mapping[str, object], source: str, column: str | None) -> str:
    if column is not None:
        if column not in row:
            raise MptkError(f"{source} has no column {column!r}; it has {', '.join(row)}")
        return column
    strings = [name for name, value in row.items() if isinstance(value, str)]
    chats = [name for name, value in row.items() if _is_chat(value)]
    usual = [name for name in CHATS if name in chats]
    for found in (["text"] if "text" in strings else [], usual[:1], strings or chats):
        if len(found) == 1:
            return found[0]
    if not strings and not chats:
        raise MptkError(f"{source} has no columns of strings ({', '.join(row)}); give a file with text in it")
    raise MptkError(
        f"{source} has {len(strings or chats)} columns of {'strings' if strings else 'chats'} "
        f"({', '.join(strings or chats)}); name the one to use, as {source}:{(strings or chats)[0]}"
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
        raise MptkError(
            f"{source} holds chats, but the model's tokenizer has no chat template; name a column of text, FILE:COLUMN"
        )


def with_roles(turns: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A chat in the names that templates know."""
    return [
        {"role": turn["role"], "content": turn["content"]}
        if "role" in turn
        else {"role": _ROLES.get(turn["from"], turn["from"]), "content": turn.get("value", "")}
        for turn in turns
    ]
