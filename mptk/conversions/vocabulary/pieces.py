"""pieces: the four models of a ``tokenizer.json``, and the tokens that must stay to read texts as before.

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
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from mptk.errors import MptkError

Json = Mapping[str, Any]
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def token_ids(model: Json) -> dict[str, int]:
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


def spelling(tokenizer: Json) -> set[str]:
    """The tokens that always stay: bytes or single characters, which spell any text, and the unknown token."""
    model = tokenizer["model"]
    tokens = token_ids(model)
    if model["type"] == "WordLevel":
        return {model["unk_token"]} & tokens.keys()
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    spelled = {token for token in tokens if _BYTE.fullmatch(token)} if model.get("byte_fallback") else set[str]()
    letters: Iterable[str] = [] if spelled else {_bare(token, prefix, suffix) for token in tokens}
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


def _bare(token: str, prefix: str, suffix: str) -> str:
    return token.removeprefix(prefix).removesuffix(suffix)


def _is_byte_level(tokenizer: Json) -> bool:
    """Whether each character of the model's input stands for a byte."""
    return any(_has(tokenizer.get(part), "ByteLevel") for part in ("normalizer", "pre_tokenizer"))


def _has(value: Any, kind: str) -> bool:
    """Whether a part of the file, or a part inside it, has this type."""
    if isinstance(value, Mapping):
        return value.get("type") == kind or any(_has(each, kind) for each in value.values())
    return isinstance(value, list) and any(_has(each, kind) for each in value)


class Merges:
    """How a BPE model builds its tokens; in the other models a token has no parts."""

    def __init__(self, model: Json) -> None:
        self.tokens = token_ids(model)
        self.prefix, self.suffix = (
            model.get("continuing_subword_prefix") or "",
            model.get("end_of_word_suffix") or "",
        )
        self.ranks = {pair: rank for rank, pair in enumerate(_pairs(model))}

    def built_of(self, token: str) -> set[str]:
        """The intermediate tokens of ``token``; none if merges do not build it."""
        parts = self._letters(token)
        seen = set(parts)
        while len(parts) > 1:
            ranked = [(self.ranks.get(pair), i) for i, pair in enumerate(itertools.pairwise(parts))]
            found = [(rank, i) for rank, i in ranked if rank is not None]
            if not found:
                return set()
            _, i = min(found)
            parts[i : i + 2] = [self.merged(parts[i], parts[i + 1])]
            seen.add(parts[i])
        return seen - {token} if parts == [token] and seen <= self.tokens.keys() else set()

    def merged(self, first: str, second: str) -> str:
        """The result of a merge."""
        return first + second.removeprefix(self.prefix)

    def _letters(self, token: str) -> list[str]:
        """The characters of ``token`` before any merge, with the marks for inside and end of a word."""
        inside, end = token.startswith(self.prefix) and self.prefix, token.endswith(self.suffix) and self.suffix
        letters = list(token.removeprefix(inside or "").removesuffix(end or ""))
        marked = [(self.prefix if inside or i else "") + letter for i, letter in enumerate(letters)]
        return [*marked[:-1], marked[-1] + (end or "")] if marked else []


def trimmed_model(model: Json, kept: Mapping[str, int]) -> dict[str, Any]:
    """The model of a ``tokenizer.json`` with the tokens ``kept`` under their new ids."""
    small = {**model, "vocab": {token: kept[token] for token in token_ids(model) if token in kept}}
    if model["type"] == "BPE":
        merges = Merges(model)
        stay = ((a, b) for a, b in _pairs(model) if {a, b, merges.merged(a, b)} <= small["vocab"].keys())
        small["merges"] = [list(pair) for pair in stay]
    if model["type"] == "Unigram":
        small["vocab"] = [[token, score] for token, score in model["vocab"] if token in kept]
        if model.get("unk_id") is not None:
            small["unk_id"] = kept[model["vocab"][model["unk_id"]][0]]
    return small


def _pairs(model: Json) -> Iterator[tuple[str, str]]:
    """The merges of a BPE model in order; older files hold each as one string."""
    for pair in model.get("merges", ()):
        first, second = pair.split(" ") if isinstance(pair, str) else pair
        yield first, second
