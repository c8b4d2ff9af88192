"""options: the options of the commands. Options of settings are made from the declarations in ``mptk/config/``.

A command with a parameter ``settings: Settings`` has the options that are declared for it, and gets their values.
``--config`` reads options from a YAML file (``mptk/config/recipe.py``). Options that name a file or a folder to write
refuse a path that cannot be written, before any work: a run of hours must not end there.

In this order: what is written, words of several values, settings, options that would do nothing, latency, recipes.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import stat
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import typer
from typer.models import OptionInfo

from mptk.config import (
    COUNT,
    CUT,
    READING,
    AnyRecord,
    Asked,
    Choices,
    Declared,
    Record,
    Settings,
    find_bound_error,
    find_idle,
    find_settings,
    format_number,
    list_roles,
    parse_share,
    shorten_typed,
    with_keywords,
)
from mptk.config.choices import ONE_SHOT
from mptk.errors import DataError, FileError, InputError, MptkError, OutputError, list_close_names, suggest_name
from mptk.files import expand_path, tidy, tidy_scratch
from mptk.files.outputs import check_apart, check_file
from mptk.reading import Json, read_json_object

TYPED: ContextVar[frozenset[str]] = ContextVar("typed", default=frozenset())
"""The names of the running command's options that the user typed, without the recipe's. In a context variable, because
typer calls the code that needs it and hands nothing on."""

ModelArgument = Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, or an alias of `mptk models`.")]
Folder = Annotated[Path, typer.Argument(help="The --out folder of `mptk prune`.")]
DenseOption = Annotated[str | None, typer.Option("--model", help="The dense model, if it has moved.")]


# ---- files and folders to write ----


class OutputOption(OptionInfo):
    """An option that names what a command writes. By its class ``check_output_paths`` tells it from all others.

    ``flag``: as it is typed; empty: after the parameter. ``content``: of a file, as ``mptk.files.outputs.check_file``
    knows it; empty for a folder. ``check``: the callback.
    """

    def __init__(self, flag: str, content: str, check: Callable[[Path | None], Path | None], help: str) -> None:
        # As typer.Option does: its first argument is the flag, or ... for a name made of the parameter's.
        super().__init__(default=flag or ..., param_decls=(), callback=check, help=help)
        self.flag, self.content = flag, content


def make_file_check(*suffixes: str, dash: bool = False) -> Callable[[Path | None], Path | None]:
    """The callback of an option for a file. ``suffixes``: allowed ones. ``dash``: - is the standard output."""

    def check(path: Path | None) -> Path | None:
        if path is None or (dash and path == Path("-")):
            return path
        if suffixes and path.suffix.lower() not in suffixes:
            raise typer.BadParameter(f"{path} ends in none of {', '.join(suffixes)}. Give another name.")
        mode = _find_mode(path)
        # A device or a named pipe would take what is written, but cannot be replaced as a whole.
        if mode is not None and stat.S_ISDIR(mode):
            raise typer.BadParameter(f"{path} is a folder. Give the name of a file.")
        if mode is not None and not stat.S_ISREG(mode):
            raise typer.BadParameter(f"{path} is not an ordinary file. Give the name of a file.")
        _check_above(path)
        return path

    return check


def check_output_folder(path: Path | None) -> Path | None:
    """The callback of an option for a folder."""
    if path is not None:
        _find_mode(path)  # it may be anything, but its name must be one that the file system takes
        _check_above(path)
    return path


def _find_mode(path: Path) -> int | None:
    """The kind of file at ``path``; None if there is none."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be used: {error.strerror}. Give another name.") from error
    except ValueError as error:  # a null character
        raise typer.BadParameter(f"{path} cannot be used: {error}. Give another name.") from error


