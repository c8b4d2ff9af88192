"""graph: the rewritten graph and its weights, which plain torch opens. Legal are all widths that its ops accept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from mptk.errors import ProofError
from mptk.io import load_tensors, write_weights
from mptk.ir import Log, Program, ProgramModule, Samples, Weights
from mptk.protocols import Checks, Compiled, SampleSets, Target
from mptk.reading import make_damage_error
from mptk.targets.archive import ARCHIVE, check_archive, list_saved, open_archive, write_archive
from passes.transforms.weight_types import Retype, restore_types
from passes.verify import HALF_TOLERANCE, TOLERANCE, Difference, compare_outputs, prove, widen

WEIGHTS = "model.safetensors"
EXACT = 1e-6
"""Largest difference of a stored weight, relative to the largest element of its tensor. A weight that was computed,
such as a folded norm, may be rounded otherwise when it is computed again."""
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
        write_weights(folder / WEIGHTS, cast_stored(compiled))
        write_archive(folder / ARCHIVE, restore_own_types(compiled, compiled.program))
        return []

    def list_files(self, compiled: Compiled, folder: Path) -> frozenset[str]:
        return frozenset({WEIGHTS, ARCHIVE})

    def has_written(self, folder: Path) -> bool:
        return (folder / WEIGHTS).is_file() and not (folder / "config.json").is_file()

    def make_checks(self, compiled: Compiled, folder: Path, crossed: Sequence[int]) -> Checks:
        weights = read_weights(folder)
        exact = compare_stored(weights, cast_stored(compiled))
        return Checks((exact,), {ARCHIVE: (retype_like(open_archive(folder / ARCHIVE, weights), compiled), TOLERANCE)})

    def compare_rounded(self, compiled: Compiled, folder: Path, batches: Sequence[Samples]) -> list[Difference]:
        """The module in its own types. Its tolerance follows what these types do to the masked dense module."""
        if compiled.program.types is None:
            return []
        found = measure_own_types(
            compiled, compiled.program, lambda: make_cut_module(compiled, read_weights(folder)), batches
        )
        # Only if it fails: half precision may move the outputs of a deep dense module as far by itself.
        if found.ok:
            return [found]
        dense = measure_own_types(
            compiled, compiled.masked, restore_own_types(compiled, compiled.masked).module, batches
        )
        return [widen(found, dense.relative, times=OWN_ROUNDINGS, widest=OWN_WIDEST)]


def measure_own_types(
    compiled: Compiled, reference: Program, make: Callable[[], ProgramModule], batches: Sequence[Samples]
) -> Difference:
    """The difference of a module in its own types from ``reference``. ``make``: makes the module."""

    def compute_outputs(samples: Samples) -> Tensor:
        found: Tensor = make().run(samples.tensors)  # a new module: a call may change its buffers
        return found

    executor = compiled.prepared.executor
    (found,) = prove(reference, {"own types": (compute_outputs, HALF_TOLERANCE)}, *batches, executor=executor)
    return found


def read_weights(folder: Path) -> Weights:
    """The stored weights. Raises MptkError if the file is damaged."""
    return Weights(load_tensors(folder / WEIGHTS, make_damage_error(folder / WEIGHTS)))


def retype_like(program: Program, compiled: Compiled) -> Program:
    """A program in the type in which the cut program computes, to compare them."""
    types = compiled.program.types
    return program if types is None else Retype(types.wide)(program).program


def cast_stored(compiled: Compiled) -> Weights:
    """The cut weights in their stored types: the module's own, unless the settings name one."""
    # A program of several types or of half precision is computed in a wider one; ``restore_types`` undoes that.
    program, auto = compiled.program, compiled.prepared.settings.dtype == "auto"
    state = (
        restore_types(program).state
        if auto and program.types is not None
        else program.state.cast(compiled.prepared.dtype)
    )
    return state.select_names({name: name for name in list_saved(program)})


def make_cut_module(compiled: Compiled, stored: Weights) -> ProgramModule:
    """The cut module with ``stored`` weights, in evaluation mode, in the dense module's own types."""
    program = restore_own_types(compiled, compiled.program)
    state = {name: stored[name].to(program.state.find_like(name).dtype) for name in list_saved(program)}
    return program.with_state(state).module().eval()


def restore_own_types(compiled: Compiled, program: Program) -> Program:
    """A program in the dense module's own types.

    If the settings name a type, a module of half precision or of several types computes in that type.
    """
    if program.types is None:
        return program
    auto = compiled.prepared.settings.dtype == "auto"
    return restore_types(program) if auto else Retype(compiled.prepared.dtype)(program).program


def compare_stored(stored: Weights, expected: Weights) -> Difference:
    """The worst difference between stored weights and the rewritten graph's weights. One weight is in memory at a time.

    Raises:
        ProofError: a weight exists only on one side, or has another shape.
    """
    worst = Difference("stored weights", 0.0, 0.0, EXACT)
    for name in sorted(stored.keys() | expected.keys()):
        if name not in stored or name not in expected or stored.find_like(name).shape != expected.find_like(name).shape:
            raise ProofError(
                f"the proof fails at 'stored weights': {name} is missing or of another shape; prune again", name=name
            )
        # In the types in which they are kept, if these are equal: then equal bits need no more arithmetic.
        pair = stored.read_narrow(name), expected.read_narrow(name)
        if pair[0].dtype != pair[1].dtype:
            pair = stored[name], expected[name]
        if not pair[0].equal(pair[1]):
            one, other = (tensor.float().flatten()[None, None] for tensor in pair)
            found = compare_outputs("stored weights", one, other, EXACT)
            worst = found if not found.relative <= worst.relative else worst
    return worst
