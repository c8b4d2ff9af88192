"""vocabulary: reduce a dense model to the tokens of a corpus or of a plan.

Embedding and output head lose rows; config and tokenizer get the ids of the rows that stay. The proof compares the
logits of the two models. Below the conversion: the ids in configs, then the tokenizer.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from mptk.compat.transformers import find_config_field
from mptk.config import IN_MEMORY, Settings
from mptk.cost.budgets import VOCABULARY
from mptk.errors import DataError, FileError, InputError, ModelError, PlanError
from mptk.features.vocabulary import VocabularySettings
from mptk.files import format_json, make_scratch
from mptk.io import Document, Loaded, data, models, rebuild_model, split_documents
from mptk.ir import Cut, Entry, KeptUnits, Program, Samples, Weights, encode_ranges, read_alignment, read_family
from mptk.protocols import Analyse, Analysed, Change, Conversion
from mptk.reading import Json, read_json
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
    label = "another --vocabulary"
    lever = (VOCABULARY, "give --vocabulary to remove tokens that a text never uses")

    vocabulary: Vocabulary
    kept: Tokens
    corpus: str

    @classmethod
    def find_change(cls, settings: Settings, texts: Mapping[str, Sequence[str]]) -> Change | None:
        if (name := VocabularySettings.of(settings).vocabulary) is None:
            return None
        return partial(cls.trim, find_corpus(name, texts.get(cls.name, ())), name, read_alignment(settings.align).every)

    @classmethod
    def from_entry(cls, entry: Entry) -> Change:
        return partial(cls.trim, Tokens.read(entry), FROM_PLAN, 1)

    @classmethod
    def trim(cls, wanted: Tokens | Corpus, name: str, multiple: int, model: Analysed, analyse: Analyse) -> Conversion:
        """The conversion of ``model``.

        Args:
            wanted: the tokens that stay, or the corpus that decides; ``name``: its name in a report.
            multiple: if the number of tokens is a multiple of this, the new one is, too.
        """
        loaded = model.loaded
        if isinstance(model.task, Module):
            raise InputError(
                "vocabulary trimming needs a text model; leave out example_inputs, or vocabulary", name="vocabulary"
            )
        vocabulary = find_vocabulary(model.analysis, predicts=isinstance(model.task, TokenTask))
        # 1. A plan names the tokens; the model may come without a tokenizer.
        if isinstance(wanted, Tokens):
            tokens = wanted
            _check_tokens(tokens, vocabulary)
            small, changes = _trim_model(model, vocabulary, tokens)
        # 2. A corpus decides, and both tokenizers must then read it alike.
        else:
            if loaded.tokenizer is None:
                raise FileError(
                    f"{loaded.source} has no tokenizer to trim; add the tokenizer's files, or leave out --vocabulary",
                    name=loaded.source,
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

    def to_row(self) -> dict[str, object]:
        return {"of": self.kept.of, "kept": len(self.kept.keep), "corpus": self.corpus, **self.config_row}

    def make_equal_pair(self, executor: Executor) -> tuple[Program, Program | StageOutputs]:
        return self.after.analysis.program, partial(self._compute_outputs, executor)

    def _compute_outputs(self, executor: Executor, batch: Samples) -> Tensor:
        """The whole model's outputs for samples in the new ids; of logits, only the kept tokens'."""
        kept = torch.tensor(self.kept.keep)
        pairs = zip(batch.tensors, self.vocabulary.inputs, strict=True)
        inputs = [kept[tensor] if is_ids else tensor for tensor, is_ids in pairs]
        found: Tensor = next(executor.run_programs([self.before.analysis.program], [inputs]))
        return found.index_select(-1, kept.to(found.device)) if self.vocabulary.predicted else found


def find_corpus(name: str, texts: Sequence[str]) -> Corpus:
    """The documents whose tokens stay: of a source of text, or the caller's ``texts`` in memory."""
    if name == IN_MEMORY:
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError("vocabulary is empty; give a list of texts, or the name of a file", name="vocabulary")
        return lambda loaded: ([text] for text in texts)
    return lambda loaded: data.read_documents(name, loaded.tokenizer)


def _check_tokens(tokens: Tokens, vocabulary: Vocabulary) -> None:
    if tokens.of != vocabulary.rows:
        raise PlanError(
            f"plan: vocabulary has {vocabulary.rows} tokens in this model, not {tokens.of}", name="vocabulary"
        )
    if len(tokens.keep) < min(LEAST, tokens.of):
        raise PlanError(f"plan: vocabulary keeps {len(tokens.keep)} tokens; keep {LEAST} or more", name="vocabulary")