def _check_above(path: Path) -> None:
    """Check the innermost folder that exists: the others are made in it."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise typer.BadParameter(f"{above} is not a folder, so nothing can be in it. Give another name.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"you may not write to {above}. Give a folder that you may write to.")
    try:  # of /proc, root is told that it may write there
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise typer.BadParameter(f"{above} takes no files: {error.strerror}. Give another folder.") from error


def make_folder_option(help: str) -> OptionInfo:
    """The option ``--out`` for a folder."""
    return OutputOption("--out", "", check_output_folder, help)


def make_file_option(help: str, content: str, *suffixes: str, flag: str = "", dash: bool = False) -> OptionInfo:
    """An option for a file. ``content``: as of ``OutputOption``. ``suffixes``: allowed ones. ``dash``: - is stdout."""
    return OutputOption(flag, content, make_file_check(*suffixes, dash=dash), help)


OPERANDS = ("model", "models", "folder", "folders", "like", "include_path", "image", "config")
"""Parameters that name what a command reads, beside settings."""
READ_PLACES = tuple(each.name for each in Settings.declared if each.setting.form == "path")
SAMPLES_FROM = tuple(each.name for each in Settings.declared if each.setting.form == "source")
"""Settings that name what is read: a file or folder; sources of samples and texts."""
REPORT_JSON = "report.json"
SPARE_TOKENS = 2
"""Tokens that a text may have beyond its bytes: one before it, and one for a space that the tokenizer puts there."""


def check_names(values: Mapping[str, object], outputs: Container[str], annotations: Mapping[str, object]) -> None:
    """Raise MptkError for models, results and data that are not there, before torch is imported, which takes seconds.

    ``values``: parameter → value. ``outputs``: the parameters for files and folders that the command writes.
    ``annotations``: of the command's own parameters.
    """
    from mptk.io import check_folder_named, check_local_model, check_model_name, check_sources, is_made

    for name, given in values.items():
        for each in given if isinstance(given, list) else [given]:
            if each is None or name in outputs:
                continue
            if name in ("model", "models"):
                path = check_model_name(str(each))
                # A graph, or a folder of graphs, may stand for a model where one is run.
                dense = annotations.get(name) in (ModelArgument, DenseOption) and path.suffix != ".onnx"
                if dense and path.exists() and not is_made(path):
                    check_local_model(str(each), path)
            elif name in ("folder", "folders"):
                check_folder_named(str(each), "prune")
            elif name in SAMPLES_FROM:
                check_sources(str(each))
    read = next((values[name] for name in ("model", "folder") if name in values and name not in outputs), None)
    length, data = values.get("length"), values.get("data")
    if read is not None and data is not None and isinstance(length, int):
        check_enough_text(str(read), str(data), length)


def list_hub_names(values: Mapping[str, object], annotations: Mapping[str, object]) -> list[str]:
    """The models that a command reads and that are not on this machine, so that only a hub can have them."""
    from mptk.io import find_naming_loader

    dense = [values[name] for name, each in annotations.items() if each in (ModelArgument, DenseOption)]
    models = values.get("models")
    given = [str(each) for each in (*dense, *(models if isinstance(models, list) else [])) if each is not None]
    return [name for name in given if not expand_path(name).exists() and find_naming_loader(name) is None]


def check_enough_text(model: str, data: str, length: int) -> None:
    """Raise MptkError if a decoder gets less text than one window of ``length`` has, as far as that is known.

    Nothing is known of a model that has not been fetched, and of tables and folders.
    """
    from mptk.io import count_plain_text, count_positions

    size, positions = count_plain_text(data), count_positions(model)
    if size is None or positions is None:
        return
    window = min(length, positions)
    if size + SPARE_TOKENS < window:
        raise DataError(
            f"{data} has {size} bytes, too few for a window of {window} tokens; give more, or a shorter --length",
            name="data",
        )


def check_output_paths(outputs: Mapping[str, OutputOption], values: Mapping[str, object], overwrite: bool) -> None:
    """Raise MptkError if a command would replace what it reads, one of its other outputs, or a file of somebody else.

    ``outputs``: parameters that name what it writes. ``values``: of all parameters.
    """
    # - is the standard output.
    written = {
        name: Path(str(values[name])) for name in outputs if values[name] is not None and values[name] != Path("-")
    }
    places = [] if not written else list(_read(values, outputs))
    for name, path in written.items():
        flag = outputs[name].flag or f"--{_name_flag(name)}"
        check_apart(path, *places, option=flag)
        # Whether a folder may be replaced is checked where it is published.
        if outputs[name].content:
            check_file(path, outputs[name].content, overwrite, flag)
            place = Path(os.path.realpath(path))
            others = [Path(os.path.realpath(other)) for each, other in written.items() if each != name]
            if any(place == other or other in place.parents for other in others):
                raise OutputError(f"{path} is where another option writes, too; give another {flag}", name=path)


def _read(values: Mapping[str, object], outputs: Mapping[str, OutputOption]) -> Iterator[Path]:
    """The files and folders that a command reads, with the dense model and the data of pruned folders."""
    # A pruned folder's report names the dense model and the data, which `recover`, `verify` and `rerun` read again.
    texts = [str(values[name]) for name in SAMPLES_FROM if values.get(name) is not None]
    for name in (*OPERANDS, *READ_PLACES):
        given = values.get(name)
        for each in given if isinstance(given, list) else [given]:
            if each is None or name in outputs:
                continue
            place = expand_path(str(each))
            yield from (place.parent, place) if place.suffix == ".onnx" else (place,)
            yield from _list_local_copies(str(each))
            report = _report_in(place)
            yield from (expand_path(name) for name in _list_names(report, "model"))
            texts += [name for key in SAMPLES_FROM for name in _list_names(report.get("settings"), key)]
    if texts:
        from mptk.io import read_places

        for text in texts:
            with contextlib.suppress(MptkError):  # a wrong source is refused where it is read
                yield from read_places(text)


def _report_in(place: Path) -> Json:
    """The report of a folder; empty if there is none, or a damaged one, which the command itself refuses."""
    try:
        return read_json_object(place / REPORT_JSON, FileError)
    except MptkError:
        return {}


def _list_names(content: object, key: str) -> list[str]:
    """The name at a key of JSON of unknown origin, if there is one."""
    found = content.get(key) if isinstance(content, dict) else None
    return [found] if isinstance(found, str) else []


def _list_local_copies(name: str) -> list[Path]:
    """The file or folder that a model's name stands for, if it has been fetched."""
    from mptk.io import find_local_copy

    found = find_local_copy(name)
    return [] if found is None else [found]


