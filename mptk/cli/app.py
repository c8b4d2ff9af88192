"""app: the typer application, code that all commands share, and the message about a stopped run.

Modules of commands import torch and transformers inside their functions, so that ``mptk --help`` is quick.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from mptk.api.words import COMMAND_LINE
from mptk.cli.console import VOICE, err, out, print_text
from mptk.cli.failure import Interrupted, find_lost_output, replace_streams, report_failure, report_unprinted
from mptk.cli.options import (
    TYPED,
    OutputOption,
    Overwrite,
    build_settings,
    check_names,
    check_output_paths,
    list_hub_names,
    make_parameters,
)
from mptk.cli.stopping import STOPPED, catch_signals, ignore_signals
from mptk.config import Record, Settings
from mptk.errors import InputError, explain_errors
from mptk.files import check_open_files, check_text, expand_path, format_json, tidy, write_json
from mptk.io import tidy_shared
from mptk.plugins import list_features
from mptk.progress import CALLED
from mptk.protocols import name_run_folder

app = typer.Typer(
    # A failure is one line (``failure.py``), so typer's own tracebacks are off.
    help="Structured pruning for language models: analyse, cut, prove, emit.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only results and errors.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show more: each pass's difference, the traceback of an error.")
]
DEFAULTS = Settings()
DONE = "the command had already finished"
Check = Callable[..., object]
"""Raises MptkError for options that a command refuses before any work; its parameters are some of the command's."""
ONLY_CHECKED: ContextVar[bool] = ContextVar("only_checked", default=False)
"""Whether the command ends after its checks. In a context variable for the reason of ``TYPED``."""


def main() -> None:
    """Run the command line. Each failure is one line on stderr and an exit code of ``mptk.cli.failure``."""
    # Libraries read these when they are imported, so they are set before any. A user's own values stay.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault(
        "ORT_DISABLE_TELEMETRY", "1"
    )  # otherwise ONNX Runtime keeps a record of each process and sends it
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of transformers' GGUF reader, datasets and others
    # Weights come and go: with large pages torch makes a float32 weight in half the time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    warnings.filterwarnings("ignore")
    own = replace_streams()
    try:
        with explain_errors(), catch_signals():
            code = app(standalone_mode=False, prog_name="mptk")
            STOPPED.look("" if code else DONE)  # typer says nothing of a signal before or after the command
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # the net: what no other place has translated
        code = report_failure(error)
    if not code and (why := find_lost_output(own)):
        code = report_unprinted(why)
    # What is registered last is called first. Unregistered before, in case tests call ``main`` several times.
    atexit.unregister(ignore_signals)
    atexit.register(ignore_signals)
    if code:
        sys.exit(code)


def check_words(words: Sequence[str]) -> None:
    """Parse the words of a command line and check its options, as the command does before its work, which is not done.

    It does not check whether the named models and folders exist.

    Raises MptkError, or typer's error for words that are no options.
    """
    only_checked = ONLY_CHECKED.set(True)
    try:
        build_group().main(list(words), standalone_mode=False, prog_name="mptk")
    finally:
        ONLY_CHECKED.reset(only_checked)


@functools.cache  # making the options of all commands takes longer than parsing a line
def build_group() -> Any:
    """The command line as click knows it, under whose name typer exports no type."""
    return typer.main.get_command(app)


@dataclass(frozen=True)
class Registered:
    """A command of the command line, before typer knows it. The fields are the arguments of ``register_command``."""

    name: str
    function: Callable[..., None]
    examples: tuple[str, ...]
    base: Record
    check: Check | None


@dataclass(frozen=True)
class Extension:
    """Options that a feature adds to a command: the parameters of ``function`` that the command lacks.

    ``after``: the parameter of the command below which they stand in its help. ``examples``, ``about``: what its help
    says besides.
    """

    function: Callable[..., None]
    after: str
    examples: tuple[str, ...]
    about: str
    check: Check | None


COMMANDS: dict[str, Registered] = {}
EXTENSIONS: dict[str, list[Extension]] = {}
"""What is registered: by name of the command. ``register_all`` gives it to typer."""


