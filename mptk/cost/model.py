"""model: parameters, operations, bytes and latency of a model as functions of its families' widths."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from torch import fx

from mptk.cost.budgets import BUDGETS, CACHED, LATENCY
from mptk.errors import InputError
from mptk.ir import (
    Analysis,
    Axis,
    Family,
    Plan,
    Term,
    Variables,
    compute_size,
    find_aliased_arguments,
    get_argument,
    list_block_calls,
    resolve_result_shape,
    split_block_name,
)


@dataclass(frozen=True)
class Cost:
    """The cost of a model at some widths.

    ``parameters``: all, tied ones once. ``block``: the parameters in the prunable weights (``find_block_weights``).
    ``flops``: operations in products with weights for one input token, 2 for a multiply-add. Attention's own products
    grow with the context and are not counted. ``bytes``: size of all parameters in their dtype.
    ``latency_ms``: predicted milliseconds of a step (the feature ``latency``), if latency is budgeted. ``kv_cache``:
    bytes of the keys and values of a context, if they are budgeted; ``serving``: these and ``bytes`` together.
    """

    parameters: float
    block: float
    flops: float
    bytes: float
    latency_ms: float | None = None
    kv_cache: float | None = None
    serving: float | None = None

    def to_dict(self) -> dict[str, float]:
        """The known figures by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


Shares = dict[Axis, Sequence[float]]
"""Axis of a stack → how much of each of its blocks is left. A stack without an entry stays whole."""