def _choose_tokens(loaded: Loaded, corpus: Corpus, rows: int, multiple: int) -> Tokens:
    """The tokens of the corpus, and the tokens that must stay with them."""
    assert loaded.tokenizer is not None
    choice = Choice(loaded.tokenizer, rows)
    used = find_used_ids(corpus(loaded), loaded.tokenizer)
    if not used:
        raise DataError("--vocabulary holds no text; give a file, folder or dataset with text", name="vocabulary")
    named = find_named_ids(loaded.model.config, rows) | find_named_ids(
        getattr(loaded.model, "generation_config", None), rows
    )
    return Tokens(rows, choice.list_kept(used | named, LEAST, multiple))


def _trim_model(
    model: Analysed, vocabulary: Vocabulary, tokens: Tokens
) -> tuple[Loaded, Mapping[str, Sequence[object]]]:
    """The model with only the rows of the tokens that stay, and its config's changes."""
    loaded, analysis = model.loaded, model.analysis
    # The tokens are an axis like any other: a cut of it slices every weight that has it.
    table = np.zeros((1, tokens.of), dtype=bool)
    table[0, list(tokens.keep)] = True
    kept = KeptUnits((), table)
    cut = Cut(dict.fromkeys(vocabulary.axes, kept), dict.fromkeys(vocabulary.axes, len(tokens.keep)))
    aliases = analysis.program.aliases
    weights = Weights({}) if loaded.weights is None else loaded.weights
    places = {name: analysis.weights.get(aliases.get(name, name), ()) for name in weights}
    sliced = {n: partial(cut.slice, dims=dims) for n, dims in places.items() if any(map(cut.has_choice, dims))}

    # Both configs name tokens by id. If they change the same field, the report shows the model config's change.
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
        weights.with_edits(sliced, moves=True),
        tokenizer=None if loaded.tokenizer is None else trim_tokenizer(loaded.tokenizer, tokens.keep),
        generation=generation,
        what=f"{len(tokens.keep)} tokens",
        remedy="leave out --vocabulary",
    )
    return small, changes


# ---- the ids in configs ----

AnyConfig = TypeVar("AnyConfig", PreTrainedConfig, GenerationConfig)

_NAMED = re.compile(r"(.*_)?(token_ids?|token_index)|forced_decoder_ids|force_words_ids|lang_to_id|task_to_id")
"""Fields of tokens that a model or its generation needs; these tokens stay."""
_FORBIDDEN = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")
"""Fields of tokens that generation forbids or discourages; a removed token is left out of them."""
_PAIRS = "forced_decoder_ids"
"""A field with pairs of a position and a token."""


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
    # A list: two names may stand for one field, and both must be read before either is set.
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
    # A class may have a field only under another name (``attribute_map``): it stands for the same value.
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


# ---- the tokenizer ----
#
# A ``tokenizer.json`` has one of four models, and these tokens must stay to read texts as before:
# 1. BPE builds a token by merges. The merges within a token do not depend on its surroundings, so each token has fixed
#    intermediate tokens. If these stay, with every merge whose parts and result stay, the merge of the lowest rank is
#    at each step the same as before.
# 2. WordPiece takes the longest token that fits. If it stays, it is still the longest.
# 3. Unigram takes the likeliest sequence. If it stays, it is still the likeliest, and among equals still the first one
#    found. An unknown character costs more than the unlikeliest token, so this token stays, too.
# 4. WordLevel looks a word up.
#
# To read any text afterwards, all bytes stay or, without bytes, all single characters.

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A token of a byte, of models that fall back to bytes."""


def map_token_ids(model: Json) -> dict[str, int]:
    """Token → id of a tokenizer's model."""
    entries = model["vocab"]
    return dict(entries) if isinstance(entries, Mapping) else {token: i for i, (token, _) in enumerate(entries)}


def check_kind(tokenizer: Json) -> None:
    """Raise MptkError unless the model of a ``tokenizer.json`` is one of the four and deterministic."""
    model = tokenizer["model"]
    if model.get("type") not in ("BPE", "WordPiece", "Unigram", "WordLevel"):
        raise ModelError(
            f"a tokenizer of the kind {model.get('type')} cannot be trimmed; leave out --vocabulary", name="tokenizer"
        )
    if model.get("dropout"):
        raise ModelError(
            "a tokenizer with dropout reads a text differently each time; set dropout to null in its file",
            name="dropout",
        )


