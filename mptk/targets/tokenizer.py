"""reading: whether a written tokenizer reads and writes texts as the dense model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from mptk.errors import ProofError

RARE = 64
"""Tokens of the highest ids that are read: those of the lowest are letters, and in every text."""
SPECIAL = 64
"""Added and special tokens that are read."""


def check_same_reading(
    dense: PreTrainedTokenizerBase, written: PreTrainedTokenizerBase, kept: Sequence[int] | None
) -> None:
    """Raise ProofError unless both give the same tokens to texts, and the same texts to these tokens.

    Args:
        kept: the ids of ``dense`` that stay, in the order of the written ones; None: all do.
    """
    new = None if kept is None else {old: i for i, old in enumerate(kept)}
    for text in texts_of(dense, kept):
        ids = dense(text, verbose=False).input_ids
        if new is not None and not new.keys() >= set(ids):
            continue
        expected = ids if new is None else [new[i] for i in ids]
        found = written(text, verbose=False).input_ids
        if found != expected:
            raise ProofError(
                f"the proof fails at 'config': the written tokenizer reads {text!r} as {found}, not as {expected}; do "
                "not use it, and prune the model again"
            )
        if written.decode(found) != dense.decode(ids):
            raise ProofError(
                f"the proof fails at 'config': the written tokenizer writes the tokens of {text!r} as "
                f"{written.decode(found)!r}; do not use it, and prune the model again"
            )


def texts_of(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int] | None) -> Iterator[str]:
    """Texts of added and special tokens, by themselves and within words, and of rare tokens."""
    added = sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens})[:SPECIAL]
    for token in added:
        yield token
        yield f"one {token} two{token}three"
    ids = range(len(tokenizer)) if kept is None else kept
    for i in ids[-RARE:]:
        if text := str(tokenizer.decode([i])):
            yield text