class CostModel:
    """Cost of an analysed model at any widths (variable's name → units kept). What is not named stays whole.

    ``variables``: all of the model; ``tie`` gives others.

    ``budget``: a key of ``BUDGETS``; sparsity is a share of it. ``latency``: widths → milliseconds, for the budget of
    that name. ``itemsize``: bytes of a floating number as it is stored; None: as in the program. ``before``: the
    analysis of the model before its KV heads were merged; its cost is then the dense one, except for the latency.
    ``context``: tokens in the KV cache. Each layer counts with all of them, also if its attention looks at fewer.
    """

    def __init__(
        self,
        analysis: Analysis,
        budget: str = "params",
        latency: Callable[[Mapping[str, float]], float] | None = None,
        *,
        itemsize: int | None = None,
        before: Analysis | None = None,
        context: int = 0,
    ) -> None:
        if budget not in BUDGETS:
            raise InputError(
                f"no budget {budget!r}; choose one of {', '.join(BUDGETS)}", name="budget", nearest=BUDGETS
            )
        self.analysis, self.budget, self._latency = analysis, BUDGETS[budget], latency
        self.variables = analysis.make_variables()
        self._counts, self._number, self._context = budget, itemsize, context
        # What a width changes: weights whose axes are cut (``_used``), and weights of blocks that may go. Others always
        # count whole.
        program = analysis.program
        self._used = {name: analysis.weights[name] for name in program.parameters if name in analysis.weights}
        sizes = {name: program.state.find_like(name) for name in program.parameters}
        self._itemsize = {
            n: itemsize if itemsize and t.is_floating_point() else t.element_size() for n, t in sizes.items()
        }
        self._idle = {name: sizes[name].numel() for name in program.parameters if name not in self._used}
        self._blocks = {name: at for name in program.parameters if (at := _find_block(analysis, name)) is not None}
        self._kept = find_keys_and_values(analysis) if budget in CACHED else None
        self._calls = {node: (stack.axis, unit) for node, (stack, unit) in list_block_calls(analysis.stacks)}
        self.block_weights = find_block_weights(analysis)

        # After a conversion shares are of the model before it, which is the one that the user knows.
        self.whole = self({})
        self.dense = self.whole
        if before is not None:
            self.dense = self.of_whole(before, itemsize)

    def tie(self, variables: Variables) -> CostModel:
        """The same cost as a function of other variables."""
        tied = copy.copy(self)
        tied.variables = variables
        return tied

    def _find_sizes(self, widths: Mapping[str, float]) -> dict[Axis, float]:
        named = {name: self.variables.get(name) or self.analysis.variable(name) for name in widths}  # or only a plan's
        return {g.axis: widths[name] for name, variable in named.items() for g in variable.groups}

    def __call__(self, widths: Mapping[str, float]) -> Cost:
        """The cost at ``widths``. Which blocks a depth keeps is not known: each counts with its share on average."""
        return self._compute_cost(widths, compute_depth_shares(self.analysis, widths))

    def of_whole(self, analysis: Analysis, itemsize: int | None) -> Cost:
        """The cost of another uncut model, counted alike, with this model's latency: the other one was not timed."""
        budget = "params" if self._counts == LATENCY else self._counts
        cost = CostModel(analysis, budget, itemsize=itemsize, context=self._context).dense
        return replace(cost, latency_ms=self.whole.latency_ms)

    def of(self, plan: Plan) -> Cost:
        """The cost of the model cut to ``plan``."""
        shares: Shares = {}
        for depth in self.analysis.depths:
            if depth.name in plan.families:
                (units,) = plan.families[depth.name].keep[depth.stack.module]
                shares[depth.stack.axis] = [int(unit in units) for unit in range(depth.size)]
        return self._compute_cost(plan.widths, shares)

    def _compute_cost(self, widths: Mapping[str, float], shares: Shares) -> Cost:
        # Everything is a product of axis sizes, so fractional widths cost what lies between, as the solver needs.
        sizes = self._find_sizes(widths)
        counts = {name: self._count(name, sizes, shares) for name in (*self._idle, *self._used)}
        size, cache = sum(n * self._itemsize[name] for name, n in counts.items()), self._count_kv_cache(sizes, shares)
        return Cost(
            parameters=sum(counts.values()),
            block=sum(counts[name] for name in self.block_weights),
            flops=self._count_flops(sizes, shares),
            bytes=size,
            latency_ms=None if self._latency is None else self._latency(widths),
            kv_cache=cache,
            serving=None if cache is None else size + cache,
        )

    def compute_sparsity(self, widths: Mapping[str, int]) -> float:
        """Share of the budget that a cut to ``widths`` removes. The budget is usually the block parameters."""
        return 1 - self.share(widths)

    def share(self, widths: Mapping[str, float]) -> float:
        """Share of the budget that is left at ``widths``, which may be fractions."""
        if self.budget == "block":  # asked for in each update of MaskPrune's solver: nothing else is counted
            sizes, shares = self._find_sizes(widths), compute_depth_shares(self.analysis, widths)
            left = sum(self._count(name, sizes, shares) for name in self.block_weights)
        else:
            left = getattr(self(widths), self.budget)
        return float(left / getattr(self.dense, self.budget))

    def _count(self, name: str, sizes: Mapping[Axis, float], shares: Shares) -> float:
        """The numbers of a weight that are left."""
        count: float = self._idle.get(name, 1)
        for term in self._used.get(name, ()):
            count *= compute_size(term, sizes)
        axis, unit = self._blocks.get(name, (None, 0))
        return count if axis not in shares else count * shares[axis][unit]

    def count_unit_parameters(self, family: Family) -> float:
        """Parameters of one unit of ``family`` in all layers of the dense model."""
        return (self.whole.parameters - self({family.name: family.size - 1}).parameters) if family.size > 1 else 0.0

    def _count_kv_cache(self, sizes: Mapping[Axis, float], shares: Shares) -> float | None:
        """Bytes of the keys and values of ``context`` tokens; None if they are not budgeted."""
        if self._kept is None:
            return None
        tokens, total = count_example_tokens(self.analysis), 0.0
        for kept in self._kept:
            numbers = sum(math.prod(compute_size(term, sizes) for term in dims) for dims in kept.dims) / tokens
            axis, unit = self._calls.get(kept.node, (None, 0))
            share = shares[axis][unit] if axis in shares else 1
            total += numbers * share * self._context * (self._number or kept.itemsize)
        return total

    def _count_flops(self, sizes: Mapping[Axis, float], shares: Shares) -> float:
        facts, tokens = self.analysis.facts, count_example_tokens(self.analysis)
        total: float = 0
        for product in facts.contractions:
            if facts.has_weight(product):
                count: float = 2 * compute_size(product.axis, sizes)
                for term in product.out:
                    count *= compute_size(term, sizes)
                axis, unit = self._calls.get(product.node, (None, 0))
                total += count * shares[axis][unit] if axis in shares else count
        return total // tokens if isinstance(total, int) else total / tokens