def register_command(
    name: str | None = None, *, examples: tuple[str, ...] = (), base: Record = DEFAULTS, check: Check | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command as ``app.command`` does, with ``-q``, ``-v`` and examples below the help.

    If the function takes ``settings``, it has the options that are declared for it. ``base``: their defaults. If it
    writes a file, it has ``--overwrite``, and nothing that it reads can be its output. ``check``: called before it.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        called = name or function.__name__
        COMMANDS[called] = Registered(called, function, examples, base, check)
        return function

    return add


def extend_command(
    command: str, *, after: str, examples: tuple[str, ...] = (), about: str = "", check: Check | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add options to a command of another module. If one is typed, the function carries out the command.

    Its parameters that the command lacks are the options. By the names of the command's parameters it gets these.
    ``after``: the parameter of the command below which the options stand in its help. ``examples``: below the
    command's. ``about``: a paragraph of the help, below the command's. ``check``: called before the function.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        EXTENSIONS.setdefault(command, []).append(Extension(function, after, examples, about, check))
        return function

    return add


def register_all(panels: Mapping[str, Sequence[str]]) -> None:
    """Give typer all registered commands in order. ``panels``: title → the core's commands; features say their own."""
    titles = {name: title for title, names in panels.items() for name in names}
    order = [name for name in titles if name in COMMANDS]
    # A command whose module was not imported is none yet.
    commands = [command for feature in list_features().values() for command in feature.commands]
    for each in [command for command in commands if command.name in COMMANDS]:
        titles[each.name] = each.panel
        order.insert(order.index(each.after) + 1 if each.after in order else len(order), each.name)
    app.registered_commands.clear()
    for name in [*order, *(name for name in COMMANDS if name not in order)]:
        build_command(COMMANDS[name], EXTENSIONS.get(name, []), titles.get(name))


def build_command(command: Registered, extensions: Sequence[Extension], panel: str | None) -> None:
    """Give typer a command, with the options that features add to it."""
    # typer makes options of a function's signature. So the command gets a signature that holds the parameters of
    # its function, those of extensions, the declared settings in place of ``settings``, and the options that all
    # commands have.
    function, called = command.function, command.name
    own = dict(inspect.signature(function, eval_str=True).parameters)
    further = {each: list_further_parameters(each, own) for each in extensions}
    for each, added in further.items():
        own = insert_parameters(own, added, each.after)
    options = make_parameters(called, command.base) if "settings" in own else []
    outputs = {name: found for name, each in own.items() if (found := _find_output(each.annotation))}
    named = {each.name for each in options} | set(own)
    adds = "overwrite" not in named and any(found.content for found in outputs.values())

    @functools.wraps(function)  # its docstring is the help
    def run(*, quiet: bool, verbose: bool, ctx: typer.Context, **values: object) -> None:
        VOICE.quiet, VOICE.verbose = quiet, verbose
        speaking = COMMAND_LINE.set(True)  # messages name options, not keywords
        since = CALLED.set(time.monotonic())
        try:
            # Before any work: what killed commands left, and what this one would overwrite.
            TYPED.set(frozenset(name for name in values if _is_typed(ctx, name)))
            check_open_files()
            tidy_for(values.values())
            check_output_paths(outputs, values, bool(values.pop("overwrite") if adds else values.get("overwrite")))
            if not ONLY_CHECKED.get():
                annotations = {name: each.annotation for name, each in own.items()}
                check_names(values, outputs, annotations)
                check_hub_names(list_hub_names(values, annotations), values.get("json_file"))
            if options:
                given = {each.name: values.pop(each.name) for each in options}
                values["settings"] = build_settings(called, command.base, given)
            carry_out(command, further, values)
            STOPPED.look(DONE)
        except (KeyboardInterrupt, Exception) as error:
            stop = STOPPED.find_stop(error)
            if stop is None:
                raise
            raise Interrupted(stop) from error  # at a KeyboardInterrupt typer would end without a word
        finally:
            COMMAND_LINE.reset(speaking)
            CALLED.reset(since)

    # The signature. Its parameters are keywords only, as a default may stand before a parameter without one.
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("quiet", Quiet), ("verbose", Verbose))
    ]
    more.append(inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
    if adds:
        more.insert(
            0, inspect.Parameter("overwrite", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Overwrite)
        )
    kept = [each.replace(kind=each.KEYWORD_ONLY) for each in own.values() if each.name != "settings"]
    run.__signature__ = inspect.Signature([*kept, *options, *more])  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in (*kept, *options, *more)}
    about = [inspect.cleandoc(function.__doc__ or ""), *(each.about for each in extensions if each.about)]
    run.__doc__ = "\n\n".join(about)
    examples = [*command.examples, *(example for each in extensions for example in each.examples)]
    lines = [f"mptk {example}".replace("[", r"\[") for example in examples]  # typer reads help as rich's markup
    epilog = "\n\n".join(["Examples:", *lines]) if lines else None
    app.command(called, epilog=epilog, rich_help_panel=panel)(run)


def list_further_parameters(extension: Extension, own: Mapping[str, inspect.Parameter]) -> list[inspect.Parameter]:
    """The options that an extension adds to a command with the parameters ``own``."""
    found = inspect.signature(extension.function, eval_str=True).parameters
    return [each for name, each in found.items() if name not in own]


