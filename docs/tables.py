"""Writes the tables of docs/settings.md from the declarations of settings, and the tables of docs/deploy.md from
``mptk/ir/consumers.py``.

    python docs/tables.py

The same files each time. `tests/house/test_docs_settings.py` compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mptk.config.joined import Settings
from mptk.config.setting import Declared, find_settings
from mptk.ir.consumers import CONSUMERS, LIMITS

PAGES = [Path(__file__).with_name(name) for name in ("settings.md", "deploy.md")]
TABLE = re.compile(r"(<!-- (?P<name>(?!end)\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def written(page: str) -> str:
    """The page with each table, between its mark and the next ``end``, made anew."""
    return TABLE.sub(lambda found: found[1] + "\n" + "\n".join(TABLES[found["name"]]()) + "\n\n", page)


def runs() -> Iterator[str]:
    """The options of ``prune``, ``recover``, ``shapes`` and ``advise`` that are settings, panel by panel."""
    yield from _head("option", "default", "meaning")
    options = find_settings(Settings, "prune").items()
    for panel in dict.fromkeys(each.setting.panel for _, each in options):
        yield _row(f"**{panel}**", "", "")
        for name, each in options:
            if each.setting.panel == panel:
                marks = "".join(
                    mark
                    for mark, other in (("ᴿ", "recover"), ("ˢ", "shapes"), ("ᵃ", "advise"))
                    if each in find_settings(Settings, other).values()
                )
                keyword = "" if each.name == name.replace("-", "_") else f" (`{each.name}`)"
                names = [f"`{choice}`" for choice in each.setting.choices.shown] if each.setting.choices else []
                said = f"{each.setting.help} ({', '.join(names)})" if names else each.setting.help
                yield _row(f"`{_flag(name)}`{keyword} {marks}", _default(each.default), said)


def python() -> Iterator[str]:
    """The settings that have no option of their own."""
    yield from _head("setting", "default", "meaning")
    for each in _leaves(Settings.declared):
        if not each.setting.panel:
            yield _row(f"`{each.path}`", _default(each.default), each.setting.help)


def consumers() -> Iterator[str]:
    """The programs that read a pruned folder."""
    yield from _head("program", "`--engines`", "tried with version", "result")
    for each in CONSUMERS:
        name = f"[{each.name}](#{each.section})" if each.section else each.name
        yield _row(name, f"`{each.engine}`" if each.engine else "", each.version or "not tried", each.result)


def limits() -> Iterator[str]:
    """What programs need of a cut, and which."""
    yield from _head("need", "programs")
    for limit, words in LIMITS.items():
        found = [(each, each.limits[limit]) for each in CONSUMERS if limit in each.limits]
        yield _row(words, "; ".join(f"{each.name.replace(*WIDE)}{_but(types)}" for each, types in found))


TABLES = {"runs": runs, "python": python, "consumers": consumers, "limits": limits}


WIDE = (", a width for each layer", " (nemotron-nas)")


def _but(types: Sequence[str]) -> str:
    return f" (not for {types[0] if len(types) == 1 else f'{len(types)} types'})" if types else ""


def _leaves(declared: Iterable[Declared]) -> Iterator[Declared]:
    for each in declared:
        inner = getattr(each.default, "declared", None)
        yield from [each] if inner is None else (replace(one, path=f"{each.path}.{one.path}") for one in inner)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _default(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value in (None, (), {}) else f"{value}"


def _head(*cells: str) -> tuple[str, str]:
    return _row(*cells), _row(*["---"] * len(cells))


def _row(*cells: str) -> str:
    return f"|{'|'.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in cells)}|"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text()))
