"""Writes the tables of docs/settings.md from the options and settings of the code.

    python docs/tables.py

The same file each time. `tests/test_docs_settings.py` compares.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin

import typer

from mptk.cli.main import app
from mptk.cli.options import FIELDS, RECOVERY
from mptk.cli.shapes import OPTIONS as SEARCH
from mptk.config.settings import Settings

PAGE = Path(__file__).with_name("settings.md")
TABLE = re.compile(r"(<!-- (?P<name>(?!end)\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
EVERYWHERE = {"--help", "--quiet", "--verbose"}


def written(page: str) -> str:
    """The page with each table, between its mark and the next ``end``, made anew."""
    return TABLE.sub(lambda found: found[1] + "\n" + "\n".join(TABLES[found["name"]]()) + "\n\n", page)


def runs() -> Iterator[str]:
    """The options of ``prune``, ``recover`` and ``shapes`` that set a field of ``Settings``, panel by panel."""
    yield from _head("option", "keyword in Python", "default", "what it says")
    for panel in dict.fromkeys(field.panel for field in FIELDS.values()):
        yield _row(f"**{panel}**", "", "", "")
        for name, field in FIELDS.items():
            if field.panel == panel:
                marks = [mark for mark, taken in (("ᴿ", RECOVERY), ("ˢ", SEARCH)) if name in taken]
                shown = f"`--{name.replace('_', '-')}`" + (f" {''.join(marks)}" if marks else "")
                keyword = field.path.rpartition(".")[2]
                choices = field.choices.get("metavar") or "|".join(
                    get_args(field.kind) if get_origin(field.kind) is Literal else ()
                )
                yield _row(shown, f"`{keyword}`", _default(field.default), f"{field.help} {_choices(choices)}")


def python() -> Iterator[str]:
    """The settings that have no option of their own."""
    yield from _head("setting", "default")
    known = {field.path for field in FIELDS.values()}
    for path, value in _leaves(Settings()):
        if path not in known:
            yield _row(f"`{path}`", _default(value))


def commands() -> Iterator[str]:
    """What commands take besides: options that are no settings, and all options of the commands that do not prune."""
    yield from _head("command", "option", "default", "what it says")
    shared: dict[str, set[str]] = defaultdict(set)
    for name, taken in (("prune", FIELDS), ("recover", FIELDS), ("shapes", SEARCH)):
        shared[name] = {f"--{option.replace('_', '-')}" for option in taken}
    for name, command in sorted(typer.main.get_command(app).commands.items()):  # type: ignore[attr-defined]
        for option in command.params:
            flag = next((flag for flag in option.opts if flag.startswith("--")), None)
            if flag is not None and flag not in EVERYWHERE and flag not in shared[name]:
                yield _row(f"`{name}`", f"`{flag}`", _default(option.default), str(option.help))


TABLES = {"runs": runs, "python": python, "commands": commands}


def _leaves(value: object, above: str = "") -> Iterator[tuple[str, object]]:
    for field in fields(value):  # type: ignore[arg-type]
        own = getattr(value, field.name)
        path = f"{above}{field.name}"
        yield from _leaves(own, f"{path}.") if is_dataclass(own) else [(path, own)]


def _choices(shown: str) -> str:
    """``[a|b]`` → one of a, b."""
    names = [name for name in re.split(r"[|,]", shown.strip("[]")) if name]
    return f"(`{'`, `'.join(names)}`)" if names else ""


def _default(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None or value == () else f"{value}"


def _head(*cells: str) -> tuple[str, str]:
    return _row(*cells), _row(*["---"] * len(cells))


def _row(*cells: str) -> str:
    return f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