def insert_parameters(
    own: Mapping[str, inspect.Parameter], added: Sequence[inspect.Parameter], after: str
) -> dict[str, inspect.Parameter]:
    """``own`` with parameters below the one called ``after``, or at the end."""
    names = list(own)
    place = names.index(after) + 1 if after in names else len(names)
    whole = {**own, **{each.name: each for each in added}}
    return {name: whole[name] for name in (*names[:place], *(each.name for each in added), *names[place:])}


def carry_out(
    command: Registered, further: Mapping[Extension, Sequence[inspect.Parameter]], values: dict[str, object]
) -> None:
    """Check a command's options, and run it. If the user typed an option of an extension, that takes its place.

    Raises MptkError if options of two extensions were typed: each would run the command in its own way.
    """
    asked = {
        each.name: extension
        for extension, added in further.items()
        for each in added
        if values[each.name] != each.default
    }
    if len({*asked.values()}) > 1:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise InputError(f"{flags}: each makes another run of this command; give one of them")
    carried = next(iter(asked.values()), command)
    for step in (carried.check, None if ONLY_CHECKED.get() else carried.function):
        if step is not None:
            taken = inspect.signature(step).parameters
            step(**{name: value for name, value in values.items() if name in taken})


def _find_output(annotation: object) -> OutputOption | None:
    return next((each for each in getattr(annotation, "__metadata__", ()) if isinstance(each, OutputOption)), None)


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def announce_reading(*names: object, json_file: Path | None = None) -> None:
    """Say what a command reads, before it imports torch and transformers, which takes seconds."""
    announce(f"reading {', '.join(map(str, names))}", json_file)


def check_hub_names(names: Sequence[str], json_file: object) -> None:
    """Raise MptkError if the hub does not have these models, or cannot be asked. ``json_file``: where JSON goes."""
    for name in names:
        from mptk.io import check_hub_id  # it imports huggingface_hub, which most commands do without

        announce(f"asking the hub for {name}", json_file)  # without a network, it answers after half a minute
        check_hub_id(name)


def announce(line: str, json_file: object) -> None:
    """Print a line to the standard error, but for ``-q``, or if only JSON is printed."""
    if not (VOICE.quiet or ONLY_CHECKED.get() or json_file == Path("-")):
        err.print(line, soft_wrap=True, highlight=False)


def show_result(json_file: Path | None, content: object, view: RenderableType) -> None:
    """Print a result as a table, and write it as JSON to a file; if the file is -, print only the JSON."""
    if json_file == Path("-"):
        print_text(format_json(content, indent=1))
        return
    write_json(json_file, content)
    out.print(view)


def tidy_for(arguments: Iterable[object]) -> None:
    """Remove temporary files that killed commands left in the cache folder, and beside and in what is named."""
    tidy_shared()
    for argument in arguments:
        for name in argument if isinstance(argument, list | tuple) else [argument]:
            if isinstance(name, str | Path):
                check_text(name)
                tidy(expand_path(name).parent)
                tidy(expand_path(name))  # some results are made in a folder of several


@contextmanager
def explain_stop(*folders: Path, goes_on: bool = False) -> Iterator[None]:
    """On Ctrl-C, say what is kept of the run that writes to these folders in turn, and how to continue it.

    ``goes_on``: the run continues an earlier one, which may have finished some of the folders.
    """
    began = time.time()
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        stop = STOPPED.find_stop(error)
        if stop is None:
            raise
        # Only what this run published counts as finished: an older result may be in the same place.
        since = 0.0 if goes_on else began
        done = list(takewhile(lambda folder: _is_published(folder, since) and not _list_stages(folder), folders[:-1]))
        said = [f"finished: {', '.join(map(str, done))}"] if done else []
        raise type(stop)("; ".join([*said, _describe_kept(folders[len(done)], began)])) from error


def _is_published(folder: Path, began: float) -> bool:
    marker = folder / "mptk.json"
    return marker.is_file() and marker.stat().st_mtime >= began


def _list_stages(folder: Path) -> list[Path]:
    """What an unfinished run keeps."""
    return list(name_run_folder(folder).glob("*.safetensors"))


def _describe_kept(folder: Path, began: float) -> str:
    if _is_published(folder, began):
        return f"{folder} is proven and published, but its quality was not measured; run `mptk eval`"
    if not (stages := _list_stages(folder)):
        return "nothing was published and no stage had finished"
    # Checkpoints are named PHASE-STEP, with eight digits; other files are results of stages.
    steps = sorted(path.stem.rpartition("-") for path in stages if re.fullmatch(r".*-\d{8}", path.stem))
    trained = f", training up to step {int(steps[-1][2])} of {steps[-1][0]!r}," if steps else ""
    keeps = f"{stages[0].parent} keeps the finished stages{trained}"
    return f"nothing was published. {keeps} and the same command with --resume goes on"


def _show_version(wanted: bool) -> None:
    if wanted:
        from mptk.version import __version__

        print_text(f"mptk {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Structured pruning for language models: analyse, cut, prove, emit."""
