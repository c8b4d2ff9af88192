"""setting: the declaration of a setting, and what follows from it: checks, keywords and saved values.

A setting is a field of a dataclass that extends ``Record``, with the default ``declare_setting(…)``. The command line,
recipes, Python keywords, checks and ``docs/settings.md`` are made from these declarations.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, get_origin, get_type_hints

from mptk.arguments import check_arguments
from mptk.errors import InputError, KeywordError, MptkError, list_close_names, suggest_name
from mptk.plugins import explain_absent, find_entries, list_features, list_part_names

Default = TypeVar("Default")
AnyRecord = TypeVar("AnyRecord", bound="Record")
COUNT = 10**9
"""Upper bound for windows, tokens and steps."""
SEED = (0, 2**32 - 1)
"""Bounds of a seed."""


@dataclass(frozen=True)
class Choices:
    """The values that a setting may have.

    ``plugins``: groups of entry points, whose names are values too; ``parts``: as well as the names in this field of
    features, which the help shows.
    ``numbered``: names that may end with a number, such as ``cuda:1``. ``or_ranges``: or numbers, such as ``5-20,28``.
    ``alone``: names that a user cannot combine with others.
    """

    names: tuple[str, ...]
    plugins: tuple[str, ...] = ()
    parts: str = ""
    numbered: tuple[str, ...] = ()
    or_ranges: bool = False
    alone: tuple[str, ...] = ()

    @property
    def shown(self) -> list[str]:
        """The values as the help shows them."""
        names = dict.fromkeys([*self.names, *(list_part_names(self.parts) if self.parts else ())])
        named = [word for name in names for word in (name, f"{name}:N")[: 1 + (name in self.numbered)]]
        return [*named, "5-20,28"] if self.or_ranges else named

    def list_values(self) -> list[str]:
        """All values, with those of installed plugins."""
        parts = list_part_names(self.parts) if self.parts else []
        others = (entry.name for group in self.plugins for entry in find_entries(group))
        return list(dict.fromkeys([*self.names, *parts, *others]))

    def explain_wrong(self, value: str) -> str | None:
        """What is wrong with a value; None if it is allowed."""
        # The type of a device may have a number, and layers may be given by theirs.
        known = self.list_values()
        if value in known or (re.fullmatch(r"(\w+):\d+", value) and value.partition(":")[0] in self.numbered):
            return None
        if self.or_ranges and parse_numbers(value):
            return None
        hint = suggest_name(value, known, "")
        numbers = ", or give numbers as 5-20,28" if self.or_ranges else ""
        return f"{value!r} is not known; {f'{hint} ' if hint else ''}choose one of {', '.join(known)}{numbers}"


@dataclass(frozen=True)
class Asked:
    """What a command is asked to do. ``settings`` are complete. ``learns``: its method learns masks in steps.

    ``writes``: it has an output folder. ``estimate``: it only estimates what the run needs. ``undecided``: some numbers
    are left to its minutes. ``instead``: settings in whose place it uses something else, and what. ``decodes``: it
    predicts decoding beside its budget.
    """

    settings: Any
    learns: bool = True
    writes: bool = True
    estimate: bool = False
    undecided: bool = True
    instead: Mapping[str, str] = field(default_factory=dict)
    decodes: bool = False


@dataclass(frozen=True)
class Idle:
    """A case in which a setting does nothing, the reason, and the remedy, in which ``{name}`` is an option's flag."""

    when: Callable[[Asked], object]
    why: str
    remedy: str | Callable[[Asked], str] = "leave it out"


