"""kv_cache: the keys and values of a model's attentions, as they are before query heads share them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from mptk.ir.axes import Term
from mptk.ir.families import Analysis
from mptk.ir.ops import find_aliased_arguments, get_argument, resolve_result_shape


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
    return "scaled_dot_product_attention" in str(node.target)


def find_unrepeated(node: fx.Node) -> fx.Node:
    """The value with the fewest elements among ``node`` and the values that it is a view of."""
    seen = [node]
    while is_view(seen[-1]):
        seen.append(seen[-1].all_input_nodes[0])
    return min(seen, key=lambda value: math.prod(resolve_result_shape(value)))


def is_view(node: fx.Node) -> bool:
    """Whether the result shares memory with an input, by the op's schema."""
    return bool(find_aliased_arguments(node.target, writes=False))
