"""data: text for calibration and evaluation. Read it, or let the model write it, and cut it into windows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mptk.errors import MptkError
from mptk.progress import Count

SELF = "self"
"""The value of ``data`` for text that the model writes."""

_TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_PLAIN = (".txt", ".text", ".raw", ".md")
# Characters to read for each wanted token. Text has about 4 a token; more are read so that windows can be chosen.
_CHARACTERS_A_TOKEN = 64


def load_text(data: str, *, split: str | None = None, max_characters: int | None = None) -> list[str]:
    """The documents of ``data``.

    Args:
        data: a text file, which is one document; a ``.jsonl``, ``.json`` or ``.parquet`` file with one document a row
            (the column ``text``, else the only column of strings); a folder, for all such files in it and below, in
            the order of their paths; or an id of the datasets hub: ``ID``, ``ID:CONFIG`` or ``ID:CONFIG:SPLIT``.
        split: split of a hub's dataset, if ``data`` does not name one; ``train`` if None.
        max_characters: stop after the document that reaches this number. Data sets are streamed, so a large one is not
            downloaded in full.

    Raises:
        MptkError: ``data`` does not exist, has no text or more than one column of it, or is not UTF-8.
    """
    texts: list[str] = []
    left = max_characters
    for text in _documents(data, split):
        if not text.strip():
            continue
        texts.append(text)
        if left is not None:
            left -= len(text)
            if left <= 0:
                break
    if not texts:
        raise MptkError(f"{data} holds no text; give a file, folder or dataset with some")
    return texts


def token_windows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int | None = None,
    seed: int | None = 0,
) -> Tensor:
    """Windows of tokens that do not overlap, int64 [n, length].

    Documents are tokenised without special tokens and joined by the end-of-sequence token, if the tokenizer has one.
    The stream is cut into windows; an incomplete window at the end is dropped. If the tokenizer starts each text with a
    begin-of-sequence token, each window starts with it and holds length − 1 tokens of text.

    Args:
        count: the most windows to return; all if None.
        seed: seed of their random order, and so of the selection; None keeps the text's order.

    Raises:
        MptkError: the text has too few tokens for one window.
    """
    prefix = _prefix(tokenizer)
    stream = _stream(texts, tokenizer)
    size = length - len(prefix)
    total = len(stream) // size if size > 0 else 0
    if total == 0:
        raise MptkError(
            f"the text has {len(stream)} tokens, too few for a window of {length}; give more, or a shorter length"
        )
    rows = torch.tensor(stream[: total * size], dtype=torch.long).view(total, size)
    if seed is not None:
        rows = rows[torch.randperm(total, generator=torch.Generator().manual_seed(seed))]
    rows = rows[:count]
    start = torch.tensor(prefix, dtype=torch.long).expand(len(rows), -1)
    return torch.cat([start, rows], dim=1)


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase | None,
    data: str,
    length: int = 512,
    count: int | None = None,
    *,
    split: str | None = None,
) -> Tensor:
    """The first ``count`` windows of the text of ``data`` in its order (see :func:`token_windows`), int64 [n, length].

    ``split``: split of a hub's dataset; ``test`` if None.
    """
    wanted = None if count is None else count * length * _CHARACTERS_A_TOKEN
    texts = load_text(data, split=split or "test", max_characters=wanted)
    return token_windows(texts, _required(tokenizer), length, count, seed=None)


def self_sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    count: int,
    length: int,
    seed: int,
    batch_size: int = 32,
    progress: Count | None = None,
) -> Tensor:
    """Text that the model writes, as tokens, int64 [count, length].

    This is ancestral sampling at temperature 1 from the full distribution, with a KV cache. Each row starts with the
    begin-of-sequence token, else the end-of-sequence token, else a uniformly random token. It does not stop at an end
    of sequence: the model continues with the next text, as in text packed for training. For one model, the result
    depends on seed, batch size, device and thread count only. The caller's random state does not change.

    Args:
        batch_size: rows sampled at once. More rows take more memory and less time each.
        progress: called with (tokens done, all tokens).

    Raises:
        MptkError: the model cannot generate text.
    """
    if not model.can_generate():
        raise MptkError(f"{type(model).__name__} cannot write text to calibrate on; give some with --data")
    report = progress or (lambda done, total: None)
    generator = torch.Generator().manual_seed(seed)
    devices = [model.device] if model.device.type == "cuda" else []
    rows: list[Tensor] = []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for first in range(0, count, batch_size):
            start = _starts(model, tokenizer, min(batch_size, count - first), generator)
            counter = _Counter(report, done=first * length, rows=len(start), total=count * length)
            rows.append(_sample(model, start, length, counter))
    report(count * length, count * length)
    return torch.cat(rows)


def calibration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: str = SELF,
    count: int = 64,
    length: int = 256,
    *,
    seed: int = 0,
    progress: Count | None = None,
) -> Tensor:
    """Up to ``count`` calibration windows, int64 [n, length], from ``data`` (see :func:`load_text`) or the model.

    Raises:
        MptkError: as ``check_length``, ``self_sampled``, ``load_text``, ``token_windows``; or there is no tokenizer.
    """
    check_length(model, length)
    if data == SELF:
        return self_sampled(model, tokenizer, count=count, length=length, seed=seed, progress=progress)
    texts = load_text(data, max_characters=count * length * _CHARACTERS_A_TOKEN)
    return token_windows(texts, _required(tokenizer), length, count, seed)


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raise MptkError if ``model`` has fewer than ``length`` positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and length > limit:
        raise MptkError(
            f"windows of {length} tokens are longer than the model's {limit} positions; ask for shorter ones"
        )


# ---- reading ----


def _documents(data: str, split: str | None) -> Iterator[str]:
    path = Path(data).expanduser()
    if path.is_file():
        yield from _file_documents(path)
    elif path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in (*_PLAIN, *_TABLES)]
        if not files:
            raise MptkError(f"{data} has no text in it; text files end in {', '.join((*_PLAIN, *_TABLES))}")
        for file in files:
            yield from _file_documents(file)
    else:
        yield from _hub_documents(data, split)


def _file_documents(path: Path) -> Iterator[str]:
    kind = _TABLES.get(path.suffix.lower())
    if kind is None:
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise MptkError(
                f"{path} is not UTF-8 text ({error.reason}); convert it, or give a .parquet file"
            ) from error
        return
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        yield from _rows(load_dataset(kind, data_files=str(path), split="train", streaming=True), str(path))
    except (DatasetsError, ValueError, OSError) as error:
        raise MptkError(f"cannot read {path}: {error}; check that it is {path.suffix[1:]}") from error


def _hub_documents(data: str, split: str | None) -> Iterator[str]:
    """``ID[:CONFIG[:SPLIT]]`` on the datasets hub."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name, config, named_split, *rest = [*data.split(":"), "", ""]
    if any(rest):
        raise MptkError(f"{data!r} has too many colons; write ID, ID:CONFIG or ID:CONFIG:SPLIT")
    try:
        dataset = load_dataset(name, config or None, split=named_split or split or "train", streaming=True)
    except (DatasetsError, ValueError, OSError) as error:
        raise MptkError(
            f"{data!r} is no file or folder, and does not load as a dataset: {str(error).splitlines()[0]}; "
            "check the path, or the network and ID:CONFIG:SPLIT"
        ) from error
    yield from _rows(dataset, data)


