"""data: text for calibration and evaluation. Read it, or let the model write it, and cut it into windows of tokens.

docs/data.md says what ``data`` may name. The kinds of sources are in ``io/text/``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mptk.errors import DataError, FileError, InputError, ModelError
from mptk.io.aside import Aside, TextPart
from mptk.io.text import sampled
from mptk.io.text.files import Document, list_texts
from mptk.io.text.sources import (
    RANDOM_DATA,
    RANDOM_NAME,
    SELF,
    TextSource,
    hash_text_files,
    parse,
    read_places,
    share_count,
)
from mptk.io.text.tokens import cut_windows, encode_documents, hash_windows
from mptk.progress import Count

__all__ = [
    "SELF",
    "check_ids",
    "check_length",
    "check_positions",
    "find_position_limit",
    "hash_text_files",
    "hash_windows",
    "list_source_names",
    "load_calibration_windows",
    "load_evaluation_windows",
    "make_token_windows",
    "name_data",
    "read_documents",
    "read_evaluation_texts",
    "read_places",
]

# Characters to read for each wanted token. Text has about 4 a token, so 8 are enough. With a seed, up to 64 are read,
# so that there are more windows to choose from than are wanted, but no more than ``_MOST`` characters beyond the 8.
_CHARACTERS_A_TOKEN, _ENOUGH, _MOST = 64, 8, 64_000_000
LEAST_MEASURED = 2
"""Tokens of the shortest window to measure on: the first one is not predicted."""


def read_documents(data: str, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Document]:
    """The documents of ``data``, each whole, in pieces. The sources' weights are ignored.

    Raises:
        MptkError: ``data`` does not exist, has more than one column of text, is not UTF-8, or is made up (``self``,
            ``random``).
    """
    if data in (SELF, RANDOM_DATA):
        raise DataError(
            f"{data} is not text from which a vocabulary can be taken; give a file, folder or dataset", name=data
        )
    for source in parse(data):
        yield from source.read_documents(tokenizer)


def list_source_names(data: str) -> list[str]:
    """The names of the sources that ``data`` mixes, without weights."""
    return [data] if data in (SELF, RANDOM_DATA) else [source.name for source in parse(data)]


def make_token_windows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int | None = None,
    seed: int | None = 0,
    *,
    whole: bool = True,
) -> Tensor:
    """Windows of tokens that do not overlap, int64 [n, length].

    Documents are tokenised without special tokens and joined by the end-of-sequence token, if the tokenizer has one.
    The stream is cut into windows; an incomplete window at the end is dropped. If the tokenizer starts each text with a
    begin-of-sequence token, each window starts with it and holds length − 1 tokens of text.

    Args:
        count: the most windows to return; all if None.
        seed: seed of their random order, and so of the selection; None keeps the text's order.
        whole: read all texts; if not, no more than it takes to choose ``count`` windows.

    Raises:
        MptkError: the text has too few tokens for one window.
    """
    # Each text is one piece: it is in memory already.
    limits = _Limits() if whole else _compute_limits(count, length, seed)
    stream = encode_documents(([text] for text in texts), tokenizer, characters=limits.characters, tokens=limits.tokens)
    return cut_windows(stream, tokenizer, length, count, seed)


def load_evaluation_windows(
    tokenizer: PreTrainedTokenizerBase | None,
    data: str,
    length: int = 512,
    count: int | None = None,
    aside: Aside | None = None,
) -> Tensor:
    """Windows of ``data`` to measure on, int64 [n, length].

    The sources share ``count`` by weight. A source gives its first windows; a folder, windows of all of its files,
    chosen with seed 0. ``aside``: only what the same call of ``load_calibration_windows`` leaves out, of a text that
    both read; windows of a short text are then shorter.

    Raises:
        MptkError: as ``read_documents`` and ``make_token_windows``; ``data`` is ``self``; or there is no tokenizer.
    """
    if data == SELF:
        raise InputError(
            "there is no model to write the text to measure on; give a file, folder or dataset", name="data"
        )
    return _share_windows(data, _require_tokenizer(tokenizer), length, count, None, aside, "measured")


def read_evaluation_texts(
    tokenizer: PreTrainedTokenizerBase, data: str, length: int, count: int, aside: Aside | None = None
) -> Iterator[str]:
    """The first ``count`` texts of ``data``: rows of a table or of a data set, lines of a text; none is blank.

    The sources share ``count`` by weight. ``aside``, errors: as in ``load_evaluation_windows``. If the first text is
    longer than what is set aside, its start is taken.
    """
    for source, own, left in _share_sources(data, count, aside, "measured"):
        # As many tokens are set aside as of windows. Each text counts one more, for what stands between texts.
        most = (
            None
            if left is None or source.is_folder
            else len(_read_stream(source, tokenizer, own, length, None, left, "measured"))
        )
        documents = source.read_documents(tokenizer, part=None if left is None else "measured")
        for number, text in enumerate(islice(list_texts(documents), own)):
            ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids if most is not None else []
            if most is not None and len(ids) > most:
                if not number:
                    yield str(tokenizer.decode(ids[:most]))
                break
            yield text
            most = None if most is None else most - len(ids) - 1


def load_calibration_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: str = SELF,
    count: int = 64,
    length: int = 256,
    *,
    seed: int = 0,
    aside: Aside | None = None,
    progress: Count | None = None,
) -> Tensor:
    """Up to ``count`` calibration windows, int64 [n, length], from ``data`` (docs/data.md) or the model.

    Several sources share the windows by weight. The order is random, so that the first windows are of all sources, too.
    Text that the model writes is kept in the cache folder, for the same weights, seed and length. ``aside``: windows of
    a text that are left out, since they are measured on.

    Raises:
        MptkError: as ``check_length``, ``sampled.sample_text``, ``read_documents``, ``make_token_windows``; or there is
        no tokenizer.
    """
    check_length(model, length)  # before text is written or read, which takes time
    if data == SELF:
        return sampled.from_cache(model, tokenizer, count=count, length=length, seed=seed, progress=progress)
    windows = _share_windows(data, _require_tokenizer(tokenizer), length, count, seed, aside, "fitted")
    check_ids(model, windows)
    return windows


def find_position_limit(config: PreTrainedConfig) -> int | None:
    """How many positions a model has; None if their number is not bounded, or not known."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raise MptkError if ``model`` has fewer than ``length`` positions."""
    check_positions(find_position_limit(model.config), length, f"windows of {length} tokens")


