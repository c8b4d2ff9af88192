"""tokens: decide which tokens of a tokenizer stay, and make the tokenizer with only these.

A ``tokenizer.json`` has one of four models, and these tokens must stay to read texts as before:
1. BPE builds a token by merges. The merges within a token do not depend on its surroundings, so each token has fixed
   intermediate tokens. If these stay, with every merge whose parts and result stay, the merge of the lowest rank is at
   each step the same as before.
2. WordPiece takes the longest token that fits. If it stays, it is still the longest.
3. Unigram takes the likeliest sequence. If it stays, it is still the likeliest, and among equals still the first one
   found. An unknown character costs more than the unlikeliest token, so this token stays, too.
4. WordLevel looks a word up.

To read any text afterwards, all bytes stay or, without bytes, all single characters.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from mptk.errors import MptkError
from mptk.files import format_json, make_scratch
from mptk.io.text.files import Document
from mptk.io.text.tokens import split_documents
from mptk.reading import Json, read_json

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def map_token_ids(model: Json) -> dict[str, int]:
    """Token → id of a tokenizer's model."""
    entries = model["vocab"]
    return dict(entries) if isinstance(entries, Mapping) else {token: i for i, (token, _) in enumerate(entries)}


def check_kind(tokenizer: Json) -> None:
    """Raise MptkError unless the model of a ``tokenizer.json`` is one of the four and deterministic."""
    model = tokenizer["model"]
    if model.get("type") not in ("BPE", "WordPiece", "Unigram", "WordLevel"):
        raise MptkError(f"a tokenizer of the kind {model.get('type')} cannot be trimmed; leave out --vocabulary")
    if model.get("dropout"):
        raise MptkError("a tokenizer with dropout reads a text differently each time; set dropout to null in its file")


def find_spelling_tokens(tokenizer: Json) -> set[str]:
    """The tokens that always stay: bytes or single characters, which spell any text, and the unknown token."""
    model = tokenizer["model"]
    tokens = map_token_ids(model)
    if model["type"] == "WordLevel":
        return {model["unk_token"]} & tokens.keys()
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    spelled = {token for token in tokens if _BYTE.fullmatch(token)} if model.get("byte_fallback") else set[str]()
    letters: Iterable[str] = [] if spelled else {token.removeprefix(prefix).removesuffix(suffix) for token in tokens}
    if _is_byte_level(tokenizer):
        letters = ByteLevel.alphabet()
    single = [letter for letter in letters if len(letter) == 1]
    spelled |= {start + c + end for c in single for start in {"", prefix} for end in {"", suffix}} & tokens.keys()
    if model["type"] == "Unigram":
        spelled.add(min(model["vocab"], key=lambda entry: entry[1])[0])
        unknown = [] if model.get("unk_id") is None else [model["vocab"][model["unk_id"]][0]]
    else:
        unknown = [model["unk_token"]] if model.get("unk_token") in tokens else []
    return spelled.union(unknown)


def _is_byte_level(tokenizer: Json) -> bool:
    """Whether each character of the model's input stands for a byte."""
    return any(_has(tokenizer.get(part), "ByteLevel") for part in ("normalizer", "pre_tokenizer"))


def _has(value: object, kind: str) -> bool:
    """Whether a part of the file, or a part inside it, has this type."""
    if isinstance(value, Mapping):
        return value.get("type") == kind or any(_has(each, kind) for each in value.values())
    return isinstance(value, list) and any(_has(each, kind) for each in value)


class Merges:
    """How a BPE model builds its tokens; in the other models a token has no parts."""

    def __init__(self, model: Json) -> None:
        self.tokens = map_token_ids(model)
        self.prefix, self.suffix = (
            model.get("continuing_subword_prefix") or "",
            model.get("end_of_word_suffix") or "",
        )
        self.ranks = {pair: rank for rank, pair in enumerate(_list_merges(model))}

    def find_intermediates(self, token: str) -> set[str]:
        """The intermediate tokens of ``token``; none if merges do not build it."""
        parts = self._split_letters(token)
        seen = set(parts)
        while len(parts) > 1:
            ranked = [(self.ranks.get(pair), i) for i, pair in enumerate(itertools.pairwise(parts))]
            found = [(rank, i) for rank, i in ranked if rank is not None]
            if not found:
                return set()
            _, i = min(found)
            parts[i : i + 2] = [self.merge_pair(parts[i], parts[i + 1])]
            seen.add(parts[i])
        return seen - {token} if parts == [token] and seen <= self.tokens.keys() else set()

    def merge_pair(self, first: str, second: str) -> str:
        """The result of a merge."""
        return first + second.removeprefix(self.prefix)

    def _split_letters(self, token: str) -> list[str]:
        """The characters of ``token`` before any merge, with the marks for inside and end of a word."""
        inside, end = token.startswith(self.prefix) and self.prefix, token.endswith(self.suffix) and self.suffix
        letters = list(token.removeprefix(inside or "").removesuffix(end or ""))
        marked = [(self.prefix if inside or i else "") + letter for i, letter in enumerate(letters)]
        return [*marked[:-1], marked[-1] + (end or "")] if marked else []


