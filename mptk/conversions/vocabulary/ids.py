"""ids: find the token ids in a model's configs, and renumber them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from transformers import GenerationConfig, PreTrainedConfig

from mptk.io.fields import field

AnyConfig = TypeVar("AnyConfig", PreTrainedConfig, GenerationConfig)

_NAMED = re.compile(r"(.*_)?(token_ids?|token_index)|forced_decoder_ids|force_words_ids|lang_to_id|task_to_id")
_FORBIDDEN = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")
"""Fields of tokens that generation forbids or discourages; a removed token is left out of them."""
_PAIRS = "forced_decoder_ids"
"""Fields with pairs of a position and a token."""


def named_ids(config: AnyConfig | None, rows: int) -> set[int]:
    """The token ids that a config names, except forbidden ones."""
    return {
        i
        for _, name, value in _fields(config)
        if _NAMED.fullmatch(name)
        for i in _numbers([pair[1:] for pair in value] if name == _PAIRS else value)
        if 0 <= i < rows
    }


def renumbered(config: AnyConfig, new: Mapping[int, int], rows: int) -> tuple[AnyConfig, dict[str, list[Any]]]:
    """A copy of a config with ``len(new)`` tokens for ``rows``, and its changes: field → [old, new].

    Ids without a row (−1 for none) stay.
    """
    made, changes = copy.deepcopy(config), dict[str, list[Any]]()
    for owner, name, value in list(_fields(made)):
        if name.endswith("vocab_size") and value == rows:
            other: Any = len(new)
        elif _NAMED.fullmatch(name) or name in _FORBIDDEN:
            other = _renumbered(value, new, rows, pairs=name == _PAIRS)
        else:
            continue
        if other != value:
            setattr(owner, name, other)
            changes[name] = [value, other]
    return made, changes


def _fields(config: AnyConfig | None) -> Iterator[tuple[Any, str, Any]]:
    """The fields of a config and of the configs in it: owner, name, value."""
    if config is None:
        return
    names = dict.fromkeys([*vars(config), *getattr(config, "attribute_map", {})])
    for name in names:
        value = field(config, name) if isinstance(config, PreTrainedConfig) else getattr(config, name, None)
        if isinstance(value, PreTrainedConfig):
            yield from _fields(value)
        elif value is not None:
            yield config, name, value


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _renumbered(value: Any, new: Mapping[int, int], rows: int, *, pairs: bool = False) -> Any:
    """The value with new ids. A list loses the entries of removed tokens."""
    if pairs:
        return [[position, _renumbered(i, new, rows)] for position, i in value]
    if isinstance(value, Mapping):
        return {key: _renumbered(each, new, rows) for key, each in value.items()}
    if isinstance(value, list | tuple):
        stay = [each for each in value if all(i in new or not 0 <= i < rows for i in _numbers(each))]
        return type(value)(_renumbered(each, new, rows) for each in stay)
    known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < rows
    return new[value] if known else value
