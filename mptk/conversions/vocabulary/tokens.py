"""tokens: decide which tokens of a tokenizer stay, and make the tokenizer with only these."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mptk.conversions.vocabulary.pieces import Merges, check_kind, spelling, token_ids, trimmed_model
from mptk.errors import MptkError
from mptk.files import json_text, scratch
from mptk.io.text.files import Document
from mptk.io.text.tokens import pieces
from mptk.reading import read_json

_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"


def used_ids(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of all tokens in the documents."""
    found: set[int] = set()
    for piece in pieces(documents, tokenizer):
        found.update(tokenizer(piece, add_special_tokens=False, verbose=False).input_ids)
    return found


class Choice:
    """The tokens of a tokenizer that stay. ``rows``: the rows of the model's embedding.

    Raises:
        MptkError: the tokenizer cannot be trimmed without changing how it reads texts, or has tokens without a row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        self.content = content_of(tokenizer)
        self.rows = rows
        self.merges = Merges(self.content["model"])
        self.ids = {**self.merges.tokens, **{each["content"]: each["id"] for each in self.content["added_tokens"]}}
        self.names = {number: token for token, number in self.ids.items()}
        if (last := max(self.names)) >= rows:
            raise MptkError(
                f"the tokenizer's token {self.names[last]!r} has the id {last}, and the model has {rows} rows; resize "
                "the model's embedding to its tokenizer first, or leave out --vocabulary"
            )

    def kept(self, used: Iterable[int], least: int, multiple: int) -> tuple[int, ...]:
        """The ids that stay, ascending: used tokens and their parts, special tokens, and bytes or characters.

        Tokens of the lowest ids, with the tokens that they are built from, fill up to ``least`` and to a ``multiple``.
        """
        always = {self.ids[token] for token in spelling(self.content)}
        always |= {each["id"] for each in self.content["added_tokens"]}
        stay = {other for number in {*used, *always} for other in self._with_parts(number)}
        wanted = max(least, len(stay))
        wanted = min(self.rows, -(-wanted // multiple) * multiple)
        while len(stay) < wanted:
            for number in range(self.rows):
                if len(stay) == wanted:
                    break
                more = self._with_parts(number) - stay
                if len(stay) + len(more) <= wanted:
                    stay |= more
        return tuple(sorted(stay))

    def _with_parts(self, number: int) -> set[int]:
        token = self.names.get(number)
        return {number, *(self.ids[part] for part in (self.merges.built_of(token) if token is not None else ()))}


def content_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of a tokenizer's ``tokenizer.json``. Raises MptkError if there is none, or its kind is unknown."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise MptkError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so its vocabulary cannot be trimmed; convert it to "
            "a tokenizer.json, or leave out --vocabulary"
        )
    content: dict[str, Any] = json.loads(backend.to_str())
    check_kind(content)
    return content


def trimmed_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    """The tokenizer with only the tokens ``kept``; a token's id is its position in ``kept``.

    Raises:
        MptkError: transformers reads the written tokenizer back with other tokens.
    """
    new = {old: i for i, old in enumerate(kept)}
    content = content_of(tokenizer)
    small = trimmed_content(content, new)
    with scratch() as place:
        tokenizer.save_pretrained(place.folder)
        for file in place.folder.iterdir():
            if file.suffix in (".txt", ".model") or file.name in ("vocab.json", "added_tokens.json"):
                file.unlink()  # a second copy of the whole vocabulary
        settings = read_json(place.folder / _SETTINGS, lambda why: MptkError(f"{_SETTINGS} is damaged: {why}"))
        decoder = settings.get("added_tokens_decoder")
        if isinstance(decoder, Mapping):
            settings["added_tokens_decoder"] = {str(new[int(i)]): entry for i, entry in decoder.items()}
        for name, value in ((_FILE, small), (_SETTINGS, settings)):
            (place.folder / name).write_text(json_text(value, ensure_ascii=False), encoding="utf-8")
        found = _read_back(type(tokenizer), place.folder)
    expected = {token: new[i] for token, i in tokenizer.get_vocab().items() if i in new}
    if found is None or found.get_vocab() != expected:
        raise MptkError(
            f"transformers reads a trimmed {type(tokenizer).__name__} back with other tokens; leave out --vocabulary"
        )
    return found


def _read_back(kind: type[PreTrainedTokenizerBase], folder: Path) -> PreTrainedTokenizerBase | None:
    try:
        found: PreTrainedTokenizerBase = kind.from_pretrained(folder)
    except Exception:  # noqa: BLE001 (a tokenizer's class may raise anything)
        return None
    return found


def trimmed_content(content: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """The content of a ``tokenizer.json`` with only the ids in ``new``, renumbered."""
    tokens = token_ids(content["model"])
    kept = {token: new[i] for token, i in sorted(tokens.items(), key=lambda entry: entry[1]) if i in new}
    return {
        **content,
        "model": trimmed_model(content["model"], kept),
        "added_tokens": [{**each, "id": new[each["id"]]} for each in content["added_tokens"]],
        "post_processor": _post(content.get("post_processor"), new),
        "padding": None if content.get("padding") is None else _post(content["padding"], new),
    }


def _post(value: Any, new: Mapping[int, int]) -> Any:
    """A part of the file with renumbered ids: ``ids`` of a template, ``["[SEP]", 102]`` of older kinds, ``pad_id``."""
    if isinstance(value, Mapping):
        found = {key: _post(each, new) for key, each in value.items()}
        if "ids" in value and "tokens" in value:
            found["ids"] = [new[i] for i in value["ids"]]
        for key in ("sep", "cls"):
            if isinstance(pair := value.get(key), list) and len(pair) == 2 and isinstance(pair[1], int):
                found[key] = [pair[0], new[pair[1]]]
        if "pad_id" in value:
            found["pad_id"] = new[value["pad_id"]]
        return found
    return [_post(each, new) for each in value] if isinstance(value, list) else value


def check_reading(
    documents: Iterable[Document],
    dense: PreTrainedTokenizerBase,
    small: PreTrainedTokenizerBase,
    kept: Sequence[int],
) -> None:
    """Raise MptkError unless both tokenizers give the documents the same tokens."""
    new = {old: i for i, old in enumerate(kept)}
    for piece in pieces(documents, dense):
        one, other = (each(piece, verbose=False).input_ids for each in (dense, small))
        if [new.get(i) for i in one] != other:
            raise MptkError(
                f"the trimmed {type(dense).__name__} reads the text differently ({piece[:40]!r}…); please report this "
                "tokenizer, and leave out --vocabulary"
            )
