"""alive: whether a model's outputs are numbers at all: damaged weights are refused before any work."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mptk.errors import MptkError
from mptk.ir.program import Program


def check_alive(source: str, program: Program, outputs: Sequence[Tensor], *, untrained: bool = False) -> None:
    """Raise MptkError if a model's ``outputs`` are not finite, with the name of such a weight, or are all zero.

    ``untrained``: they may be zero because some parameters are, as the head of a new vision transformer.
    """
    if not all(output.isfinite().all() for output in outputs):
        weights = (name for name, like in program.state.likes.items() if like.is_floating_point())
        name = next((name for name in weights if not program.state[name].isfinite().all()), None)
        if name is not None:
            raise MptkError(f"{name} of {source} holds numbers that are not finite; give undamaged weights")
        raise MptkError(f"the outputs of {source} are not finite, though its weights are; give undamaged ones")
    if not any(output.any() for output in outputs) and not (untrained and _some_are_zero(program)):
        raise MptkError(
            f"the outputs of {source} are all zero: its weights are zero, or too large to be squared; give trained ones"
        )


def _some_are_zero(program: Program) -> bool:
    """Whether some parameters are zero and others are not."""
    state = program.state
    return {bool(state[n].any()) for n in program.parameters if state.like(n).is_floating_point()} == {True, False}