def make_bound_arguments(least: float, most: float = COUNT) -> dict[str, Any]:
    """Arguments of ``typer.Option`` for a finite number in these bounds.

    The callback checks the number, as click's own range takes NaN. The help shows the upper bound only of shares.
    """

    def check(value: float | None) -> float | None:
        if value is not None and (wrong := find_bound_error(value, least, most)) is not None:
            raise typer.BadParameter(f"{wrong}. Give a number from {format_number(least)} to {format_number(most)}.")
        return value

    return {"min": least, "max": most if most <= 1 else None, "callback": check}


def make_number_option(help: str, least: float, most: float = COUNT) -> OptionInfo:
    """An option for a finite number from ``least`` to ``most``."""
    made: OptionInfo = typer.Option(help=help, **make_bound_arguments(least, most))
    return made


JsonOption = Annotated[
    Path | None,
    make_file_option(
        "Also write the result to this file; - prints it instead of the table.", "JSON", flag="--json", dash=True
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that mptk did not write, too.")]


# ---- typed words that hold several values ----

_BASES = {"B": 1000, "iB": 1024}
_UNITS = {"B": 1} | {
    f"{prefix}{unit}": base**power for power, prefix in enumerate("KMGT", 1) for unit, base in _BASES.items()
}


def parse_names(text: str) -> tuple[str, ...]:
    """``heads,ffn`` → ("heads", "ffn")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def parse_width(text: str) -> tuple[str, int]:
    """``ffn=1024`` → ("ffn", 1024)."""
    name, _, value = text.partition("=")
    # Digits are counted in each of these patterns: Python refuses to read integers of thousands of digits.
    if not re.fullmatch(r"[0-9]{1,9}", value) or not int(value) or not name.strip():
        raise InputError(f"--width {text}: write FAMILY=UNITS, as ffn=1024", name="width")
    return name.strip(), int(value)


def parse_size(text: str | None, setting: str) -> int | None:
    """``8GB`` → 8,000,000,000 bytes; ``8GiB`` → 8 · 2³⁰. ``setting``: its name, for the error."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) *([KMGT]?I?B)", text.strip(), re.I | re.ASCII)
    unit = {known.upper(): size for known, size in _UNITS.items()}.get(found[2].upper()) if found else None
    size = int(float(found[1]) * unit) if found and unit else 0
    if not size:
        raise InputError(
            f"{shorten_typed(text)!r} is not a size; write a number and KB, MB, GB or GiB, as 8GB", name=setting
        )
    return size


def parse_counts(text: str, option: str) -> tuple[int, ...]:
    """``128,512`` → (128, 512). Raises MptkError if a number is below 1; ``option`` is its name."""
    counts = text.split(",")
    if not all(re.fullmatch(r"[0-9]{1,7}", count.strip()) and int(count) for count in counts):
        raise InputError(
            f"{option} {shorten_typed(text)}: write numbers of at least 1 and at most 9999999, as 128,512",
            name=option.removeprefix("--").replace("-", "_"),
        )
    if len({*map(int, counts)}) < len(counts):
        raise InputError(
            f"{option} {shorten_typed(text)}: a number is repeated; give each once",
            name=option.removeprefix("--").replace("-", "_"),
        )
    return tuple(map(int, counts))


# ---- settings ----

SHORT = {int: "N", int | None: "N", float: "X", float | None: "X", bool: " "}
"""Kind of a setting → how help names its value: short, so that 80 columns hold the longest option."""
SHOWN_BESIDE, ANY_NAME = 14, "NAME"
"""Most characters of choices beside an option in help. More are listed in its text, and it takes a ``NAME``."""


@dataclass(frozen=True)
class Form:
    """How a setting is typed: typer's type, the conversion to the setting's value, and back for the default."""

    kind: Any
    read: Callable[[Any], object] = lambda value: value
    typed: Callable[[Any], object] = lambda value: value


def find_form(each: Declared) -> Form:
    """How a setting is typed."""
    if get_origin(each.kind) is tuple:
        return Form(str, parse_names, ",".join)
    if get_origin(each.kind) is Mapping:
        return Form(list[str] | None, lambda texts: dict(map(parse_width, texts or [])), lambda widths: None)
    if get_origin(each.kind) is Literal:  # whose values are the choices
        return Form(str)
    forms = {
        "size": Form(str | None, lambda text: parse_size(text, each.name)),
        "path": Form(Path | None),
        "number or text": Form(str, lambda text: int(text) if text.isdecimal() else text, str),
    }
    return forms.get(each.setting.form, Form(each.kind))


def make_parameters(command: str, base: Record) -> list[inspect.Parameter]:
    """The parameters of a command that are settings. ``base``: the command's defaults."""
    panelled = bool({*READING} & list_roles(command)[0])
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=find_form(each).typed(each.of(base)),
            annotation=Annotated[
                find_form(each).kind, make_option(name, each, each.setting.panel if panelled else None)
            ],
        )
        for name, each in find_settings(type(base), command).items()
    ]


