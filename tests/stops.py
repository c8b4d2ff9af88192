"""A run that stops at a stage, as if it were killed there."""

from __future__ import annotations

from inside import Stopped

from mptk.progress import Progress


def stop_at(*begun: str | tuple[str, int]) -> Progress:
    """Raises ``Stopped`` as soon as all of these stages have begun, in this order; with a number, reached that step."""
    left = list(begun)

    def progress(stage: str, done: int, total: int, figures: str = "", /) -> None:
        if left and left[0] in (stage, (stage, done)):
            left.pop(0)
            if not left:
                raise Stopped

    return progress
