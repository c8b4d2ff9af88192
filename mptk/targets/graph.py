"""graph: the weights of the rewritten graph, for use from Python. Any width that the graph's ops accept is legal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mptk.errors import ProofError
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

    def emit(self, compiled: Compiled, sets: SampleSets, folder: Path, log: Log) -> list[str]:
        state = in_stored_type(compiled.program.state, compiled.prepared.dtype)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
        return []

    def wrote(self, folder: Path) -> bool:
        return (folder / WEIGHTS).is_file() and not (folder / "config.json").is_file()

    def checks(self, compiled: Compiled, folder: Path, crossed: Sequence[int]) -> Checks:
        expected = in_stored_type(compiled.program.state, compiled.prepared.dtype)
        return Checks((stored_weights(Weights(load_file(folder / WEIGHTS)), expected),))


def in_stored_type(state: Weights, dtype: torch.dtype) -> Weights:
    """Weights by name in the type that they are stored in. Tensors that are no floating numbers keep theirs."""
    floats = [name for name, like in state.likes.items() if like.is_floating_point()]
    return state.changed(dict.fromkeys(floats, lambda tensor: tensor.to(dtype)))


def stored_weights(stored: Weights, expected: Weights) -> Difference:
    """The worst difference between stored weights and those of the rewritten graph. One weight is in memory at a time.

    Raises:
        ProofError: a weight exists on one side only, or has another shape.
    """
    worst = Difference("stored weights", 0.0, 0.0, EXACT)
    for name in sorted(stored.keys() | expected.keys()):
        if name not in stored or name not in expected or stored.like(name).shape != expected.like(name).shape:
            raise ProofError(f"the proof fails at 'stored weights': {name} is missing or of another shape; prune again")
        pair = stored[name], expected[name]
        if not pair[0].equal(pair[1]):
            one, other = (tensor.float().flatten()[None, None] for tensor in pair)
            found = difference("stored weights", one, other, EXACT)
            worst = found if not found.relative <= worst.relative else worst
    return worst