def make_option(name: str, each: Declared, panel: str | None) -> OptionInfo:
    """The typer option of a setting. If it is off by default, it is a switch without a negative form."""
    # typer gives a flag the form --no-NAME, too, unless its name is spelled out.
    flags = [f"--{name.replace('_', '-')}"] if each.default is False else []
    bounds, choices = each.setting.within, each.setting.choices
    more = {} if bounds is None or find_form(each).kind != each.kind else make_bound_arguments(*bounds)
    more["metavar"] = SHORT.get(find_form(each).kind)
    if each.setting.form == "share":  # typed as text, since 30% is not a float; its callback checks the bounds
        more = {"parser": _parse_typed_share, "callback": more["callback"], "metavar": "SHARE"}
    more |= {} if choices is None else make_choice_arguments(choices, several=get_origin(each.kind) is tuple)
    help = each.setting.help
    if choices is not None and more["metavar"] == ANY_NAME:
        help = f"{help} One of {', '.join(choices.shown)}."
    made: OptionInfo = typer.Option(*flags, help=help, rich_help_panel=panel, **more)
    return made


def _parse_typed_share(value: str | float) -> float:
    """``parse_share``, with its error as one of typer's. A default or a recipe's share is a number already."""
    try:
        return parse_share(str(value))
    except MptkError as error:
        raise typer.BadParameter(str(error)) from error


