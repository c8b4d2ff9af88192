"""convert: reduce a dense model to the tokens of a corpus or of a plan.

Embedding and output head lose rows; config and tokenizer get the ids of the rows that stay. The proof compares the
logits of the two models.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from mptk.compat.transformers import find_config_field
from mptk.config.choices import IN_MEMORY
from mptk.config.settings import Settings
from mptk.conversions.vocabulary.tokens import Choice, check_trimmed_reading, find_used_ids, trim_tokenizer
from mptk.errors import MptkError
from mptk.io import data, models
from mptk.io.models import Loaded
from mptk.io.remade import rebuild_model
from mptk.io.text.files import Document
from mptk.ir.alignment import read_alignment
from mptk.ir.plan import Entry, encode_ranges, read_family
from mptk.ir.program import Program
from mptk.ir.resolved_plan import Cut, KeptUnits
from mptk.ir.samples import Samples
from mptk.ir.weights import Weights
from mptk.protocols.conversion import Analyse, Analysed, Change, Conversion
from mptk.staged.staged import Executor
from mptk.tasks.base import TokenTask
from mptk.tasks.module import Module
from passes.analysis.vocabulary import Vocabulary, find_vocabulary
from passes.verify import StageOutputs

LEAST = 16
"""Tokens that always stay: a model is traced with the first dozen."""
FROM_PLAN = "the plan"
"""What a report calls the corpus if a plan was given."""

Corpus = Callable[[Loaded], Iterable[Document]]


@dataclass(frozen=True)
class Tokens:
    """The tokens that stay, ``keep``, ascending, of ``of``. A token's new id is its position in ``keep``."""

    of: int
    keep: tuple[int, ...]

    @staticmethod
    def read(entry: Entry) -> Tokens:
        """Read the tokens of a plan's entry. Raises MptkError with the place of the mistake."""
        family = read_family({**entry, "keep": {"tokens": entry.get("keep")}}, "plan: vocabulary")
        return Tokens(family.of, family.keep["tokens"][0])


@dataclass(frozen=True, kw_only=True)
class TrimmedVocabulary(Conversion):
    """A model without the rows of some tokens.

    ``vocabulary``: where the model has rows for tokens. ``kept``: the tokens that stay. ``corpus``: the name of the
    text that decided.
    """

    name = "vocabulary"
    stage = "vocabulary"
    settles = "which tokens stay"
    does = "removes tokens"
    told = ("corpus",)

    vocabulary: Vocabulary
    kept: Tokens
    corpus: str

    @classmethod
    def asked(cls, settings: Settings, texts: Sequence[str] | None) -> Change | None:
        if settings.vocabulary is None:
            return None
        return partial(
            cls.trim, find_corpus(settings, texts), str(settings.vocabulary), read_alignment(settings.align).every
        )

    @classmethod
    def from_entry(cls, entry: Entry) -> Change:
        return partial(cls.trim, Tokens.read(entry), FROM_PLAN, 1)

    @classmethod
    def trim(cls, wanted: Tokens | Corpus, name: str, multiple: int, model: Analysed, analyse: Analyse) -> Conversion:
        """The conversion of ``model``.

        Args:
            wanted: the tokens that stay, or the corpus that decides; ``name``: its name in a report.
            multiple: if the number of tokens is a multiple of this, the new one is, too.

        Raises:
            MptkError: the model has no vocabulary, or its vocabulary cannot be trimmed exactly.
        """
        loaded = model.loaded
        if isinstance(model.task, Module):
            raise MptkError("vocabulary trimming needs a text model; leave out example_inputs, or vocabulary")
        vocabulary = find_vocabulary(model.analysis, predicts=isinstance(model.task, TokenTask))
        if isinstance(wanted, Tokens):
            tokens = wanted
            _check_tokens(tokens, vocabulary)
            small, changes = _trim_model(model, vocabulary, tokens)
        else:
            if loaded.tokenizer is None:
                raise MptkError(
                    f"{loaded.source} has no tokenizer to trim; add the tokenizer's files, or leave out --vocabulary"
                )
            tokens = _choose_tokens(loaded, wanted, vocabulary.rows, multiple if vocabulary.rows % multiple == 0 else 1)
            small, changes = _trim_model(model, vocabulary, tokens)
            assert small.tokenizer is not None
            check_trimmed_reading(wanted(loaded), loaded.tokenizer, small.tokenizer, tokens.keep)
        return cls(model, analyse(small), changes, vocabulary=vocabulary, kept=tokens, corpus=name)

    @property
    def entry(self) -> Entry:
        return {"width": len(self.kept.keep), "of": self.kept.of, "keep": encode_ranges(self.kept.keep)}

    @property
    def tokens(self) -> Sequence[int]:
        return self.kept.keep

    @property
    def note(self) -> str:
        return (
            f"{len(self.kept.keep):,} of {self.kept.of:,} tokens stay, of {self.corpus}; the quality of the dense "
            "model is measured with only these, and other text needs more tokens than before"
        )

    def row(self) -> dict[str, object]:
        return {"of": self.kept.of, "kept": len(self.kept.keep), "corpus": self.corpus, **self.config_row}

    def equal(self, executor: Executor) -> tuple[Program, Program | StageOutputs]:
        return self.after.analysis.program, partial(self._outputs, executor)

    def _outputs(self, executor: Executor, batch: Samples) -> Tensor:
        """The whole model's outputs for samples in the new ids; of logits, only the kept tokens'."""
        kept = torch.tensor(self.kept.keep)
        pairs = zip(batch.tensors, self.vocabulary.inputs, strict=True)
        inputs = [kept[tensor] if is_ids else tensor for tensor, is_ids in pairs]
        found: Tensor = next(executor.outputs([self.before.analysis.program], [inputs]))
        return found.index_select(-1, kept.to(found.device)) if self.vocabulary.predicted else found