@dataclass(frozen=True)
class Setting:
    """The declaration of a setting.

    ``panel``: the panel of the help that shows the option; without a panel there is no option. ``on``: the commands
    that have the option, or roles of commands (``mptk.config.cases``). ``idle``: cases in which it does nothing; errors
    name the first that holds. ``within``: bounds of a number. ``option``: the option's name, if it differs from the
    field's; ``renamed``: its name in some commands. ``form``: how a value is typed that is not a word or a number.
    ``recipe``: a run writes the setting into its recipe, only reads it from one, or refuses it there, because others
    write recipes. ``resumable``: an unfinished run may go on with another value. ``in_plan``: a plan says what it did,
    so a run that repeats a plan has the default. ``said_in_call``: it holds only in the call in which the caller said
    it: no file stores or sets it. ``after``: the setting below which it stands in help, if it is a feature's.
    """

    help: str
    panel: str = ""
    on: tuple[str, ...] = ()
    idle: tuple[Idle, ...] = ()
    within: tuple[float, float] | None = None
    choices: Choices | None = None
    option: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    form: Literal["plain", "share", "size", "path", "source", "number or text"] = "plain"
    recipe: Literal["written", "read", "refused"] = "written"
    resumable: bool = False
    in_plan: bool = False
    said_in_call: bool = False
    after: str = ""


def declare_setting(default: Default, *declared: Any, **more: Any) -> Default:
    """Declare a field of a ``Record`` as a setting. Arguments are the fields of ``Setting``, in order or by name.

    For type checkers it returns the default, so that ``name: int = declare_setting(1, …)`` is an int.
    """
    # A dict as a default would be shared by all records: dataclasses refuse it.
    given: Any = {"default_factory": default.copy} if isinstance(default, dict) else {"default": default}
    made: Default = field(**given, metadata={Setting: Setting(*declared, **more)})
    return made


@dataclass(frozen=True)
class Declared:
    """A setting and its field: the dotted ``path`` to it, its type and its default."""

    path: str
    kind: object
    default: object
    setting: Setting

    @property
    def name(self) -> str:
        """The field's name, which is the Python keyword."""
        return self.path.rpartition(".")[2]

    def name_option(self, command: str = "") -> str:
        """The option's name in a command."""
        return self.setting.renamed.get(command) or self.setting.option or self.name

    def of(self, record: Record) -> object:
        """The setting's value in a record."""
        return attrgetter(self.path)(record)

    def to_stored(self, value: object) -> object:
        """A value as the field stores it: a name or several names as a tuple, a path as text, ``30%`` as 0.3."""
        # Callers give one name or a list, and JSON has only lists. Settings are frozen, so they hold tuples.
        if self.setting.form == "share" and isinstance(value, str):
            return parse_share(value, self.name)
        if get_origin(self.kind) is tuple and isinstance(value, str | list):
            return (value,) if isinstance(value, str) else tuple(value)
        return str(value) if isinstance(value, Path) else value

    def check(self, value: Any) -> None:
        """Raise MptkError if a value is outside its bounds or not among its choices."""
        # A name that may be a plugin's is checked where it is looked up (`find_method`, `find_target`).
        bounds, choices = self.setting.within, self.setting.choices
        if value is not None and bounds is not None and (wrong := find_bound_error(value, *bounds)) is not None:
            raise InputError(
                f"{self.name}: {wrong}; give a number from {format_number(bounds[0])} to {format_number(bounds[1])}",
                name=self.name,
            )
        if value is not None and choices is not None and not choices.plugins:
            for each in value if isinstance(value, tuple) else (value,):
                if (wrong := choices.explain_wrong(each)) is not None:
                    raise InputError(
                        f"{self.name}: {wrong}",
                        name=self.name,
                        nearest=list_close_names(each, choices.list_values(), cutoff=0),
                    )


class Record:
    """Settings and records of settings. Each value is checked against its declaration.

    ``declared``: all settings of this record and of the records in it, in order.
    """

    declared: ClassVar[tuple[Declared, ...]] = ()
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # for type checkers: it is a dataclass

    @classmethod
    def of(cls, record: Record) -> Self:
        """Settings as those of a feature: the record of all settings has the fields of each feature's."""
        assert isinstance(record, cls), f"the settings of {cls.__name__} are not among those of this record"
        return record

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        # A record that is a field has checked its own settings when it was made.
        for each in self.declared:
            if "." not in each.path:
                each.check(getattr(self, each.path))


