"""derived: families from whose width a stock class computes numbers that no weight shows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Set

from torch import fx

from mptk.ir import Analysis, Axis, Product, SourceLocation, collect_axes, find_argument_at, name_base_op, resolve
from passes.transforms.fold_norms import find_unfoldable

ALIKE = re.compile(r"(new_)?(zeros|ones|full)(_like)?|scalar_tensor")
"""Calls that make tensors with one value in all entries."""
CARRYING = frozenset({"to", "_to_copy", "clone", "contiguous", "expand", "unsqueeze", "view", "reshape", "transpose"})
"""Calls whose result has only values of their first argument."""
SCALINGS = frozenset({"mul", "multiply", "div", "divide"})


def find_derived_families(analysis: Analysis) -> dict[str, str]:
    """Families whose width a stock class computes numbers from, with the reason.

    If they were cut, the shapes would fit but the logits would not:
    1. channels in a contraction of two activations: attention's scale depends on their number;
    2. channels along which the graph reads a constant of more than one number: rotary tables, position biases;
    3. channels under a mean whose scale no weight can take (``passes/transforms/fold_norms.py``);
    4. groups of experts: no weight shows how many there are, so the class would divide the experts that stay anew;
    5. channels that are multiplied by a power of their number, as T5's before its head;
    6. groups of channels that are normalised together: no weight shows how many there are, either.
    """
    # The axes of cases 1 ``scaled``, 2 ``tables``, 4 ``grouping``, 5 ``powers`` and 6 ``normed``. In a product of axes
    # all factors but the last count groups.
    facts = analysis.facts
    scaled = collect_axes(product.axis for product in facts.contractions if not facts.has_weight(product))
    uses = [(find_argument_at(node, path), dims) for node, each in facts.constant_uses.items() for path, dims in each]
    written = {value for values in facts.writes.values() for value in values}
    tables = collect_axes(term for constant, dims in uses if not of_one_number(constant, written) for term in dims)
    experts = [term for route in facts.routes if isinstance(term := resolve(route.expert), Product)]
    grouping = collect_axes(factor for term in experts for factor in term.factors[:-1])
    normed = collect_axes(factor for term in find_normed_channels(analysis) for factor in term.factors[:-1])
    powers = find_size_scaled_axes(analysis)
    # A family may have several reasons: one is said.
    reasons = {}
    for family in analysis.families:
        axis = family.groups[0].axis
        if axis in grouping:
            reasons[family.name] = "the stock class would divide the experts that stay into as many groups as before"
        elif axis in normed:
            reasons[family.name] = "the stock class would normalise the channels that stay in as many groups as before"
        elif axis in tables:
            reasons[family.name] = "the stock class would compute its rotary tables or biases anew"
        elif axis in scaled:
            reasons[family.name] = "the stock class would derive another attention scale"
        elif axis in powers:
            reasons[family.name] = f"the stock class would derive another scale ({powers[axis]})"
        elif (place := find_unfoldable(analysis, family)) is not None:
            reasons[family.name] = (
                f"the stock class would take a mean over fewer channels, with no weight to make up for it ({place})"
            )
    return reasons


def find_normed_channels(analysis: Analysis) -> Iterator[Product]:
    """The channels of each norm over groups of them, as a product: groups times channels in each."""
    for node in analysis.program.graph.graph.nodes:
        if node.op == "call_function" and name_base_op(node.target) == "group_norm":
            dims = analysis.facts.results.get(node.args[0])
            if isinstance(dims, tuple) and isinstance(term := resolve(dims[1]), Product):
                yield term


def of_one_number(constant: fx.Node, written: Set[fx.Node]) -> bool:
    """Whether all entries of a constant are equal, such as the zeros at the start of a recurrence.

    Such a constant can be made for any width. ``written``: the values that a call changes in place.
    """
    while constant not in written and constant.op == "call_function" and name_base_op(constant.target) in CARRYING:
        (constant, *_) = constant.all_input_nodes
    made = constant.op == "call_function" and ALIKE.fullmatch(name_base_op(constant.target)) is not None
    return made and constant not in written


def find_size_scaled_axes(analysis: Analysis) -> dict[Axis, SourceLocation]:
    """Axes of n channels that a call multiplies by n^½, n, or one divided by these, with the place of the call.

    A number that two axes explain (attention's scale, if heads and channels in a head are equally many) is left out.
    """
    found = {}
    for node in analysis.program.graph.graph.nodes:
        numbers = [arg for arg in node.args if isinstance(arg, float)]
        value = next((arg for arg in node.args if isinstance(arg, fx.Node)), None)
        if node.op != "call_function" or name_base_op(node.target) not in SCALINGS or not numbers or value is None:
            continue
        if not isinstance(dims := analysis.facts.results.get(value), tuple) or not dims:
            continue
        # With the inverse, too, multiplications and divisions need not be told apart. Channels are the last axis.
        scales = (numbers[0], 1 / numbers[0] if numbers[0] else 0.0)
        axes = [
            axis
            for axis in collect_axes(dims[-1:])
            if any(math.isclose(scale, axis.size**p, rel_tol=1e-7) for scale in scales for p in (0.5, 1.0))
        ]
        if len(axes) == 1 and axes[0].size > 1:
            found[axes[0]] = SourceLocation(node)
    return found
