"""graph: the weights of the rewritten graph, for use from Python. Any width that the graph's ops accept is legal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mptk.errors import ProofError
from mptk.io.tensors import write_weights
from mptk.io.untrusted import damaged, load_tensors
from mptk.ir.passes import Log
from mptk.ir.weights import Weights
from mptk.run.chain import Compiled, Target
from mptk.run.values import Checks, SampleSets
from passes.verify import Difference, difference

WEIGHTS = "model.safetensors"
EXACT = 1e-6
"""Largest difference of a stored weight, relative to the largest element of its tensor."""


class GraphTarget(Target):
    """Weights under the dense model's names, without a config: no stock class has to hold them."""

    name = "graph"
    summary = "any widths that the graph's ops accept"
    ragged = True

    def emit(self, compiled: Compiled, sets: SampleSets, folder: Path, log: Log) -> list[str]:
        write_weights(folder / WEIGHTS, compiled.program.state.cast(compiled.prepared.dtype))
        return []

    def wrote(self, folder: Path) -> bool:
        return (folder / WEIGHTS).is_file() and not (folder / "config.json").is_file()

    def checks(self, compiled: Compiled, folder: Path, crossed: Sequence[int]) -> Checks:
        expected = compiled.program.state.cast(compiled.prepared.dtype)
        return Checks((stored_weights(Weights(load_tensors(folder / WEIGHTS, damaged(folder / WEIGHTS))), expected),))


def stored_weights(stored: Weights, expected: Weights) -> Difference:
    """The worst difference between stored weights and those of the rewritten graph. One weight is in memory at a time.

    Raises:
        ProofError: a weight exists on one side only, or has another shape.
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
