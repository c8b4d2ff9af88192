"""graph: the rewritten graph and its weights, which plain torch opens. Legal are all widths that its ops accept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from mptk.errors import ProofError
from mptk.io.tensors import write_weights
from mptk.io.untrusted import load_tensors
from mptk.ir.passes import Log
from mptk.ir.program import Program, ProgramModule
from mptk.ir.samples import Samples
from mptk.ir.weights import Weights
from mptk.protocols.chain import Compiled, Target
from mptk.protocols.values import Checks, SampleSets
from mptk.reading import damaged
from mptk.targets.archive import ARCHIVE, check_archive, open_archive, saved_names, write_archive
from passes.transforms.retype import Retype, restored
from passes.verify import HALF_TOLERANCE, TOLERANCE, Difference, difference, prove, widen

WEIGHTS = "model.safetensors"
EXACT = 1e-6
"""Largest difference of a stored weight, relative to the largest element of its tensor."""
OWN_ROUNDINGS, OWN_WIDEST = 2, 0.5
"""If the masked dense module's own types move its outputs far, allow the cut module OWN_ROUNDINGS × as much, at most
OWN_WIDEST of the largest output."""


class GraphTarget(Target):
    """``model.pt2`` and weights under the dense model's names, without a config: they need not fit a stock class."""

    name = "graph"
    summary = "any widths that the graph's ops accept"
    ragged = True

    def check_program(self, program: Program) -> None:
        check_archive(program)

    def emit(self, compiled: Compiled, sets: SampleSets, folder: Path, log: Log) -> list[str]:
        write_weights(folder / WEIGHTS, held(compiled))
        write_archive(folder / ARCHIVE, own_types(compiled, compiled.program))
        return []

    def files(self, compiled: Compiled, folder: Path) -> frozenset[str]:
        return frozenset({WEIGHTS, ARCHIVE})

    def wrote(self, folder: Path) -> bool:
        return (folder / WEIGHTS).is_file() and not (folder / "config.json").is_file()

    def checks(self, compiled: Compiled, folder: Path, crossed: Sequence[int]) -> Checks:
        weights = read_weights(folder)
        exact = stored_weights(weights, held(compiled))
        return Checks((exact,), {ARCHIVE: (in_types_of(open_archive(folder / ARCHIVE, weights), compiled), TOLERANCE)})

    def rounded(self, compiled: Compiled, folder: Path, batches: Sequence[Samples]) -> list[Difference]:
        """The module in its own types. Its tolerance follows what these types do to the masked dense module."""
        if compiled.program.types is None:
            return []
        found = own_difference(compiled, compiled.program, lambda: module_of(compiled, read_weights(folder)), batches)
        if found.ok:
            return [found]
        dense = own_difference(compiled, compiled.masked, own_types(compiled, compiled.masked).module, batches)
        return [widen(found, dense.relative, times=OWN_ROUNDINGS, widest=OWN_WIDEST)]


def own_difference(
    compiled: Compiled, reference: Program, make: Callable[[], ProgramModule], batches: Sequence[Samples]
) -> Difference:
    """The difference of a module in its own types from ``reference``. ``make``: makes the module."""

    def outputs(samples: Samples) -> Tensor:
        found: Tensor = make().run(samples.tensors)  # a call may change the module's buffers
        return found

    executor = compiled.prepared.executor
    (found,) = prove(reference, {"own types": (outputs, HALF_TOLERANCE)}, *batches, executor=executor)
    return found


def read_weights(folder: Path) -> Weights:
    """The stored weights. Raises MptkError if the file is damaged."""
    return Weights(load_tensors(folder / WEIGHTS, damaged(folder / WEIGHTS)))


def in_types_of(program: Program, compiled: Compiled) -> Program:
    """A program in the type in which the cut program computes, to compare them."""
    types = compiled.program.types
    return program if types is None else Retype(types.wide)(program).program


def held(compiled: Compiled) -> Weights:
    """The cut weights in their stored types: the module's own, unless the settings name one."""
    program, auto = compiled.program, compiled.prepared.settings.dtype == "auto"
    state = (
        restored(program).state if auto and program.types is not None else program.state.cast(compiled.prepared.dtype)
    )
    return state.selected({name: name for name in saved_names(program)})


def module_of(compiled: Compiled, stored: Weights) -> ProgramModule:
    """The cut module with ``stored`` weights, in evaluation mode, in the dense module's own types."""
    program = own_types(compiled, compiled.program)
    state = {name: stored[name].to(program.state.like(name).dtype) for name in saved_names(program)}
    return program.with_state(state).module().eval()


def own_types(compiled: Compiled, program: Program) -> Program:
    """A program in the dense module's own types.

    If the settings name a type, a module of half precision or of several types computes in that type.
    """
    if program.types is None:
        return program
    auto = compiled.prepared.settings.dtype == "auto"
    return restored(program) if auto else Retype(compiled.prepared.dtype)(program).program


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
