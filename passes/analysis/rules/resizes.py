"""resizes: common ``resize`` functions. They adapt a call's size arguments if axes shrink."""

from __future__ import annotations

from torch import fx

from mptk.ir.ops import named_argument, set_argument
from passes.analysis.rules.context import Resizer
from passes.analysis.rules.notes import Counted
from passes.analysis.rules.table import Resize


def shape_argument(name: str = "size") -> Resize:
    """The argument is the list of the result's sizes."""

    def resize(resizer: Resizer, node: fx.Node) -> None:
        sizes = named_argument(node, name)
        set_argument(node, name, [resizer.scaled(s, d) for s, d in zip(sizes, resizer.dims(node), strict=True)])

    return resize


def counted_argument(name: str, less: int = 0) -> Resize:
    """The argument is the number of positions of the rule's ``Counted`` axis, minus a constant."""

    def resize(resizer: Resizer, node: fx.Node) -> None:
        counted = resizer.note(node, Counted)
        if counted is not None and resizer.changed(counted.term):
            set_argument(node, name, resizer.size(counted.term) - less)

    return resize