def find_spelling_tokens(tokenizer: Json) -> set[str]:
    """The tokens that always stay: bytes or single characters, which spell any text, and the unknown token."""
    model = tokenizer["model"]
    tokens = map_token_ids(model)
    if model["type"] == "WordLevel":
        return {model["unk_token"]} & tokens.keys()
    # Bytes spell any text if the model falls back to them. If each character of its input stands for a byte, these 256
    # do. Otherwise every single character that it knows stays, inside and at the ends of words.
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    spelled = {token for token in tokens if _BYTE.fullmatch(token)} if model.get("byte_fallback") else set[str]()
    letters: Iterable[str] = [] if spelled else {token.removeprefix(prefix).removesuffix(suffix) for token in tokens}
    if any(_has(tokenizer.get(part), "ByteLevel") for part in ("normalizer", "pre_tokenizer")):
        letters = ByteLevel.alphabet()
    single = [letter for letter in letters if len(letter) == 1]
    spelled |= {start + c + end for c in single for start in {"", prefix} for end in {"", suffix}} & tokens.keys()
    if model["type"] == "Unigram":
        spelled.add(min(model["vocab"], key=lambda entry: entry[1])[0])
        unknown = [] if model.get("unk_id") is None else [model["vocab"][model["unk_id"]][0]]
    else:
        unknown = [model["unk_token"]] if model.get("unk_token") in tokens else []
    return spelled.union(unknown)


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
            # As BPE does it: the pair of the lowest rank first, the leftmost of equal ones.
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
    """The tokens of a tokenizer that stay. ``rows``: the rows of the model's embedding."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        self.content = read_tokenizer_content(tokenizer)
        self.rows = rows
        self.merges = Merges(self.content["model"])
        self.ids = {**self.merges.tokens, **{each["content"]: each["id"] for each in self.content["added_tokens"]}}
        self.names = {number: token for token, number in self.ids.items()}
        if (last := max(self.names)) >= rows:
            raise ModelError(
                f"the tokenizer's token {self.names[last]!r} has the id {last}, and the model has {rows} rows; resize "
                "the model's embedding to its tokenizer first, or leave out --vocabulary",
                name=self.names[last],
            )

    def list_kept(self, used: Iterable[int], least: int, multiple: int) -> tuple[int, ...]:
        """The ids that stay, ascending: used tokens and their parts, special tokens, and bytes or characters.

        Tokens of the lowest ids, with the tokens that they are built from, fill up to ``least`` and to a ``multiple``.
        """
        always = {self.ids[token] for token in find_spelling_tokens(self.content)}
        always |= {each["id"] for each in self.content["added_tokens"]}
        stay = {other for number in {*used, *always} for other in self._with_parts(number)}

        # Low ids are common tokens in most vocabularies. A token whose parts would be too many waits: once all its
        # parts are there, the next round may take it.
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
        raise ModelError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so its vocabulary cannot be trimmed; convert it to "
            "a tokenizer.json, or leave out --vocabulary",
            name=type(tokenizer).__name__,
        )
    content: Json = json.loads(backend.to_str())
    check_kind(content)
    return content


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> PreTrainedTokenizerBase:
    """The tokenizer with only the tokens ``kept``; a token's id is its position in ``kept``."""
    new = {old: i for i, old in enumerate(kept)}
    content = read_tokenizer_content(tokenizer)
    small = trim_content(content, new)
    with make_scratch() as place:
        # The class writes what it needs beside tokenizer.json, such as its settings and chat template. Copies of the
        # whole vocabulary are removed: transformers could read these.
        tokenizer.save_pretrained(place.folder)
        for file in place.folder.iterdir():
            if file.suffix in (".txt", ".model") or file.name in ("vocab.json", "added_tokens.json"):
                file.unlink()
        settings = read_json(
            place.folder / _SETTINGS, lambda why: FileError(f"{_SETTINGS} is damaged: {why}", name=_SETTINGS)
        )
        decoder = settings.get("added_tokens_decoder")
        if isinstance(decoder, Mapping):
            settings["added_tokens_decoder"] = {str(new[int(i)]): entry for i, entry in decoder.items()}
        for name, value in ((_FILE, small), (_SETTINGS, settings)):
            (place.folder / name).write_text(format_json(value, ensure_ascii=False), encoding="utf-8")
        # Read back as a user will, so that the run has the tokenizer that the folder gives.
        found = _read_back(type(tokenizer), place.folder)
    # transformers may build a class's tokenizer from other files, or add tokens of its own.
    expected = {token: new[i] for token, i in tokenizer.get_vocab().items() if i in new}
    if found is None or found.get_vocab() != expected:
        raise ModelError(
            f"transformers reads a trimmed {type(tokenizer).__name__} back with other tokens; leave out --vocabulary",
            name=type(tokenizer).__name__,
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
            raise ModelError(
                f"the trimmed {type(dense).__name__} reads the text differently ({piece[:40]!r}…); please report this "
                "tokenizer, and leave out --vocabulary",
                name=type(dense).__name__,
            )