def trim_tokenizer_model(model: Json, kept: Mapping[str, int]) -> Json:
    """The model of a ``tokenizer.json`` with the tokens ``kept`` under their new ids."""
    small = {**model, "vocab": {token: kept[token] for token in map_token_ids(model) if token in kept}}
    if model["type"] == "BPE":
        merges = Merges(model)
        stay = ((a, b) for a, b in _list_merges(model) if {a, b, merges.merge_pair(a, b)} <= small["vocab"].keys())
        small["merges"] = [list(pair) for pair in stay]
    if model["type"] == "Unigram":
        small["vocab"] = [[token, score] for token, score in model["vocab"] if token in kept]
        if model.get("unk_id") is not None:
            small["unk_id"] = kept[model["vocab"][model["unk_id"]][0]]
    return small


def _list_merges(model: Json) -> Iterator[tuple[str, str]]:
    """The merges of a BPE model in order; older files hold each as one string."""
    for pair in model.get("merges", ()):
        first, second = pair.split(" ") if isinstance(pair, str) else pair
        yield first, second


_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"


def find_used_ids(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of all tokens in the documents."""
    found: set[int] = set()
    for piece in split_documents(documents, tokenizer):
        found.update(tokenizer(piece, add_special_tokens=False, verbose=False).input_ids)
    return found


class Choice:
    """The tokens of a tokenizer that stay. ``rows``: the rows of the model's embedding.

    Raises:
        MptkError: the tokenizer cannot be trimmed without changing how it reads texts, or has tokens without a row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        self.content = read_tokenizer_content(tokenizer)
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
        always = {self.ids[token] for token in find_spelling_tokens(self.content)}
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
        return {
            number,
            *(self.ids[part] for part in (self.merges.find_intermediates(token) if token is not None else ())),
        }


def read_tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> Json:
    """The content of a tokenizer's ``tokenizer.json``. Raises MptkError if there is none, or its kind is unknown."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise MptkError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so its vocabulary cannot be trimmed; convert it to "
            "a tokenizer.json, or leave out --vocabulary"
        )
    content: Json = json.loads(backend.to_str())
    check_kind(content)
    return content


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    """The tokenizer with only the tokens ``kept``; a token's id is its position in ``kept``.

    Raises:
        MptkError: transformers reads the written tokenizer back with other tokens.
    """
    new = {old: i for i, old in enumerate(kept)}
    content = read_tokenizer_content(tokenizer)
    small = trim_content(content, new)
    with make_scratch() as place:
        tokenizer.save_pretrained(place.folder)
        for file in place.folder.iterdir():
            if file.suffix in (".txt", ".model") or file.name in ("vocab.json", "added_tokens.json"):
                file.unlink()  # a second copy of the whole vocabulary
        settings = read_json(place.folder / _SETTINGS, lambda why: MptkError(f"{_SETTINGS} is damaged: {why}"))
        decoder = settings.get("added_tokens_decoder")
        if isinstance(decoder, Mapping):
            settings["added_tokens_decoder"] = {str(new[int(i)]): entry for i, entry in decoder.items()}
        for name, value in ((_FILE, small), (_SETTINGS, settings)):
            (place.folder / name).write_text(format_json(value, ensure_ascii=False), encoding="utf-8")
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


def trim_content(content: Json, new: Mapping[int, int]) -> Json:
    """The content of a ``tokenizer.json`` with only the ids in ``new``, renumbered."""
    tokens = map_token_ids(content["model"])
    kept = {token: new[i] for token, i in sorted(tokens.items(), key=lambda entry: entry[1]) if i in new}
    return {
        **content,
        "model": trim_tokenizer_model(content["model"], kept),
        "added_tokens": [{**each, "id": new[each["id"]]} for each in content["added_tokens"]],
        "post_processor": _post(content.get("post_processor"), new),
        "padding": None if content.get("padding") is None else _post(content["padding"], new),
    }


def _post(value: object, new: Mapping[int, int]) -> object:
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


def check_trimmed_reading(
    documents: Iterable[Document],
    dense: PreTrainedTokenizerBase,
    small: PreTrainedTokenizerBase,
    kept: Sequence[int],
) -> None:
    """Raise MptkError unless both tokenizers give the documents the same tokens."""
    new = {old: i for i, old in enumerate(kept)}
    for piece in split_documents(documents, dense):
        one, other = (each(piece, verbose=False).input_ids for each in (dense, small))
        if [new.get(i) for i in one] != other:
            raise MptkError(
                f"the trimmed {type(dense).__name__} reads the text differently ({piece[:40]!r}…); please report this "
                "tokenizer, and leave out --vocabulary"
            )
