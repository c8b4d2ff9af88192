"""arguments: check the arguments of a public function against its annotations, before it does any work.

Public calls of several threads take turns.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import os
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from mptk.errors import (
    InputError,
    KeywordError,
    MptkError,
    find_removed,
    list_close_names,
    make_removed_error,
    suggest_name,
)

P = ParamSpec("P")
R = TypeVar("R")

IN_WORDS: dict[object, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a path",
    types.NoneType: "None",
    None: "None",
}
"""A type → how a message names it."""


class Turn:
    """A lock that each public call holds: calls of other threads wait, calls inside the call do not.

    torch's tracer, transformers' loader and torch's default dtype are state of the whole process. Two calls at once
    fail in torch.export, and leave transformers unable to load anything.
    """

    def __init__(self) -> None:
        self._renew()
        # The thread that holds the lock does not exist in a forked child, so nobody would release it there.
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()  # reentrant: public functions call each other

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Hold the lock within a ``with`` block."""
        with self._lock:
            yield


TURN = Turn()


def guard_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap a function: it raises MptkError if an argument is not of its annotated type, and takes its turn."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with guard_call(function, args, kwargs):
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def guard_call(function: Callable[..., object], args: Sequence[object], kwargs: Mapping[str, object]) -> Iterator[None]:
    """Check the arguments of a call, and hold the turn for it.

    Raises:
        MptkError: there is no such argument, or one is not of its annotated type; or a file's name is too long, or a
            temporary file was removed during the call.
    """
    _, parameters = _read_annotations(function)
    several = inspect.Parameter.VAR_KEYWORD  # they are checked when they become ``Settings``
    if not any(each.kind is several for each in parameters.values()):
        check_keywords(function.__name__, kwargs, parameters)
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    check_arguments(function, {name: v for name, v in given.items() if parameters[name].kind is not several})
    with TURN.take():
        try:
            yield
        except OSError as error:  # the two kinds that any call may meet, wherever it writes
            raise _shorten_error(error) or error from error.__cause__


def check_keywords(function: str, given: Iterable[str], known: Iterable[str], hint: str = "") -> None:
    """Raise MptkError if the function has no argument of a name. ``hint``: what else may be the cause."""
    names = list(known)
    if unknown := sorted({*given} - {*names}):
        nearest = list_close_names(unknown[0], names)
        hints = [hint, suggest_name(unknown[0], names, f"help(mptk.{function}) has them all")]
        raise KeywordError(
            f"{function} has no argument {unknown[0]!r}; {'; '.join(filter(None, hints))}",
            name=unknown[0],
            nearest=nearest,
        )


def _shorten_error(error: OSError) -> MptkError | None:
    """The message for a name that is too long, or a removed temporary folder; None for other errors."""
    if error.filename is None:
        return None
    if error.errno == errno.ENAMETOOLONG:
        return InputError(f"{error.filename}: the name is too long; give a shorter one", name=error.filename)
    gone = find_removed(error) if error.errno == errno.ENOENT else None
    return None if gone is None else make_removed_error(gone)


def check_arguments(function: Callable[..., object], given: Mapping[str, object]) -> None:
    """Check arguments by name against the annotations of ``function``; raises MptkError for the first wrong one."""
    hints, several = _read_annotations(function)
    for name in filter(hints.__contains__, given):
        many = several[name].kind is inspect.Parameter.VAR_POSITIONAL
        hint = Sequence[hints[name]] if many else hints[name]  # type: ignore[valid-type]
        if (wrong := _find_fault(given[name], hint, name)) is not None:
            raise InputError(wrong, name=name)


@functools.cache
def _read_annotations(function: Callable[..., object]) -> tuple[dict[str, Any], Mapping[str, inspect.Parameter]]:
    return get_type_hints(function), inspect.signature(function).parameters


def _find_fault(value: object, hint: object, name: str) -> str | None:
    """What is wrong with an argument, and what to give instead; None if it has its type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return None
    if origin in (Union, types.UnionType):
        # If one member of the union fits but for an item in it, the fault of that item says more than the union's.
        each = [_find_fault(value, one, name) for one in arguments]
        inner = (wrong for wrong in each if wrong is not None and wrong.startswith(f"{name}."))
        return None if None in each else next(inner, _describe_fault(value, hint, name))
    if origin is Literal:
        return None if value in arguments else _describe_fault(value, hint, name)
    if not _is_a(value, origin or hint):
        return _describe_fault(value, hint, name)
    # The value has the outer type; look at its items. Other iterables are not looked at: that could use them up.
    if isinstance(value, Mapping) and len(arguments) == 2:
        return next(filter(None, (_find_fault(v, arguments[1], f"{name}.{k}") for k, v in value.items())), None)
    if isinstance(value, list | tuple) and arguments:
        return next(filter(None, (_find_fault(v, arguments[0], f"{name}.{i}") for i, v in enumerate(value))), None)
    return None


def _is_a(value: object, kind: Any) -> bool:
    """Whether a value is of a class. Text is not a sequence and a flag is not a number; an int passes as a float."""
    if kind is None or kind is types.NoneType:
        return value is None
    if kind is Callable or isinstance(kind, type(Protocol)):  # a protocol of a function
        return callable(value)
    if kind in (Sequence, Iterable) and isinstance(value, str | bytes | bytearray):
        return False
    if kind is Iterable and hasattr(value, "__getitem__"):  # a torch data set has no __iter__: it is read by number
        return True
    if isinstance(value, bool) and kind in (int, float):  # a bool is an int in Python
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _describe_fault(value: object, hint: object, name: str) -> str:
    kind = type(value).__name__
    shown = repr(value) if isinstance(value, bool | int | float | str | None) else f"a {kind}"
    # ``prune(model, 0.3)``: the second argument is the folder.
    meant = f", and sparsity={value} by its name" if name == "out" and isinstance(value, float) else ""
    return f"{name} is {shown if len(shown) <= 60 else f'a long {kind}'}; give {_name_type(hint)}{meant}"


def _name_type(hint: object) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        *most, last = dict.fromkeys(_name_type(one) for one in arguments)
        return f"{', '.join(most)} or {last}" if most else last
    if origin is Literal:
        return " or ".join(repr(one) for one in arguments)
    if origin is Callable or isinstance(hint, type(Protocol)):
        return "a function"
    if origin is not None and issubclass(origin, Mapping):
        return "a dict"
    if origin is not None and issubclass(origin, Iterable):
        return f"a list, each {_name_type(arguments[0])}" if arguments[0] is not object else "an iterable"
    return IN_WORDS.get(hint, f"a {getattr(hint, '__name__', hint)}")
