"""dense_outputs: samples with the dense model's outputs as targets, for losses that compare outputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mptk.ir.samples import Samples, join_outputs
from mptk.protocols.chain import Prepared

DENSE_POSITIONS = 2048
"""Positions in a batch whose outputs of the dense model are kept."""


def with_dense_outputs(prepared: Prepared, samples: Samples) -> Samples:
    """``samples`` with the dense model's outputs as targets."""
    batches, program = samples.make_batches(DENSE_POSITIONS), prepared.reference
    found = prepared.executor.outputs([program], [batch.tensors for batch in batches])
    targets = torch.cat([(output if isinstance(output, Tensor) else join_outputs(output)).cpu() for output in found])
    return replace(samples, targets=targets)