def record(kind: type[AnyRecord]) -> type[AnyRecord]:
    """Collect the declarations of a dataclass. Its docstring gets a line for each."""
    hints, found = get_type_hints(kind), list[Declared]()
    # A field is a setting, or a record whose settings are this record's too, under a dotted path.
    for each in fields(kind):
        if Setting in each.metadata:
            default = each.default_factory() if callable(each.default_factory) else each.default
            found.append(Declared(each.name, hints[each.name], default, each.metadata[Setting]))
        else:
            found += [replace(inner, path=f"{each.name}.{inner.path}") for inner in hints[each.name].declared]
    found = order_settings(found)
    lines = [f"- ``{each.path}``: {each.setting.help}" for each in found]
    kind.__doc__ = "\n".join([inspect.cleandoc(str(kind.__doc__)), "", *lines])
    kind.declared = tuple(found)
    return kind


def order_settings(found: Sequence[Declared]) -> list[Declared]:
    """Sort settings as the help shows them. A setting with ``after`` goes below the setting that it names."""
    ordered = [each for each in found if not each.setting.after]
    for each in [each for each in found if each.setting.after]:
        # Below others that stand after the same one; at the end if that one is not there.
        places = [i for i, other in enumerate(ordered, 1) if each.setting.after in (other.path, other.setting.after)]
        ordered.insert(places[-1] if places else len(ordered), each)
    return ordered


def find_settings(kind: type[Record], command: str) -> dict[str, Declared]:
    """Option → setting of a command."""
    groups, further = list_roles(command)
    return {
        each.name_option(command): each for each in kind.declared if groups & {*each.setting.on} or each.name in further
    }


def list_roles(command: str) -> tuple[set[str], set[str]]:
    """A command's name with its roles; and the settings that it takes besides. A feature says them of its commands."""
    found = [each for feature in list_features().values() for each in feature.commands if each.name == command]
    return {command, *(role for each in found for role in each.roles)}, {name for each in found for name in each.takes}


def collect_values(record: Record, command: str) -> dict[str, Any]:
    """Keyword → value of the record's own settings that a command has."""
    return {
        each.path: each.of(record) for each in find_settings(type(record), command).values() if "." not in each.path
    }


def find_idle(command: str, asked: Asked) -> dict[str, str]:
    """Option of a command that would do nothing → the reason and the remedy."""
    # Remedies name options, whose names may differ between commands.
    kind = type(asked.settings)
    flags = {each.name: f"--{each.name_option(command).replace('_', '-')}" for each in kind.declared}
    found = {
        name: f"{rule.why}; {(rule.remedy if isinstance(rule.remedy, str) else rule.remedy(asked)).format_map(flags)}"
        for name, each in find_settings(kind, command).items()
        for rule in reversed(each.setting.idle)  # of several the first one counts
        if rule.when(asked)
    }
    return {**found, **asked.instead}


# ---- values from outside ----


def with_keywords(record: AnyRecord, values: Mapping[str, object]) -> AnyRecord:
    """Copy the record with some values replaced. Keywords are names of its fields, or of fields of the records in it.

    A name that several records share, such as ``seed``, is set in all of them. One name may stand for a list of one.

    Raises:
        MptkError: there is no such field (the message has the nearest name), or its value is refused.
    """
    known = list_names(record)
    if unknown := sorted(values.keys() - set(known)):
        hints = [explain_absent(), suggest_name(unknown[0], known, "help(mptk.Settings) has them all")]
        raise KeywordError(
            f"there is no setting {unknown[0]!r}; {'; '.join(filter(None, hints))}",
            name=unknown[0],
            nearest=list_close_names(unknown[0], known),
        )
    return _replace_values(record, values)


