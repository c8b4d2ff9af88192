"""gradients: prove that the cut graph trains as the masked one: the gradients of one sample, weight by weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mptk.compat.torch import tree_leaves
from mptk.io.resident import measure_free_memory
from mptk.ir.program import Program
from mptk.ir.samples import Samples
from mptk.protocols.chain import Compiled
from passes.verify import Difference, compare_outputs

GRADIENT_TOLERANCE = 1e-3
"""Largest difference of a gradient, relative to the largest of all: a backward pass sums more than a forward pass."""
GRADIENT_STAGE = "gradients"


def prove_gradients(compiled: Compiled, written: Program, samples: Samples) -> list[Difference]:
    """The difference of the gradients of ``written``, the cut program as it was read back, from the masked program's.

    Empty if there is nothing to compare: no weight is trained, the cut scales norms, so that their weights are others,
    or two sets of gradients do not fit in memory.
    """
    masked, analysis, cut = compiled.masked, compiled.analysis, compiled.chosen.cut
    used = [name for name in masked.parameters if name in analysis.weights and name in written.state]
    trained = [name for name in used if name not in masked.frozen and masked.state.like(name).is_floating_point()]
    bytes_needed = 4 * sum(masked.state.like(name).nbytes for name in trained)
    if (
        not trained
        or compiled.program is not compiled.exact
        or compiled.epsilons
        or bytes_needed > measure_free_memory() / 2
    ):
        return []
    sample = samples if samples.together is not None else samples[: 2 if len(samples) > 1 else 1]
    if compiled.program.types is not None:  # these programs compute in one type
        wide = compiled.program.types.wide
        sample = sample.map(lambda tensor: tensor.to(wide) if tensor.is_floating_point() else tensor)
    expected, found = run_backward(masked, trained, sample), cut_gradients(written, trained, sample)
    pairs = [(found[name], cut.slice(expected[name], analysis.weights[name])) for name in trained]
    one, other = (torch.cat([pair[i].flatten() for pair in pairs])[None, None] for i in (0, 1))
    return [compare_outputs(GRADIENT_STAGE, one, other, GRADIENT_TOLERANCE)]


def cut_gradients(program: Program, trained: list[str], samples: Samples) -> Mapping[str, Tensor]:
    """The gradients of the cut program."""
    return run_backward(program, trained, samples)


def run_backward(program: Program, trained: list[str], samples: Samples) -> Mapping[str, Tensor]:
    """The gradients of a random projection of all outputs by the weights ``trained``; 0 where there is none."""
    leaves = {name: program.state[name].detach().clone().requires_grad_() for name in trained}
    with torch.enable_grad():
        outputs = [t for t in tree_leaves(program.with_state(leaves)(*samples.tensors)) if isinstance(t, Tensor)]
        generator = torch.Generator().manual_seed(0)
        losses = [
            (output * torch.randn(output.shape, generator=generator)).real.sum()
            for output in outputs
            if output.requires_grad
        ]
        if losses:
            torch.stack(losses).sum().backward()
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
