"""What a test does inside of the product, or of a library, if nothing outside of it would show or bring about the same.

Each way has a name. A target is named by its path: ``module.function``, ``module.Class.method`` or ``module.CONSTANT``.
All is as before after the test, or after ``changed()``.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Stopped(BaseException):
    """What no handler of errors catches."""


class Inside:
    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.undo = patch.undo
        self._set = patch.setattr

    def bound(self, target: str, value: object) -> None:
        """Set a constant: a bound that a small input crosses, or what a library read from its environment."""
        self._set(target, value)

    def around(self, target: str, instead: Callable[..., Any]) -> None:
        """Call ``instead`` in place of the target. It gets the real one, and then what that was called with."""
        real = pkgutil.resolve_name(target)

        @functools.wraps(real)
        def call(*arguments: Any, **options: Any) -> Any:
            return instead(real, *arguments, **options)

        self._set(target, call)

    def calls(self, target: str) -> list[tuple[Any, ...]]:
        """The arguments of each call from now on, without those that have a name."""
        return self.asked(target, lambda real, *given, **options: real(*given, **options))

    def asked(self, target: str, instead: Callable[..., Any] = lambda *_, **__: None) -> list[tuple[Any, ...]]:
        """As ``calls``, with ``instead`` in place of the target, as in ``around``; by default it does nothing."""
        seen: list[tuple[Any, ...]] = []

        def call(real: Callable[..., Any], *given: Any, **options: Any) -> Any:
            seen.append(given)
            return instead(real, *given, **options)

        self.around(target, call)
        return seen

    def forbid(self, target: str) -> None:
        self.around(target, lambda *_, **__: pytest.fail(f"{target} was called"))

    def gives(self, target: str, answer: object) -> None:
        """The target does nothing, and gives this answer."""
        self.around(target, lambda *_, **__: answer)

    def spoil(self, target: str, change: Callable[[Any], Any]) -> None:
        """The target gives what ``change`` makes of its result."""
        self.around(target, lambda real, *given, **options: change(real(*given, **options)))

    def quicken_bench(self) -> None:
        """A bench measures no memory, which takes a process for each graph, and times each step once in a turn.

        The machine's peaks are those of a small product, and of reading little memory.
        """
        self.bound("mptk.ort.roofline.SIDE", 64)
        self.bound("mptk.ort.roofline.READ_BYTES", 1 << 20)
        self.gives("mptk.ort.bench.measure_peak_memory", 1)
        # Changes may nest, and then the outer one is called with what the inner one says.
        self.around(
            "mptk.ort.bench.time_alternately", lambda real, steps, rounds, **_: real(steps, rounds, shortest=0.0)
        )

    def make_up_times(self) -> None:
        """Operators take the times of made_up_times.py."""
        from made_up_times import times

        self.around("mptk.cost.operator_times.time_operators", lambda measure, found, threads, progress: times(found))

    def stop(self, target: str, call: int = 1, error: BaseException | type[BaseException] = Stopped) -> None:
        """The nth call half writes the temporary file that it is given, if it is given one, and raises ``error``."""
        numbers = iter(range(1, 1000))

        def stopping(real: Callable[..., Any], *given: Any, **options: Any) -> Any:
            if next(numbers) != call:
                return real(*given, **options)
            for path in (a for a in given if isinstance(a, Path) and a.parent.name == "new"):
                path.write_bytes(b"half")
            raise error

        self.around(target, stopping)


@contextmanager
def changed() -> Iterator[Inside]:
    with pytest.MonkeyPatch.context() as patch:
        yield Inside(patch)