def compute_depth_shares(analysis: Analysis, widths: Mapping[str, float]) -> Shares:
    """Of each depth in ``widths``, how much of each block is left on average over the choices of blocks."""
    return {
        f.stack.axis: [f.stack.share(unit, widths[f.name]) for unit in range(f.size)]
        for f in analysis.depths
        if widths.get(f.name, f.size) != f.size
    }


def _find_block(analysis: Analysis, name: str) -> tuple[Axis, int] | None:
    """The block that a weight belongs to: its stack's axis, and its number."""
    found = (
        (stack.axis, at[0]) for stack in analysis.stacks if (at := split_block_name(stack.module, name)) is not None
    )
    return next(found, None)


def count_example_tokens(analysis: Analysis) -> int:
    """Number of tokens in the example input: the product of its first two dimensions."""
    first = next(n for n in analysis.program.list_placeholders() if n.name in analysis.program.user_inputs)
    shape = resolve_result_shape(first)
    return int(shape[0] * shape[1]) if len(shape) > 1 else int(shape[0])


def find_block_weights(analysis: Analysis) -> frozenset[str]:
    """The prunable weights: members of families with one group for each layer; without such families, of all."""
    found = {m.weight for f in analysis.families if is_layered(f) for g in f.groups for m in g.members}
    found = found or {m.weight for f in analysis.families for g in f.groups for m in g.members}
    return frozenset(found & set(analysis.program.parameters))


def is_layered(family: Family) -> bool:
    """Whether a family has a group for each layer, and not one group over all layers (as the residual width)."""
    return len(family.groups) > 1


# ---- keys and values, as they are before query heads share them ----


@dataclass(frozen=True)
class KeysAndValues:
    """What an attention keeps of the tokens it has seen. ``dims``: of the keys, and of the values, of all tokens.

    ``itemsize``: bytes of a number, as the program computes it.
    """

    node: fx.Node
    dims: tuple[tuple[Term, ...], ...]
    itemsize: int


def find_keys_and_values(analysis: Analysis) -> list[KeysAndValues]:
    """What each attention of a program keeps."""
    found = []
    for node in dict.fromkeys(product.node for product in analysis.facts.contractions):
        if is_attention(node):
            kept = [find_unrepeated(get_argument(node, name)) for name in ("key", "value")]
            dims = tuple(tuple(analysis.facts.dims(each)) for each in kept)
            found.append(KeysAndValues(node, dims, kept[0].meta["val"].dtype.itemsize))
    return found


def is_attention(node: fx.Node) -> bool:
    """Whether a call is an attention in one operator."""
    return "scaled_dot_product_attention" in str(node.target)  # it has a variant for each backend


def find_unrepeated(node: fx.Node) -> fx.Node:
    """The value with the fewest elements among ``node`` and the values that it is a view of."""
    seen = [node]
    while is_view(seen[-1]):
        seen.append(seen[-1].all_input_nodes[0])
    return min(seen, key=lambda value: math.prod(resolve_result_shape(value)))


def is_view(node: fx.Node) -> bool:
    """Whether the result shares memory with an input, by the op's schema."""
    return bool(find_aliased_arguments(node.target, writes=False))
