"""words: errors that name options of the command line, in Python: keywords, with values as Python writes them."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from mptk.arguments import P, R, check_keywords, guard_call
from mptk.config import Declared, Settings, list_names
from mptk.errors import MptkError, find_broken_package
from mptk.plugins import explain_absent

COMMAND_LINE: ContextVar[bool] = ContextVar("command_line", default=False)
"""Whether a command is running, whose user types options."""
# Errors are written once, in the words of the command line. Python's wording is made from these.
OPTION = re.compile(
    r"(?P<command>`[^`]*`)|(?<![\w-])--(?P<name>[a-z][a-z-]*[a-z])(?!\w)(?: (?P<value>[\w.+*%/=-]*[\w%]))?"
)
"""A command in backticks, which stays; or an option, and the next word, which may be its value."""

SETTINGS_PARAMETER = "keywords"
"""The parameter of a function that holds settings."""
PLAIN = ("after", "chat", "like", "max_new_tokens", "model", "out", "rounds", "tokens")
OTHERS = {"max-decode-ms": "max_ms", "max-prefill-ms": "max_ms"} | {name.replace("_", "-"): name for name in PLAIN}
"""Options that are not settings → their keywords. An option that is neither belongs to another program, and stays."""


def wrap_public(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function of the Python API: its arguments are checked, and its errors speak of keywords.

    What the caller has set in torch, such as ``torch.no_grad`` or autocast, does not count in the call.
    """

    parameters = inspect.signature(function).parameters

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if SETTINGS_PARAMETER in parameters:  # beside arguments of its own, which a misspelt name may mean, too
            check_keywords(function.__name__, kwargs, [*parameters, *list_names(Settings)], explain_absent())
        with name_keywords(), guard_call(function, args, kwargs):
            from mptk.compat.torch import use_default_state  # here: help needs no torch

            with use_default_state():
                return function(*args, **kwargs)

    return call


@contextmanager
def name_keywords() -> Iterator[None]:
    """Let errors speak of keywords, not of options, unless a command runs; a broken package is named."""
    try:
        yield
    except MptkError as error:  # changed in place, so that its traceback and its class stay
        if error.args and not COMMAND_LINE.get():
            error.args = (to_python_words(str(error)), *error.args[1:])
        raise
    except (ImportError, OSError) as error:  # a package whose files are broken, if that is the cause
        raise find_broken_package(error) or error from error.__cause__


def to_python_words(text: str) -> str:
    """``text`` with options as keywords: ``--target graph`` as ``target="graph"``, ``--no-onnx`` as ``onnx=False``."""
    return OPTION.sub(_to_keyword, text)


def _to_keyword(found: re.Match[str]) -> str:
    name, value = found["name"], found["value"]
    if name is None:
        return found[0]
    # A setting's option; else the denial of a setting, --no-NAME; else an option that is not a setting.
    known = {each.name_option().replace("_", "-"): each for each in Settings.declared}
    denied = known.get(name.removeprefix("no-")) if name not in known else None
    rest = "" if value is None else f" {value}"
    if (each := denied or known.get(name)) is None:
        return OTHERS[name] + rest if name in OTHERS else found[0]
    if each.kind in (bool, bool | None):
        return f"{each.name}={denied is None}{rest}"
    given = None if value is None else _to_value(each, value)
    return f"{each.name}{rest}" if given is None else f"{each.name}={given}"


def _to_value(each: Declared, word: str) -> str | None:
    """A word after an option as the keyword's value in Python; None if it is the sentence's next word."""
    if re.fullmatch(r"\d+(\.\d+)?", word):
        return word
    # FILE, ffn=1024, a default or a choice. After any other word the sentence goes on: "--search only ranks".
    if (
        word.isupper()
        or "=" in word
        or word == each.default
        or (each.setting.choices and each.setting.choices.explain_wrong(word) is None)
    ):
        return f'"{word}"'
    return None