def _rows(dataset: Iterable[Mapping[str, object]], source: str) -> Iterator[str]:
    column: str | None = None
    for row in dataset:
        column = column or _text_column(row, source)
        text = row[column]
        if text is not None:
            assert isinstance(text, str), "a column of a dataset has one type"
            yield text


def _text_column(row: Mapping[str, object], source: str) -> str:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        raise MptkError(
            f"{source} has {len(strings) or 'no'} columns of strings ({', '.join(row)}); name the one to use 'text'"
        )
    return strings[0]


# ---- tokens ----


def _stream(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    stream: list[int] = []
    for index, text in enumerate(texts):
        if index and end is not None:
            stream.append(end)
        stream += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return stream


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The begin-of-sequence token, if the tokenizer puts it before a text."""
    ids = tokenizer("a").input_ids
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and ids[:1] == [begin] else []


def _required(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise MptkError("the model has no tokenizer to read text with; add its tokenizer files, or use --data self")
    return tokenizer


# ---- sampling ----


class _Counter(LogitsProcessor):
    """Reports each step of generation, and leaves the logits unchanged."""

    def __init__(self, report: Count, done: int, rows: int, total: int) -> None:
        self.report, self.done, self.rows, self.total = report, done, rows, total

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.report(self.done + self.rows * input_ids.shape[1], self.total)
        return scores


def _starts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, rows: int, generator: torch.Generator
) -> Tensor:
    """The first token of each row, [rows, 1]."""
    owners: Sequence[object] = (tokenizer, model.config)
    known = [getattr(owner, name, None) for name in ("bos_token_id", "eos_token_id") for owner in owners]
    first = next((token for token in known if isinstance(token, int)), None)
    if first is not None:
        return torch.full((rows, 1), first)
    return torch.randint(model.config.get_text_config().vocab_size, (rows, 1), generator=generator)


@torch.no_grad()
def _sample(model: PreTrainedModel, start: Tensor, length: int, counter: _Counter) -> Tensor:
    """Continue ``start`` [rows, 1] to [rows, length]."""
    # It replaces the checkpoint's generation config, whose settings would fill each gap of a config that is passed.
    settings = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length - 1)
    settings.pad_token_id = 0  # Only silences a warning of transformers: no row ends early.
    start = start.to(model.device)
    writer = cast("GenerationMixin", model)  # PreTrainedModel does not declare what generation needs.
    own, writer.generation_config = writer.generation_config, settings
    try:
        tokens: Tensor = writer.generate(
            start, attention_mask=torch.ones_like(start), logits_processor=LogitsProcessorList([counter])
        )
    finally:
        writer.generation_config = own
    return tokens.cpu()
