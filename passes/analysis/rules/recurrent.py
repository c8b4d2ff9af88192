"""recurrent: LSTM, GRU and RNN: each gate has a row for each hidden unit.

A unit whose weights are zero stays at zero if it starts there: its new value is a tanh (or relu) of 0, and gates only
scale its old one. So hidden units are cut as channels are. The units of all layers and directions are one axis, since
one tensor holds the state of all.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from mptk.compat.torch import tree_leaves
from mptk.ir import Axis, AxisFacts, Dims, Results, Term, collect_axes, concat, make_axis, make_product
from passes.analysis.rules.context import RuleContext, Value
from passes.analysis.rules.opaque import opaque
from passes.analysis.rules.table import ZeroOf, align, rule

State = Value | Sequence[Value]
"""The hidden state, or hidden state and cell, [layers · directions, samples, units]; [samples, units] for a cell."""


def _zero_of_units(node: fx.Node, zero: ZeroOf, facts: AxisFacts) -> set[Axis]:
    """Zero along the units if all weights are, and the state at the start."""
    units = collect_axes(facts.list_dims(node)[0][-1:])
    given = [value for value in tree_leaves(node.args[1:]) if isinstance(value, fx.Node)]
    return set.intersection(units, *map(zero, given))


def _list_states(state: State) -> Sequence[Value]:
    return [state] if isinstance(state, Value) else state


@rule("aten.lstm.input", "aten.gru.input", "aten.rnn_tanh.input", "aten.rnn_relu.input", zero=_zero_of_units)
def layers(
    ctx: RuleContext, node: fx.Node, x: Value, state: State, weights: Sequence[Value], biases: bool, *options: object
) -> Results:
    """W_ih = gates · units, x_last; W_hh = gates · units, units; y_last = units of each direction."""
    sizes = {value.dims[-1].size for value in _list_states(state)}
    if len(sizes) > 1:  # an LSTM with projections
        return opaque(ctx, node, x, state, weights)
    # ``weights`` has ``count`` tensors for each direction of each layer: W_ih, W_hh and their biases. ``options`` are
    # layers, dropout, training, bidirectional, batch first. Only the first layer reads x.
    unit, count, both = make_axis(sizes.pop()), 4 if biases else 2, 2 if options[3] else 1
    steps = _pin_steps(ctx, node, x, state, unit)
    for i in range(0, len(weights), count):
        _tie_gates(ctx, node, x if i < count * both else None, weights[i : i + count], unit, both)
    out = (*x.dims[:-1], concat([unit] * both))
    return [out, *steps]


def _pin_steps(ctx: RuleContext, node: fx.Node, x: Value, state: State, unit: Term) -> list[Dims]:
    """Pin samples and steps. Returns the dimensions of the state."""
    for value in (x, *_list_states(state)):
        for d in value.dims[:-1]:
            ctx.freeze(d, "samples and steps of a recurrent layer", node)
    for value in _list_states(state):
        ctx.unify(value.dims[-1], unit, node)
    return [(*value.dims[:-1], unit) for value in _list_states(state)]


def _tie_gates(
    ctx: RuleContext, node: fx.Node, x: Value | None, weights: Sequence[Value], unit: Term, both: int = 1
) -> None:
    """Tie the weights of one layer and direction. ``x``: its input; None if that is the layer before it."""
    first, second = weights[:2]
    # Rows of all weights and biases are gates · units. W_hh sums over the units of the step before.
    gates = ctx.make_frozen(first.dims[0].size // unit.size, "gates of a recurrent layer", node)
    for value in weights:
        ctx.unify(value.dims[0], make_product((gates, unit)), node)
    ctx.unify(second.dims[1], unit, node)
    ctx.reduce(node, unit, "sum", second.node)
    if x is not None:
        ctx.contract(node, x, x.ndim - 1, first, 1, (*x.dims[:-1], first.dims[0]))
        return
    ctx.unify(first.dims[1], concat([unit] * both), node)
    ctx.reduce(node, unit, "sum", first.node)


@rule("aten.lstm_cell", "aten.gru_cell", "aten.rnn_tanh_cell", "aten.rnn_relu_cell", zero=_zero_of_units)
def cell(ctx: RuleContext, node: fx.Node, x: Value, state: State, *weights: Value) -> Results:
    """One step of one layer: W_ih = gates · units, x_last; W_hh = gates · units, units; y_last = units."""
    unit = make_axis(_list_states(state)[0].dims[-1].size)
    out = (*x.dims[:-1], unit)
    for value in _list_states(state):
        align(ctx, node, value.dims, out)
    _tie_gates(ctx, node, x, [w for w in weights if w is not None], unit)
    return out if isinstance(state, Value) else [out, out]