def build_settings(command: str, base: AnyRecord, options: Mapping[str, object]) -> AnyRecord:
    """The settings from the options of a command."""
    known = find_settings(type(base), command)
    return with_keywords(
        base, {known[name].name: find_form(known[name]).read(value) for name, value in options.items()}
    )


def make_choice_arguments(choices: Choices, *, several: bool = False) -> dict[str, Any]:
    """Arguments of ``typer.Option`` for one of some values, or for several separated by commas."""

    def parse(text: str) -> str:
        for value in parse_names(text) if several else (text,):
            if (wrong := choices.explain_wrong(value)) is not None:
                raise typer.BadParameter(wrong)
        return text

    def complete(incomplete: str) -> list[str]:
        # A shell completes a whole word, so the names before the last comma are a part of each proposal.
        before = incomplete.rpartition(",")[0] if several else ""
        given = before.split(",") if before else []
        free = [name for name in choices.list_values() if name not in given]
        fitting = [name for name in free if not given or name not in choices.alone]
        known = [",".join([*given, name]) for name in fitting]
        return [name for name in known if name.startswith(incomplete)]

    metavar = f"[{(',' if several else '|').join(choices.shown)}]"
    metavar = metavar if len(metavar) <= SHOWN_BESIDE else ANY_NAME
    return {"parser": parse, "autocompletion": complete, "metavar": metavar}


# ---- options that would do nothing ----


def refuse(options: Sequence[str], why: str) -> None:
    """Raise MptkError if one of ``options`` was typed. ``why``: why they would do nothing, and a remedy."""
    for name in options:
        if name in TYPED.get():
            raise InputError(f"--{name.replace('_', '-')} would do nothing: {why}", name=name)


def refuse_idle(command: str, asked: Asked) -> None:
    """Raise MptkError if the user typed an option that would do nothing.

    Options from a recipe are not checked: a run writes all of its options into its recipe.
    """
    for name, why in find_idle(command, asked).items():
        refuse((name,), why)


def refuse_surely_idle(command: str, asked: Asked) -> None:
    """As ``refuse_idle``, for options that would do nothing whatever the minutes and what a plugin's method does.

    That is known only with torch, whose import takes seconds. ``asked``: with settings as typed.
    """
    s = asked.settings
    learns = s.method not in ONE_SHOT
    least = with_keywords(s, {"steps": s.learning.steps or 0, "distil_epochs": s.distil_epochs or 0})
    epochs = s.distil_epochs or int(s.reconstruct is not False)  # it needs reconstruction
    most = with_keywords(s, {"steps": s.learning.steps or int(learns), "distil_epochs": epochs})
    never = find_idle(command, replace(asked, settings=least, learns=False, undecided=False))
    for name, why in find_idle(command, replace(asked, settings=most, learns=learns, undecided=True)).items():
        if name in never:
            refuse((name,), why)


