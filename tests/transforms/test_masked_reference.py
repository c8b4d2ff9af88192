"""The masked program: its weights are those of the dense one, multiplied by their masks while it runs."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from decoder_analyses import analyze_decoder
from torch.utils._python_dispatch import TorchDispatchMode

from mptk import testing
from mptk.ir import Analysis, Cut, Program, resolve_plan
from mptk.testing import draw_plan
from passes.transforms.masked_reference import mask


def with_masked_weights(analysis: Analysis, cut: Cut) -> Program:
    """The masked program, if its weights are multiplied by whole masks beforehand."""
    program = mask(analysis, cut)
    for keep in program.graph.buffers():
        keep.fill_(True)
    dims, state = analysis.weights, program.state.items()
    return replace(program, state={n: t * cut.mask_tensor(dims[n]) if n in dims else t for n, t in state})


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2"])
def test_no_bit_differs_from_weights_masked_beforehand(architecture):
    """gpt2: layer norms over the cut residual width. mixtral: each expert keeps its own units."""
    analysis = analyze_decoder(architecture)
    cut = resolve_plan(analysis, draw_plan(analysis))
    ids = testing.draw_tokens()
    assert torch.equal(mask(analysis, cut)(ids), with_masked_weights(analysis, cut)(ids))
    assert not torch.equal(mask(analysis, cut)(ids), analysis.program(ids))


class Alive(TorchDispatchMode):
    """Counts the masked weights that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.most = [], 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        if op is torch.ops.aten.mul.Tensor and getattr(args[1], "dtype", None) is torch.bool:
            self.made.append(weakref.ref(result))
            self.most = max(self.most, sum(ref() is not None for ref in self.made))
        return result


def test_no_weight_is_copied_but_while_it_is_used():
    analysis = analyze_decoder("llama")
    cut = resolve_plan(analysis, draw_plan(analysis, ["ffn"]))
    program = mask(analysis, cut)
    assert all(program.state[name] is tensor for name, tensor in analysis.program.state.items())
    with torch.no_grad(), Alive() as alive:
        program(testing.draw_tokens())
    assert len(alive.made) == 3 * testing.decoders.LAYER_COUNT
    assert alive.most == 1