def check_positions(positions: int | None, length: int, what: str) -> None:
    """Raise MptkError if ``what``, of ``length`` tokens, is longer than a model's ``positions``."""
    if positions is not None and length > positions:
        raise InputError(
            f"{what} are longer than the model's {positions} positions; ask for shorter ones",
            name=what,
            nearest=(positions,),
        )


def check_ids(model: PreTrainedModel, ids: Tensor) -> None:
    """Raise MptkError if a token id is outside the model's vocabulary: the tokenizer is of another model."""
    # A kernel would fail at such an id, without its name; on a GPU no other kernel would run after that.
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    if isinstance(size, int) and ids.numel() and int(ids.max()) >= size:
        raise FileError(
            f"the tokenizer gives token {int(ids.max())}, and the model's vocabulary has {size}; give the tokenizer "
            "files that belong to the model",
            name="tokenizer",
        )


def name_data(data: str) -> str:
    """``data`` as the protocol of a measurement names it."""
    if data == SELF:
        return sampled.SAMPLED_NAME
    if data == RANDOM_DATA:
        return RANDOM_NAME
    # Of a folder, windows are chosen, so the protocol says from what and how.
    folders = [source.name for source in parse(data, held_out=True) if source.is_folder]
    return f"{data} (windows of all files of {' and '.join(folders)}, seed 0)" if folders else data


