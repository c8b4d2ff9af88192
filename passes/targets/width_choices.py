"""width_choices: the widths to choose from, of one family or of families that can only be cut together.

Families of one group are cut in proportion: the config holds one number for all of them, and the others are multiples
of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

Widths = dict[str, int]
WidthChoices = list[Widths]
"""The choices, ascending. All have the same families."""


def list_width_choices(
    ladders: Mapping[str, Sequence[int]], together: Iterable[frozenset[str]], families: Sequence[str]
) -> list[WidthChoices]:
    """The choices among the ``families``, whose legal widths are ``ladders``."""
    groups = [group for group in together if group <= {*families}]
    return [list_proportional_widths(ladders, members) for members in _group_connected(families, groups)]


def list_proportional_widths(ladders: Mapping[str, Sequence[int]], families: Sequence[str]) -> WidthChoices:
    """The legal widths of ``families`` in proportion to their dense widths, or with the only width left to some."""
    sizes = {name: ladders[name][-1] for name in families}
    leader = max(families, key=lambda name: (len(ladders[name]) > 1, -sizes[name]))
    choices = []
    for width in ladders[leader]:
        widths = {name: _follow(ladders[name], sizes[name] * width, sizes[leader]) for name in families}
        if all(w is not None for w in widths.values()):
            choices.append({name: w for name, w in widths.items() if w is not None})
    return choices


def keep_complete_families(families: Sequence[str], together: Collection[frozenset[str]]) -> list[str]:
    """``families`` without any that can be cut only with a family that is not among them."""
    left = list(families)
    while stuck := [name for name in left if find_missing_partners(name, left, together)]:
        left = [name for name in left if name not in stuck]
    return left


def find_missing_partners(name: str, families: Collection[str], together: Collection[frozenset[str]]) -> frozenset[str]:
    """The families that must be cut with ``name`` but are not among ``families``."""
    missing = [group - {*families} for group in together if name in group]
    return min(missing, key=len, default=frozenset())


def _follow(ladder: Sequence[int], product: int, by: int) -> int | None:
    if len(ladder) == 1:
        return ladder[0]
    width, rest = divmod(product, by)
    return width if not rest and width in ladder else None


def _group_connected(families: Sequence[str], groups: Iterable[frozenset[str]]) -> list[list[str]]:
    """The ``families`` in sets that share no group."""
    parts = [[name] for name in families]
    for group in groups:
        joined = [part for part in parts if group & {*part}]
        parts = [part for part in parts if part not in joined] + [[name for part in joined for name in part]]
    return parts
