"""Writes the tables of docs/settings.md from the declarations of settings and the commands' other options, and the
tables of docs/deploy.md from ``mptk/ir/consumers.py``.

    python docs/tables.py

The same files each time. `tests/test_docs_settings.py` compares.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import typer

from mptk.cli.main import app
from mptk.config.cases import READING
from mptk.config.setting import Declared, taken
from mptk.config.settings import Settings
from mptk.ir.consumers import CONSUMERS, LIMITS

PAGES = [Path(__file__).with_name(name) for name in ("settings.md", "deploy.md")]
TABLE = re.compile(r"(<!-- (?P<name>(?!end)\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
EVERYWHERE = {"--help", "--quiet", "--verbose"}


def written(page: str) -> str:
    """The page with each table, between its mark and the next ``end``, made anew."""
    return TABLE.sub(lambda found: found[1] + "\n" + "\n".join(TABLES[found["name"]]()) + "\n\n", page)


def runs() -> Iterator[str]:
    """The options of ``prune``, ``recover``, ``shapes`` and ``advise`` that are settings, panel by panel."""
    yield from _head("option", "default", "meaning")
    options = taken(Settings, "prune").items()
    for panel in dict.fromkeys(each.setting.panel for _, each in options):
        yield _row(f"**{panel}**", "", "")
        for name, each in options:
            if each.setting.panel == panel:
                marks = "".join(
                    mark
                    for mark, other in (("ᴿ", "recover"), ("ˢ", "shapes"), ("ᵃ", "advise"))
                    if other in each.setting.on
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


def commands() -> Iterator[str]:
    """What commands take besides: options that are no settings, and all options of the commands that do not prune.

    A row serves all commands that have an option with the same default and meaning. What ``runs`` has is only named.
    """
    yield from _head("option", "commands", "default", "meaning")
    above = {
        (_flag(name), _default(each.default), each.setting.help) for name, each in taken(Settings, "prune").items()
    }
    found: dict[tuple[str, str, str], list[str]] = {}
    again: dict[str, list[str]] = {}
    for name, command in sorted(typer.main.get_command(app).commands.items()):  # type: ignore[attr-defined]
        settings = set(map(_flag, taken(Settings, name))) & set(map(_flag, taken(Settings, "prune")))
        shared = {*EVERYWHERE, *(settings if name in READING else ())}
        for option in command.params:
            flag = next((flag for flag in option.opts if flag.startswith("--")), None)
            if flag is not None and flag not in shared:
                row = flag, _default(option.default), str(option.help).partition(" One of ")[0]
                if row in above:
                    again.setdefault(name, []).append(f"`{flag}`")
                else:
                    found.setdefault(row, []).append(name)
    for (flag, default, meaning), names in sorted(found.items()):
        yield _row(f"`{flag}`", ", ".join(names), default, meaning)
    for name, flags in again.items():
        yield _row(", ".join(flags), name, "", "as above")


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
        names = ((each.name.partition(",")[0], ", ".join(types)) for each, types in found)
        yield _row(words, "; ".join(f"{name} (not for {types})" if types else name for name, types in names))


TABLES = {"runs": runs, "python": python, "commands": commands, "consumers": consumers, "limits": limits}


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
