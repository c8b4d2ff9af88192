"""graph: the weights of the rewritten graph, for use from Python. Legal are all widths that the graph's ops accept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mptk.errors import ProofError
from mptk.io.tensors import write_weights
from mptk.io.untrusted import damaged, load_tensors
from mptk.ir.passes import Log
from mptk.ir.program import ProgramModule
from mptk.ir.weights import Weights
from mptk.protocols.chain import Compiled, Target
from mptk.protocols.values import Checks, SampleSets
from passes.transforms.retype import Retype, restored
from passes.verify import HALF_TOLERANCE, Difference, difference

WEIGHTS = "model.safetensors"
EXACT = 1e-6
"""Largest difference of a stored weight, relative to the largest element of its tensor."""


class GraphTarget(Target):
    """Weights under the dense model's names, without a config: they need not fit a stock class."""

    name = "graph"
    summary = "any widths that the graph's ops accept"
    ragged = True

    def emit(self, compiled: Compiled, sets: SampleSets, folder: Path, log: Log) -> list[str]:
        write_weights(folder / WEIGHTS, held(compiled))
        return []

    def wrote(self, folder: Path) -> bool:
        return (folder / WEIGHTS).is_file() and not (folder / "config.json").is_file()

    def checks(self, compiled: Compiled, folder: Path, crossed: Sequence[int]) -> Checks:
        stored = Weights(load_tensors(folder / WEIGHTS, damaged(folder / WEIGHTS)))
        exact = (stored_weights(stored, held(compiled)),)
        if compiled.program.types is None:
            return Checks(exact)
        module = module_of(compiled, stored)
        return Checks(exact, {"own types": (lambda samples: module(*samples.tensors), HALF_TOLERANCE)})


def held(compiled: Compiled) -> Weights:
    """The cut weights in their stored types: the module's own, unless the settings name one."""
    state, types = compiled.program.state, compiled.program.types
    if types is None or compiled.prepared.settings.dtype != "auto":
        return state.cast(compiled.prepared.dtype)
    return restored(compiled.program).state


def module_of(compiled: Compiled, stored: Weights) -> ProgramModule:
    """The cut module with ``stored`` weights, in evaluation mode, in the dense module's own types.

    If the settings name a type, a module of half precision or of several types computes in that type.
    """
    program = compiled.program
    if program.types is not None:
        auto = compiled.prepared.settings.dtype == "auto"
        program = restored(program) if auto else Retype(compiled.prepared.dtype)(program).program
    state = {name: stored[name].to(like.dtype) for name, like in program.state.likes.items()}
    return program.with_state(state).module().eval()


def stored_weights(stored: Weights, expected: Weights) -> Difference:
    """The worst difference between stored weights and the rewritten graph's weights. One weight is in memory at a time.

    Raises:
        ProofError: a weight exists only on one side, or has another shape.
    """
    worst = Difference("stored weights", 0.0, 0.0, EXACT)
    for name in sorted(stored.keys() | expected.keys()):
        if name not in stored or name not in expected or stored.like(name).shape != expected.like(name).shape:
            raise ProofError(f"the proof fails at 'stored weights': {name} is missing or of another shape; prune again")
        pair = stored.narrow(name), expected.narrow(name)
        if pair[0].dtype != pair[1].dtype:
            pair = stored[name], expected[name]
        if not pair[0].equal(pair[1]):
            one, other = (tensor.float().flatten()[None, None] for tensor in pair)
            found = difference("stored weights", one, other, EXACT)
            worst = found if not found.relative <= worst.relative else worst
    return worst
