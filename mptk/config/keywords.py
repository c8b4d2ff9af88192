"""keywords: settings as keywords of one call: ``prune(model, sparsity=0.3, steps=100, rank=8)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mptk.config.settings import Learning, LossWeights, Settings, Training
from mptk.errors import MptkError, did_you_mean

_LISTS = ("families", "keep", "quantize")


def with_keywords(settings: Settings, keywords: Mapping[str, Any]) -> Settings:
    """The settings with some fields replaced: of ``Settings``, or of what is in them, by their bare names.

    A ``seed`` is that of everything. A list may be given as one name.

    Raises:
        MptkError: there is no such field (with the nearest name), or its value is refused.
    """
    unknown = sorted(keywords.keys() - set(keyword_names()))
    if unknown:
        raise no_keyword(unknown[0], keyword_names())
    outer, learning, training, losses = (
        {name: _plain(name, keywords[name]) for name in _names(kind) if name in keywords}
        for kind in (Settings, Learning, Training, LossWeights)
    )
    settings = replace(settings, **outer)
    base = replace(settings.learning, **learning)
    train = replace(base.training, **training)
    train = replace(train, losses=replace(train.losses, **losses))
    return replace(settings, learning=replace(base, training=train))


def _plain(name: str, value: Any) -> Any:
    """A value as settings keep it: one name of a list or several as a tuple, and a path as its name."""
    if name in _LISTS and isinstance(value, str | list):
        return (value,) if isinstance(value, str) else tuple(value)
    return str(value) if isinstance(value, Path) else value


def keyword_names() -> list[str]:
    """Every name that ``with_keywords`` knows."""
    return list(dict.fromkeys(name for kind in (Settings, Learning, Training, LossWeights) for name in _names(kind)))


def no_keyword(name: str, known: list[str]) -> MptkError:
    """The error of a keyword that does not exist."""
    return MptkError(f"there is no setting {name!r}; {did_you_mean(name, known, 'help(mptk.Settings) has them all')}")


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]