# ---- latency ----

# --max-decode-ms and --max-prefill-ms are one number and one choice of phase: typed together, as one cannot be without
# the other. In Python and in a plan they are settings of their own.
MaxMs = Annotated[float | None, make_option("", next(each for each in Settings.declared if each.name == "max_ms"), CUT)]


def with_latency(settings: Settings, decode_ms: float | None, prefill_ms: float | None) -> Settings:
    """``settings`` with the latency option as budget, in milliseconds; unchanged if no latency option is given."""
    if settings.plan is not None:
        refuse(("max_decode_ms", "max_prefill_ms"), "--plan already says which units stay; leave out one of both")
    if decode_ms is not None and prefill_ms is not None:
        raise InputError("only one latency can be the budget; give --max-decode-ms or --max-prefill-ms", name="max_ms")
    for objective, ms in (("decode", decode_ms), ("prefill", prefill_ms)):
        if ms is not None:
            return replace(settings, budget="latency", objective=objective, max_ms=ms)
    return settings


# ---- options from a recipe ----


def apply_recipe(context: typer.Context, file: Path | None) -> Path | None:
    """Make the options of a recipe file the defaults of this call.

    Raises:
        MptkError: the file cannot be read, or names an option that the command lacks or that a recipe may not set.
    """
    if file is None:
        return None
    from mptk.config import is_below_current, list_refused, read_recipe

    # A command that ends here removes what a killed one left, too.
    tidy(expand_path(file).parent)
    tidy_scratch()
    # Each option by the names that it has when it is typed: not every flag is named like its parameter.
    known: dict[str, Any] = {}
    for parameter in context.command.params:
        flags = [flag.removeprefix("--").replace("-", "_") for flag in parameter.opts if flag.startswith("--")]
        known |= dict.fromkeys(flags or [parameter.name], parameter)
    known = {name: found for name, found in known.items() if name not in ("config", "help")}
    values: dict[str, object] = {}
    never = list_refused(Settings)
    for name, value in read_recipe(file).items():
        if name not in known:
            hint = suggest_name(name, known, f"there are {', '.join(known)}")
            raise InputError(
                f"{file} has {name!r}, which is not an option of `mptk {context.command.name}`; {hint}",
                name=name,
                nearest=list_close_names(name, known),
            )
        if name in never:
            raise InputError(
                f"{file} has {name!r}, which a recipe may not set; remove it, and type --{_name_flag(name)}", name=name
            )
        if name == "out" and not is_below_current(str(value)):
            raise InputError(
                f"{file} writes to {str(value)!r}; a recipe may name a folder below the current one; type --out",
                name=name,
            )
        if value is not None:
            values[known[name].name] = _format_typed(value, known[name])
    # As click's defaults: what is typed wins, and the values go through the same parsers and checks as typed ones.
    context.default_map = values
    return file


def _name_flag(name: str) -> str:
    return name.replace("_", "-")


def _format_typed(value: object, parameter: object) -> object:
    """A value of a recipe as one would type it: lists with commas, pairs as A=B."""
    if isinstance(value, Mapping):
        value = [f"{name}={each}" for name, each in value.items()]
    many = getattr(parameter, "multiple", False)
    if isinstance(value, list):
        return list(map(str, value)) if many else ",".join(map(str, value))
    if isinstance(value, bool):  # YAML reads a bare `no` as false
        return value if getattr(parameter, "is_flag", False) else "yes" if value else "no"
    return [str(value)] if many else str(value)


Config = Annotated[
    Path | None,
    typer.Option(
        "--config", is_eager=True, callback=apply_recipe, help="Options from this YAML file; typed options win."
    ),
]
