"""choose_blocks: choose the blocks that stay, by their scores, among the choices that a target can hold."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mptk.errors import TargetError
from mptk.ir import Stack
from passes.targets.stock.config import StockConfig
from passes.targets.stock.learn import Stock

Selection = tuple[float, tuple[int, ...]]
"""The sum of the blocks' scores, and their numbers."""


def choose_blocks(stack: Stack, scores: Sequence[float], width: int, stock: Stock | None) -> tuple[int, ...]:
    """The ``width`` blocks with the largest scores, ascending, including all that cannot be removed.

    ``scores``: one for each block. ``stock``: the class that must hold the choice. If it derives a block's kind from
    its position and cannot hold the best choice, the best choice that fits its pattern is taken.

    Raises:
        MptkError: the class cannot hold ``width`` of the blocks.
    """
    free = sorted((unit for unit in range(len(scores)) if unit not in stack.stay), key=lambda unit: -scores[unit])
    best = tuple(sorted([*stack.stay, *free[: width - len(stack.stay)]]))
    if stock is None:
        return best
    found = stock.find_depth_config({stack.module: best})
    if isinstance(found, StockConfig):
        return best
    kinds = stock.find_pattern(stack.module, width)
    other = None if kinds is None else find_best_sequence(*kinds, scores, stack.stay)
    if other is None or not isinstance(stock.find_depth_config({stack.module: other}), StockConfig):
        raise TargetError(
            f"the stock class does not hold {width} of the {len(scores)} blocks of {stack.module}: {found}; choose "
            "another number, or use --target graph",
            name=stack.module,
        )
    return other


def find_best_sequence(
    kinds: Sequence[object], wanted: Sequence[object], scores: Sequence[float], stay: Collection[int]
) -> tuple[int, ...] | None:
    """The blocks of the wanted kinds, in this order, with the largest sum of scores; None if no blocks fit.

    ``stay``: numbers of blocks that must be included. Dynamic programming: the best choice for the first j places among
    the first i blocks either ends with block i or uses only the first i − 1.
    """
    none: Selection = (float("-inf"), ())
    row: list[Selection] = [(0.0, ()), *[none] * len(wanted)]
    for unit, kind in enumerate(kinds):
        skipped = [none] * len(row) if unit in stay else row
        taken = [none] + [
            (total + scores[unit], (*units, unit)) if want == kind and total > none[0] else none
            for (total, units), want in zip(row, wanted, strict=False)
        ]
        row = [max(pair, key=lambda choice: choice[0]) for pair in zip(skipped, taken, strict=True)]
    return row[-1][1] if row[-1][0] > none[0] else None
