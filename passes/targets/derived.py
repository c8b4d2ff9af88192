"""derived: families of whose width a stock class makes a number that no weight shows."""

from __future__ import annotations

import math

from torch import fx

from mptk.ir.axes import Axis, Product, axes_in, resolve
from mptk.ir.families import Analysis
from mptk.ir.ops import base_name
from mptk.ir.source_location import SourceLocation
from passes.transforms.fold_norms import unfoldable

SCALINGS = frozenset({"mul", "multiply", "div", "divide"})


def derived_families(analysis: Analysis) -> dict[str, str]:
    """Families whose width enters numbers that a stock class computes from its config, with the reason.

    If they were cut, the shapes would fit but the logits would not:
    1. channels in a contraction of two activations: attention's scale depends on their number;
    2. channels along which the graph reads a constant: rotary tables, position biases;
    3. channels under a mean whose scale no weight can take (``passes/transforms/fold_norms.py``);
    4. groups of experts: no weight shows how many there are, so the class would divide the experts that stay anew;
    5. channels that are multiplied by a power of their number, as T5's before its head.
    """
    facts = analysis.facts
    scaled = axes_in(product.axis for product in facts.contractions if not facts.has_weight(product))
    tables = axes_in(term for uses in facts.constant_uses.values() for _, dims in uses for term in dims)
    experts = [term for route in facts.routes if isinstance(term := resolve(route.expert), Product)]
    grouping = axes_in(factor for term in experts for factor in term.factors[:-1])
    powers = multiplied_by_their_number(analysis)
    reasons = {}
    for family in analysis.families:
        axis = family.groups[0].axis
        if axis in grouping:
            reasons[family.name] = "the stock class would divide the experts that stay into as many groups as before"
        elif axis in tables:
            reasons[family.name] = "the stock class would compute its rotary tables or biases anew"
        elif axis in scaled:
            reasons[family.name] = "the stock class would derive another attention scale"
        elif axis in powers:
            reasons[family.name] = f"the stock class would derive another scale ({powers[axis]})"
        elif (place := unfoldable(analysis, family)) is not None:
            reasons[family.name] = (
                f"the stock class would take a mean over fewer channels, with no weight to make up for it ({place})"
            )
    return reasons


def multiplied_by_their_number(analysis: Analysis) -> dict[Axis, SourceLocation]:
    """Axes of n channels that a call multiplies by n^½, n^-½ or 1/n, with its place.

    A number that two axes explain (a scale of attention, if there are as many heads as channels in each) is left out.
    """
    found = {}
    for node in analysis.program.graph.graph.nodes:
        numbers = [arg for arg in node.args if isinstance(arg, float)]
        value = next((arg for arg in node.args if isinstance(arg, fx.Node)), None)
        if node.op != "call_function" or base_name(node.target) not in SCALINGS or not numbers or value is None:
            continue
        if not isinstance(dims := analysis.facts.results.get(value), tuple) or not dims:
            continue
        scales = (numbers[0], 1 / numbers[0] if numbers[0] else 0.0)
        axes = [
            axis
            for axis in axes_in(dims[-1:])
            if any(math.isclose(scale, axis.size**p, rel_tol=1e-7) for scale in scales for p in (0.5, 1.0))
        ]
        if len(axes) == 1 and axes[0].size > 1:
            found[axes[0]] = SourceLocation(node)
    return found
