"""Writes what follows from the declarations of settings: the tables of docs/settings.md, and the types of the keywords
of functions, by which an editor completes them. The tables of docs/deploy.md are from ``mptk/ir/consumers.py``.

    python docs/tables.py

The same files each time. `tests/house/test_docs_settings.py` compares.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import mptk
from mptk.config import Learning, LossWeights, Rates, Training
from mptk.config.joined import Settings
from mptk.config.setting import Declared, find_settings
from mptk.ir.consumers import CONSUMERS, LIMITS

ROOT = Path(__file__).resolve().parents[1]
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


class Typed(NamedTuple):
    """A function whose keywords are settings: those of a command, without ``less``. ``name``: of the type.

    ``base``: the type whose keywords it has, too. ``common``: if it is only a base, the functions that share it.
    """

    name: str
    function: Callable[..., object]
    command: str
    less: tuple[str, ...] = ()
    base: Typed | None = None
    common: str = ""


RECOVERY = Typed("RecoverKeywords", mptk.recover, "recover")
CUT = Typed("CutKeywords", mptk.prune, "prune", ("shared", "sparsity"), RECOVERY, "``mptk.prune`` and ``mptk.ladder``")
KEYWORDS = {
    "mptk/api/keywords.py": (
        RECOVERY,
        CUT,
        Typed("PruneKeywords", mptk.prune, "prune", ("shared",), CUT),  # one size has nothing to share weights with
    ),
    "mptk/features/advise/keywords.py": (Typed("AdviseKeywords", mptk.advise, "advise"),),
    "mptk/features/ladder/keywords.py": (Typed("LadderKeywords", mptk.ladder, "prune", ("sparsity",), CUT),),
    "mptk/features/width_search/keywords.py": (Typed("ShapesKeywords", mptk.shapes, "shapes"),),
}
"""File → what it declares."""
RECORDS = {"learning": Learning, "training": Training, "losses": LossWeights}
"""Records of settings that are keywords, too."""


def declare_keywords(functions: Sequence[Typed]) -> str:
    """The content of a file of ``KEYWORDS``."""
    classes = []
    for each in functions:
        said = f'    """The settings of {each.common or f"``mptk.{each.function.__name__}``"}."""'
        inherited = {} if each.base is None else list_keywords(each.base)
        lines = [f"    {name}: {kind}" for name, kind in list_keywords(each).items() if name not in inherited]
        above = "TypedDict" if each.base is None else each.base.name
        classes.append("\n".join([f"class {each.name}({above}, total=False):", said, "", *lines]))
    body = "\n\n\n".join(classes)
    used = {name for name in ("Iterable", "Mapping") if f"{name}[" in body}
    imports = {
        "collections.abc": sorted(used),
        "pathlib": ["Path"] if "Path" in body else [],
        "typing": [name for name in ("Literal", "TypedDict") if name in body],
    }
    foreign = {each.base.name for each in functions if each.base is not None} - {each.name for each in functions}
    records = (kind.__name__ for kind in (*RECORDS.values(), Rates))
    own = sorted(name for name in records if re.search(rf": {name}$", body, re.MULTILINE))
    lines = [f"from {module} import {', '.join(names)}" for module, names in imports.items() if names]
    lines += [""] if lines and (own or foreign) else []
    lines += [f"from mptk.api.keywords import {name}" for name in sorted(foreign)]
    lines += [f"from mptk.config import {', '.join(own)}"] if own else []
    said = "keywords: the types of settings as keywords. ``python docs/tables.py`` writes this file."
    return "\n".join([f'"""{said}"""', "", "from __future__ import annotations", "", *lines, "", "", body, ""])


def list_keywords(typed: Typed) -> dict[str, str]:
    """Keyword → its type, without the function's own parameters."""
    there = find_settings(Settings, typed.command).values()
    names, own = {each.name for each in there}, {*inspect.signature(typed.function).parameters, *typed.less}
    found = {}
    for each in Settings.declared:
        # A setting without an option says how to train or to cut, so it goes with one that has an option.
        with_it = "lr" if "." in each.path else "sparsity"
        if each in there or (not each.setting.on and with_it in names):
            found[each.name] = format_kind(each)
    found |= {name: kind.__name__ for name, kind in RECORDS.items() if "lr" in names}
    return {name: kind for name, kind in found.items() if name not in own}


def format_kind(each: Declared) -> str:
    """The type of a setting's value as Python takes it, which is more than the field holds (``Declared.to_stored``)."""
    kind = re.sub(r"(\w+\.)+(?=\w)", "", inspect.formatannotation(each.kind)).replace("'", '"')
    if kind.startswith("tuple"):
        return f"str | list[str] | {kind}"
    more = {"share": "str", "path": "Path", "source": "Path | Iterable[str]"}.get(each.setting.form)
    if more is None:
        return kind
    return f"{kind.removesuffix(' | None')} | {more}{' | None' * kind.endswith(' | None')}"


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
    for name, functions in KEYWORDS.items():
        (ROOT / name).write_text(declare_keywords(functions))
