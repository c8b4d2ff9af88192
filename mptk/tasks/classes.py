"""classes: which task a transformers class belongs to, by transformers' own lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedConfig, PreTrainedModel


def known_to(
    lists: Iterable[Mapping[str, str | Sequence[str]]],
    config: PreTrainedConfig,
    classes: set[type[PreTrainedModel]],
    what: str,
) -> str | None:
    """None if all ``classes`` are in these lists of transformers, else that the class does not do ``what``.

    ``lists``: model type → name of a class, or several.
    """
    entries = [entry for named in lists for entry in named.values()]
    known = {name for entry in entries for name in ((entry,) if isinstance(entry, str) else entry)}
    names = {c.__name__ for c in classes}
    if names and names <= known:
        return None
    return f"{min(names, default=type(config).__name__)} does not {what}"