def find_corpus(settings: Settings, texts: Sequence[str] | None) -> Corpus:
    """The documents whose tokens stay. ``texts``: the caller's texts in memory."""
    if settings.vocabulary == IN_MEMORY:
        if not texts or not all(isinstance(text, str) for text in texts):
            raise MptkError("vocabulary is empty; give a list of texts, or the name of a file")
        return lambda loaded: ([text] for text in texts)
    return lambda loaded: data.read_documents(str(settings.vocabulary), loaded.tokenizer)


def describe_unread_tokenizer(loaded: Loaded, folder: Path) -> str:
    """The proof's note if the tokenizer in ``folder`` cannot be compared; empty if it can, or if there is none."""
    if loaded.tokenizer is not None or not models.has_tokenizer(folder):
        return ""
    return (
        "the tokenizer was not compared, since the dense model has none; save it beside the dense model, and give "
        "--model DIR"
    )


def _check_tokens(tokens: Tokens, vocabulary: Vocabulary) -> None:
    if tokens.of != vocabulary.rows:
        raise MptkError(f"plan: vocabulary has {vocabulary.rows} tokens in this model, not {tokens.of}")
    if len(tokens.keep) < min(LEAST, tokens.of):
        raise MptkError(f"plan: vocabulary keeps {len(tokens.keep)} tokens; keep {LEAST} or more")


def _choose_tokens(loaded: Loaded, corpus: Corpus, rows: int, multiple: int) -> Tokens:
    """The tokens of the corpus, and the tokens that must stay with them."""
    assert loaded.tokenizer is not None
    choice = Choice(loaded.tokenizer, rows)
    used = find_used_ids(corpus(loaded), loaded.tokenizer)
    if not used:
        raise MptkError("--vocabulary holds no text; give a file, folder or dataset with text")
    named = find_named_ids(loaded.model.config, rows) | find_named_ids(
        getattr(loaded.model, "generation_config", None), rows
    )
    return Tokens(rows, choice.kept(used | named, LEAST, multiple))


