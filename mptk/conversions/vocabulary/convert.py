"""vocabulary: a dense model becomes one that has the tokens of a corpus, or of a plan, alone. A run then starts there.

What is looked up and predicted by token loses rows; the config's and the tokenizer's ids are those of the rows that
stay. The proof compares the logits of the two models (``proof/proof.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mptk.config.settings import IN_MEMORY, Settings
from mptk.conversions.vocabulary.ids import named_ids
from mptk.conversions.vocabulary.narrow import narrowed
from mptk.conversions.vocabulary.tokens import Choice, check_reading, used_ids
from mptk.errors import MptkError
from mptk.io import data, models
from mptk.io.models import Loaded
from mptk.io.text.files import Document
from mptk.ir.families import Analysis
from mptk.ir.plan import Plan, Tokens
from mptk.ir.resolved_plan import Cut, KeptUnits
from mptk.ir.weights import Weights
from mptk.protocols.chain import Task
from mptk.protocols.trimmed import Trimmed
from mptk.tasks.base import TokenTask
from mptk.tasks.module import Module
from passes.analysis.vocabulary import Vocabulary, find_vocabulary

LEAST = 16
"""Tokens that always stay: a model is traced with the first dozen."""
PLANNED = "the plan"
"""What a report calls the corpus of a plan that was given."""

Corpus = Callable[[Loaded], Iterable[Document]]


def corpus_of(settings: Settings, texts: Sequence[str] | None) -> Corpus:
    """The documents whose tokens stay. ``texts``: those that the caller gave in memory."""
    if settings.vocabulary == IN_MEMORY:
        if not texts or not all(isinstance(text, str) for text in texts):
            raise MptkError("vocabulary holds no texts; give a list of texts, or the name of a file")
        return lambda loaded: ([text] for text in texts)
    return lambda loaded: data.documents(str(settings.vocabulary), loaded.tokenizer)


def asked(settings: Settings) -> Tokens | None:
    """The tokens that the settings' plan keeps. Raises MptkError if a corpus is to decide, too."""
    tokens = None if settings.plan is None else Plan.load(settings.plan).vocabulary
    if tokens is not None and settings.vocabulary is not None:
        raise MptkError('the plan says which tokens stay; leave out --vocabulary, or the plan\'s "vocabulary"')
    return tokens


def trim(
    loaded: Loaded, task: Task, analysis: Analysis, tokens: Tokens | Corpus, name: str = PLANNED, multiple: int = 1
) -> tuple[Loaded, Task, Trimmed]:
    """The model with some tokens alone, its task, and what it was before.

    Args:
        tokens: those that stay, or the corpus that decides; ``name``: what a report calls it.
        multiple: if the number of tokens is a multiple of this, it stays one.

    Raises:
        MptkError: the model has no vocabulary of its own, or one that cannot be trimmed exactly.
    """
    if isinstance(task, Module):
        raise MptkError("what reads example inputs has no vocabulary to trim; leave out example_inputs, or vocabulary")
    vocabulary = find_vocabulary(analysis, predicts=isinstance(task, TokenTask))
    if isinstance(tokens, Tokens):
        _check_tokens(tokens, vocabulary)
        small, changes = _narrowed(loaded, analysis, vocabulary, tokens)
    else:
        corpus = tokens
        if loaded.tokenizer is None:
            raise MptkError(f"{loaded.source} has no tokenizer to trim; add its files, or leave out --vocabulary")
        tokens = _chosen(loaded, corpus, vocabulary.rows, multiple if vocabulary.rows % multiple == 0 else 1)
        small, changes = _narrowed(loaded, analysis, vocabulary, tokens)
        assert small.tokenizer is not None
        check_reading(corpus(loaded), loaded.tokenizer, small.tokenizer, tokens.keep)
    return small, task.bind(small), Trimmed(loaded, analysis, vocabulary, tokens, changes, name)


def unread_tokenizer(loaded: Loaded, folder: Path) -> str:
    """What a proof says if the tokenizer in ``folder`` cannot be compared; empty if it can, or there is none."""
    if loaded.tokenizer is not None or not models.has_tokenizer(folder):
        return ""
    return "the tokenizer was not compared, since the dense model has none; save it there, and give --model DIR"


def _check_tokens(tokens: Tokens, vocabulary: Vocabulary) -> None:
    if tokens.of != vocabulary.rows:
        raise MptkError(f"plan: vocabulary has {vocabulary.rows} tokens in this model, not {tokens.of}")
    if len(tokens.keep) < min(LEAST, tokens.of):
        raise MptkError(f"plan: vocabulary keeps {len(tokens.keep)} tokens; keep {LEAST} or more")


def _chosen(loaded: Loaded, corpus: Corpus, rows: int, multiple: int) -> Tokens:
    """The tokens of the corpus, and what must stay beside them."""
    assert loaded.tokenizer is not None
    choice = Choice(loaded.tokenizer, rows)
    used = used_ids(corpus(loaded), loaded.tokenizer)
    if not used:
        raise MptkError("--vocabulary holds no text; give a file, folder or dataset with some")
    named = named_ids(loaded.model.config, rows) | named_ids(getattr(loaded.model, "generation_config", None), rows)
    return Tokens(rows, choice.kept(used | named, LEAST, multiple))


def _narrowed(
    loaded: Loaded, analysis: Analysis, vocabulary: Vocabulary, tokens: Tokens
) -> tuple[Loaded, dict[str, list[object]]]:
    table = np.zeros((1, tokens.of), dtype=bool)
    table[0, list(tokens.keep)] = True
    kept = KeptUnits((), table)
    cut = Cut(dict.fromkeys(vocabulary.axes, kept), dict.fromkeys(vocabulary.axes, len(tokens.keep)))
    aliases = analysis.program.aliases
    weights = Weights({}) if loaded.weights is None else loaded.weights
    places = {name: analysis.weights.get(aliases.get(name, name), ()) for name in weights}
    changes = {n: partial(cut.slice, dims=dims) for n, dims in places.items() if any(map(cut.touches, dims))}
    return narrowed(loaded, weights.changed(changes, moves=True), tokens.keep, tokens.of)