def list_names(record: Record | type[Record]) -> list[str]:
    """The keywords: settings and records of settings, each once."""
    return list(dict.fromkeys(name for each in record.declared for name in each.path.split(".")))


def _replace_values(record: AnyRecord, values: Mapping[str, object]) -> AnyRecord:
    # A record may be given as a whole, and some of its fields beside it: these count.
    kept = {each.path: each.to_stored for each in record.declared}
    changes = {}
    for name, inner in vars(record).items():
        given = values.get(name, inner)
        if isinstance(given, Record) and name not in kept:
            given = _replace_values(given, values)
        changes[name] = kept[name](given) if name in kept else given
    return replace(record, **changes)


def to_json(record: Record) -> dict[str, object]:
    """The record as plain values, without settings that hold only in the call in which they were said."""
    inner = {each.path for each in type(record).declared if each.setting.said_in_call}
    assert not any("." in path for path in inner), "a setting said in a call is in no inner record"
    values = asdict(record)
    names = dict.fromkeys(each.path.partition(".")[0] for each in type(record).declared)
    return {name: values[name] for name in names if name not in inner}


def from_json(kind: type[AnyRecord], data: object, where: str) -> AnyRecord:
    """Read a record back from ``to_json``. Fields that this version lacks are ignored, and those said in each call.

    Raises:
        ValueError: ``data`` does not hold such a record; the message says where.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} is not an object")
    # Fields that are missing keep their defaults: an earlier version did not have them.
    known, hints = {each.path: each for each in kind.declared}, get_type_hints(kind)
    given: dict[str, object] = {}
    for name in (each.name for each in fields(kind)):
        if isinstance(hints[name], type) and issubclass(hints[name], Record):
            given[name] = from_json(hints[name], data.get(name), f"{where}.{name}")
        elif name in data and not known[name].setting.said_in_call:
            given[name] = known[name].to_stored(data[name]) if isinstance(data[name], list) else data[name]
    try:
        return kind(**given)
    except MptkError as error:  # a value that no record takes
        raise ValueError(f"{where}: {error}") from error


# ---- numbers ----


def parse_share(text: str, option: str = "") -> float:
    """``30%`` or ``0.3`` → 0.3. ``option``: its name, for the error."""
    found = re.fullmatch(r"([0-9]{0,15}\.?[0-9]{1,15}(?:e-?[0-9]{1,2})?) *(%?)", text.strip(), re.ASCII)
    if found is None:
        raise InputError(
            f"{option} {shorten_typed(text)}: write a share, as 0.3 or 30%".strip(),
            name=option.removeprefix("--").replace("-", "_"),
        )
    return float(found[1]) / 100 if found[2] else float(found[1])


def shorten_typed(text: str) -> str:
    """A typed value as an error repeats it: a shell may paste a whole file."""
    return text if len(text) <= 40 else f"{text[:40]}…"


def parse_numbers(text: str) -> frozenset[int]:
    """``5-7,28`` → {5, 6, 7, 28}; empty if ``text`` is something else."""
    # Five digits are more layers than any model has, and bound the memory that a range from a file takes.
    if not re.fullmatch(r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*", text, re.ASCII):
        return frozenset()
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    ranges = [range(each[0], each[-1] + 1) for each in ends]
    return frozenset(itertools.chain(*ranges)) if all(ranges) else frozenset()


def find_bound_error(value: float, least: float, most: float) -> str | None:
    """What is wrong with a number that is not finite or outside of its bounds; None if it is right."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if value < least:
        return f"{format_number(value)} is less than {format_number(least)}"
    return f"{format_number(value)} is more than {format_number(most)}" if value > most else None


def format_number(value: float) -> str:
    """A number as messages show it; a very long one is only called long."""
    # Python refuses to print an integer of more than 4,300 digits.
    if isinstance(value, int) and abs(value) >= 10**24:
        return "a number of many digits"
    return str(value)
