"""steady: whether a program gives the same each time. If not, no cut of it can be compared with it.

Cases: a call draws random numbers, as a dropout that is always on; a call changes an input in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mptk.compat.torch import find_schema, tree_leaves
from mptk.errors import MptkError
from mptk.ir.ops import find_storage, find_written_arguments, get_argument
from mptk.ir.program import Program
from mptk.ir.source_location import SourceLocation
from passes.frontend.eager import compute_relative_error

STEADY = 5e-5
"""Smallest difference of two runs that counts, relative to the largest number: the tolerance of a proof."""
_OFF = ("p", "dropout_p", "train", "training")
"""Arguments that switch a call's random numbers off if they are 0 or False."""


def check_steady(program: Program, run: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor], name: str) -> None:
    """Raise MptkError if two runs of the program on the same tensors differ.

    It runs only if a call could make them differ. ``run``: inputs → outputs. ``name``: the model's.
    """
    nodes = [node for node in program.graph.graph.nodes if node.op == "call_function"]
    user = {n for n in program.list_placeholders() if n.name in program.user_inputs}
    changing = [node for node in nodes if any(find_storage(target) in user for target in find_written_arguments(node))]
    drawing = [node for node in nodes if is_random_call(node)]
    if not changing and not drawing:
        return
    given = [tensor.clone() for tensor in inputs]
    with torch.random.fork_rng(devices=[]):
        first, second = ([t.clone() for t in tree_leaves(run(given)) if isinstance(t, Tensor)] for _ in range(2))
    apart = max((compute_relative_error(a, b) for a, b in zip(first, second, strict=True)), default=0.0)
    if apart <= STEADY:
        return
    if changing and not all(torch.equal(a, b) for a, b in zip(given, inputs, strict=True)):
        raise MptkError(
            f"forward of {name} changes its input in place ({SourceLocation(changing[0])}), so a second run on the "
            "same tensor gives something else; change a copy, as of x = x.clone()"
        )
    if drawing:
        raise MptkError(
            f"forward of {name} draws random numbers ({SourceLocation(drawing[0])}): two runs on the same inputs "
            f"differ by {apart:.1e} of the largest, so no cut can be compared with it; draw none in evaluation mode, "
            "as by dropout(x, training=self.training), or make them an input"
        )


def is_random_call(node: fx.Node) -> bool:
    """Whether a call draws random numbers."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    signature = find_schema(node.target)
    given = {} if signature is None else {a.name: a.default_value for a in signature.arguments if a.name in _OFF}
    return all(get_argument(node, name, default) for name, default in given.items())
