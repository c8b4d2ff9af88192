"""tokens: documents to a stream of token ids, piece by piece, and the stream to windows."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mptk.errors import DataError
from mptk.io.text.files import PIECE, Document

# A document is read to its end, if that is at most this many characters beyond what is wanted. A longer one is cut off.
_SLACK = 1 << 20


def encode_documents(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    characters: int | None = None,
    tokens: int | None = None,
) -> Tensor:
    """The documents' tokens, int64 [n], with the end-of-sequence token between documents, if there is one.

    Documents are tokenised without special tokens, in pieces that end before a space. Documents that are only white
    space are left out.

    Args:
        characters: read about this many, to the end of the document that reaches it if it is near.
        tokens: stop at this number of tokens.
    """
    # An array of int64: a list of Python's integers takes several times the memory.
    ids, read, end, spaced = array("q"), 0, tokenizer.eos_token_id, _keeps_space(tokenizer)
    for document in documents:
        begun = False
        for piece in split_text(document, spaced):
            if not begun and not piece.strip():
                continue
            # Between documents, so not before the first, and once a document.
            if not begun and ids and end is not None:
                ids.append(end)
            begun = True
            ids.extend(tokenizer(piece, add_special_tokens=False, verbose=False).input_ids)
            read += len(piece)
            enough = tokens is not None and len(ids) >= tokens
            if enough or (characters is not None and read >= characters + _SLACK):
                return _make_tensor(ids)
        if characters is not None and read >= characters:
            break
    return _make_tensor(ids)


def split_documents(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The documents' texts in the pieces in which ``encode_documents`` reads them."""
    spaced = _keeps_space(tokenizer)
    for document in documents:
        yield from split_text(document, spaced)


def split_text(document: Document, spaced: bool = True) -> Iterator[str]:
    """A text in pieces of at most ``PIECE`` characters that end before a space, where there is one.

    ``spaced``: whether the space goes to the next piece.
    """
    kept = ""
    for part in document:
        kept, start = kept + part, 0
        while len(kept) - start > PIECE:
            at = _cut(kept, start + PIECE)
            yield kept[start:at]
            # A tokenizer that puts a space before each text would make a second one of the space that is cut at.
            start = at + (kept[at] == " " and not spaced)
        kept = kept[start:]
    if kept:
        yield kept


def cut_windows(
    stream: Tensor, tokenizer: PreTrainedTokenizerBase, length: int, count: int | None, seed: int | None
) -> Tensor:
    """Windows of the stream that do not overlap, int64 [n, length]. See ``data.make_token_windows``."""
    prefix = find_begin_tokens(tokenizer)
    size = length - len(prefix)
    total = len(stream) // size if size > 0 else 0
    if total == 0:
        raise DataError(
            f"the text has {len(stream)} tokens, too few for a window of {length}; give more, or a shorter length",
            name="data",
        )
    rows = stream[: total * size].view(total, size)
    if seed is not None:
        rows = rows[torch.randperm(total, generator=torch.Generator().manual_seed(seed))]
    rows = rows[:count]
    start = torch.tensor(prefix, dtype=torch.long).expand(len(rows), -1)
    return torch.cat([start, rows], dim=1)


def find_begin_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin-of-sequence token, if the tokenizer puts it before a text."""
    # By trial: settings such as ``add_bos_token`` do not tell what a tokenizer.json does.
    first = tokenizer.bos_token_id
    with_special, without = (tokenizer("a", add_special_tokens=special).input_ids[:1] for special in (True, False))
    # If "a" is unknown, its own token may be the begin token, as without special tokens.
    return [first] if first is not None and with_special == [first] and without != [first] else []


def hash_windows(windows: Tensor) -> str:
    """SHA-256 of windows of token ids: of their int64 numbers, little-endian, row by row. Other inputs: as float32."""
    numbers = windows.detach().cpu().contiguous()
    kind = "<f4" if numbers.is_floating_point() else "<i8"
    found = (numbers.float() if numbers.is_floating_point() else numbers).numpy()
    return hashlib.sha256(found.astype(kind, copy=False).tobytes()).hexdigest()


def _make_tensor(ids: array[int]) -> Tensor:
    return torch.from_numpy(np.array(ids, dtype=np.int64))


def _keeps_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text that is cut before a space has the same tokens as the whole.

    If not, the tokenizer puts a space before each text itself, and the space must be left out.
    """

    def encode(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return found

    return encode("some words") == encode("some") + encode(" words")


def _cut(text: str, last: int) -> int:
    """Where a piece ends that may reach ``last``: before the last lone space of its last quarter, else at ``last``."""
    # Tokenizers join runs of spaces to one token, so only a space between two words is a safe place.
    at = last
    while (at := text.rfind(" ", last - PIECE // 4, at)) > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at
    return last