def _share_windows(
    data: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int | None,
    seed: int | None,
    aside: Aside | None,
    part: TextPart,
) -> Tensor:
    """Windows of all sources, shared out by weight, in a random order if there is a seed."""
    found = [
        _read_windows(source, tokenizer, length, own, seed, left, part)
        for source, own, left in _share_sources(data, count, aside, part)
    ]
    if len(found) == 1:
        return found[0]
    # Shuffled, so that the first batches are of all sources. To measure, the order is the text's.
    rows = torch.cat(found)
    return rows if seed is None else rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def _share_sources(
    data: str, count: int | None, aside: Aside | None, part: TextPart
) -> Iterator[tuple[TextSource, int | None, Aside | None]]:
    """The sources of ``data`` with what each gives of ``count``, all if that is None; and what is set aside of it."""
    fitted, measured = parse(data), parse(data, held_out=True)
    weights = [source.weight for source in measured]
    counts = [None] * len(weights) if count is None else share_count(count, weights)
    shares = [0] * len(weights) if aside is None else share_count(aside.count, weights)
    for own, other, number, share in zip(fitted, measured, counts, shares, strict=True):
        # Of a data set that has a split to measure on, nothing more is set aside.
        kept = Aside(share, aside.length) if aside is not None and share and own.place == other.place else None
        if number != 0:
            yield other if part == "measured" else own, number, kept


def _read_windows(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int | None,
    seed: int | None,
    aside: Aside | None,
    part: TextPart,
) -> Tensor:
    """Windows of one source. No more of it is read than it takes to choose ``count`` of them.

    ``aside``: what is set aside of it, if only a ``part`` is read.
    """
    # The first windows of a folder would all be of its first file.
    if source.is_folder and seed is None:
        seed = 0
    stream = _read_stream(source, tokenizer, count, length, seed, aside, part)
    if aside is not None and part == "measured":  # what is set aside of a short text may be less than a window
        length = min(length, max(len(stream), LEAST_MEASURED))
    return cut_windows(stream, tokenizer, length, count, seed)


def _read_stream(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    count: int | None,
    length: int,
    seed: int | None,
    aside: Aside | None,
    part: TextPart,
) -> Tensor:
    """The tokens of one source from which windows are cut; see ``_read_windows``."""
    limits = _compute_limits(count, length, seed)
    if aside is not None and not source.is_folder:  # how long the text is decides how much is set aside
        limits = limits.extend(aside.least_tokens)
    own = part if aside is not None and source.is_folder else None
    documents = source.read_documents(tokenizer, limits.characters, _ENOUGH * length, seed or 0, own)
    stream = encode_documents(documents, tokenizer, characters=limits.characters, tokens=limits.tokens)
    if not len(stream):
        more = " beside what is set aside to measure on" if own is not None else ""
        raise DataError(
            f"{source.name} holds no text{more}; give a file, folder or dataset with some", name=source.name
        )
    if aside is not None and not source.is_folder:
        border = aside.count_tokens(len(stream))
        stream = stream[:border] if part == "measured" else stream[border:]
    return stream


@dataclass(frozen=True)
class _Limits:
    """How much of a text is read: about this many characters, or tokens; None: all of it."""

    characters: int | None = None
    tokens: int | None = None

    def extend(self, tokens: int) -> _Limits:
        """With at least so many tokens."""
        characters = None if self.characters is None else self.characters + _ENOUGH * tokens
        return _Limits(characters, None if self.tokens is None else max(self.tokens, tokens))


def _compute_limits(count: int | None, length: int, seed: int | None) -> _Limits:
    """What it takes to choose ``count`` windows; with a seed there is more to choose from."""
    if count is None:
        return _Limits()
    needed = count * length
    if seed is None:
        return _Limits(tokens=needed)
    return _Limits(characters=min(needed * _CHARACTERS_A_TOKEN, needed * _ENOUGH + _MOST))


def _require_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ModelError(
            "the model has no tokenizer to read text with; add its tokenizer files, or use --data self",
            name="tokenizer",
        )
    return tokenizer
