"""blocks: the residual blocks of a model, which can be removed whole, and the names of the weights that then stay."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from mptk.ir.axes import Axis


@dataclass(frozen=True, eq=False)
class Block:
    """One module of a list whose result is its input plus what it adds. Without it, its input takes the result's place.

    Attributes:
        module: its path.
        input: the value that enters it.
        output: the value that leaves it, with the axes of ``input``.
        nodes: its calls.
        caches: inputs of the graph (a KV cache) that only it continues, each with the output that continues it.
        stays: why it cannot be removed; empty if it can.
    """

    module: str
    input: fx.Node
    output: fx.Node
    nodes: frozenset[fx.Node] = field(repr=False)
    caches: Mapping[fx.Node, fx.Node] = field(repr=False)
    stays: str = ""


@dataclass(frozen=True, eq=False)
class Stack:
    """A list of residual blocks. ``module``: the path of the list. ``axis``: one position for each block."""

    module: str
    axis: Axis
    blocks: tuple[Block, ...]

    @property
    def stay(self) -> dict[int, str]:
        """Number of each block that cannot be removed → why."""
        return {i: block.stays for i, block in enumerate(self.blocks) if block.stays}

    def share(self, unit: int, width: float) -> float:
        """How much of block ``unit`` is left on average if ``width`` blocks stay and it is not known which.

        Costs of a width are compared before blocks are chosen.
        """
        fixed = len(self.stay)  # these are certain; the others share what is left
        return 1.0 if unit in self.stay else max(0.0, width - fixed) / (len(self.blocks) - fixed)


@dataclass(frozen=True)
class Renumbering:
    """The names of weights after blocks of some lists are removed: the blocks that stay are counted anew.

    ``kept``: the path of a list → the numbers of its blocks that stay, ascending.
    """

    kept: Mapping[str, Sequence[int]]

    def find_new(self, name: str) -> str | None:
        """The name after the removal; None if its block is removed."""
        for module, units in self.kept.items():
            if (at := split_block_name(module, name)) is not None:
                # Each weight belongs to one list: nested lists are not stacks of their own.
                unit, rest = at
                return f"{make_prefix(module)}{units.index(unit)}.{rest}" if unit in units else None
        return name

    def map_names(self, names: Iterable[str]) -> dict[str, str]:
        """New name → name, for the weights that stay."""
        return {new: name for name in names if (new := self.find_new(name)) is not None}

    def restore_names(self, weights: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Weights after the removal under the names that they had before. ``names``: of all weights before."""
        before = self.map_names(names)
        return {before[name]: weight for name, weight in weights.items() if name in before}


def split_block_name(module: str, name: str) -> tuple[int, str] | None:
    """The number of the block of list ``module`` that holds a weight, and its name there; None if none does."""
    found = re.match(rf"{re.escape(make_prefix(module))}(\d+)\.(.+)", name)
    return None if found is None else (int(found[1]), found[2])


def make_prefix(module: str) -> str:
    """The beginning of the names of a module's parts; empty for the model itself."""
    return f"{module}." if module else ""


def list_block_calls(stacks: Iterable[Stack]) -> Iterator[tuple[fx.Node, tuple[Stack, int]]]:
    """Every call within a block, with its stack and the block's number."""
    for stack in stacks:
        for unit, block in enumerate(stack.blocks):
            yield from ((node, (stack, unit)) for node in block.nodes)