def _trim_model(
    model: Analysed, vocabulary: Vocabulary, tokens: Tokens
) -> tuple[Loaded, Mapping[str, Sequence[object]]]:
    """The model with only the rows of the tokens that stay, and its config's changes.

    Raises:
        MptkError: the class has other weights with fewer tokens; or the tokenizer cannot be trimmed.
    """
    loaded, analysis = model.loaded, model.analysis
    table = np.zeros((1, tokens.of), dtype=bool)
    table[0, list(tokens.keep)] = True
    kept = KeptUnits((), table)
    cut = Cut(dict.fromkeys(vocabulary.axes, kept), dict.fromkeys(vocabulary.axes, len(tokens.keep)))
    aliases = analysis.program.aliases
    weights = Weights({}) if loaded.weights is None else loaded.weights
    places = {name: analysis.weights.get(aliases.get(name, name), ()) for name in weights}
    sliced = {n: partial(cut.slice, dims=dims) for n, dims in places.items() if any(map(cut.has_choice, dims))}
    new = {old: i for i, old in enumerate(tokens.keep)}
    config, changes = replace_config_ids(loaded.model.config, new, tokens.of)
    generation = getattr(loaded.model, "generation_config", None)
    if generation is not None:
        generation, more = replace_config_ids(generation, new, tokens.of)
        changes = {**more, **changes}
    small = rebuild_model(
        loaded,
        config,
        replace_config_ids(models.read_stored_config(loaded), new, tokens.of)[0],
        weights.changed(sliced, moves=True),
        tokenizer=None if loaded.tokenizer is None else trim_tokenizer(loaded.tokenizer, tokens.keep),
        generation=generation,
        what=f"{len(tokens.keep)} tokens",
        remedy="leave out --vocabulary",
    )
    return small, changes


AnyConfig = TypeVar("AnyConfig", PreTrainedConfig, GenerationConfig)

_NAMED = re.compile(r"(.*_)?(token_ids?|token_index)|forced_decoder_ids|force_words_ids|lang_to_id|task_to_id")
_FORBIDDEN = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")
"""Fields of tokens that generation forbids or discourages; a removed token is left out of them."""
_PAIRS = "forced_decoder_ids"
"""Fields with pairs of a position and a token."""


def find_named_ids(config: AnyConfig | None, rows: int) -> set[int]:
    """The token ids that a config names, except forbidden ones."""
    return {
        i
        for _, name, value in _list_fields(config)
        if _NAMED.fullmatch(name)
        for i in _list_ids([pair[1:] for pair in value] if name == _PAIRS else value)
        if 0 <= i < rows
    }


def replace_config_ids(
    config: AnyConfig, new: Mapping[int, int], rows: int
) -> tuple[AnyConfig, dict[str, list[object]]]:
    """A copy of a config with ``len(new)`` tokens for ``rows``, and its changes: field → [old, new].

    Ids without a row (−1 for none) stay.
    """
    made, changes = copy.deepcopy(config), dict[str, list[object]]()
    for owner, name, value in list(_list_fields(made)):
        if name.endswith("vocab_size") and value == rows:
            other: object = len(new)
        elif _NAMED.fullmatch(name) or name in _FORBIDDEN:
            other = _replace_ids(value, new, rows, pairs=name == _PAIRS)
        else:
            continue
        if other != value:
            setattr(owner, name, other)
            changes[name] = [value, other]
    return made, changes


def _list_fields(config: AnyConfig | None) -> Iterator[tuple[object, str, Any]]:
    """The fields of a config and of the configs in it: owner, name, value."""
    if config is None:
        return
    names = dict.fromkeys([*vars(config), *getattr(config, "attribute_map", {})])
    for name in names:
        value = find_config_field(config, name) if isinstance(config, PreTrainedConfig) else getattr(config, name, None)
        if isinstance(value, PreTrainedConfig):
            yield from _list_fields(value)
        elif value is not None:
            yield config, name, value


def _list_ids(value: object) -> Iterator[int]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from _list_ids(each)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _replace_ids(value: Any, new: Mapping[int, int], rows: int, *, pairs: bool = False) -> object:
    """The value with new ids. A list loses the entries of removed tokens."""
    if pairs:
        return [[position, _replace_ids(i, new, rows)] for position, i in value]
    if isinstance(value, Mapping):
        return {key: _replace_ids(each, new, rows) for key, each in value.items()}
    if isinstance(value, list | tuple):
        stay = [each for each in value if all(i in new or not 0 <= i < rows for i in _list_ids(each))]
        return type(value)(_replace_ids(each, new, rows) for each in stay)
    known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < rows
    return new[value] if known else value
