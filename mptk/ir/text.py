"""text: a program as text, one value a line, each dimension by the names of its axes.

    model.embed_tokens.weight : [97, hidden(48)]
    %ids : [batch, seq]
    %embedding : [batch, seq, hidden(48)] = aten.embedding(model.embed_tokens.weight, %ids)

A weight prints as its qualified name, any other value as ``%name``. An axis that can be cut prints as its family's
name with its size, a symbolic size of an input as its name, any other axis as its size. ``·`` is a product of axes (a
view), ``+`` a concatenation. Calls without a value (assertions) are left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from mptk.compat.torch import OpOverload
from mptk.ir.axes import Axis, Product, Term, compute_size, list_axes, resolve
from mptk.ir.families import Analysis
from mptk.ir.program import Program
from mptk.ir.source_location import find_source_line

INPUT_AXES = ("batch", "seq")
"""Names of the first two dimensions of an input, if their sizes are symbolic."""


def describe_program(
    program: Program,
    analysis: Analysis | None = None,
    sizes: Mapping[Axis, int] | None = None,
    *,
    source: bool = False,
) -> str:
    """The program as text.

    Args:
        program: a traced program, or a later form of it.
        analysis: the analysis of the traced program, for the axes of values that keep their names. None: dimensions
            print as sizes.
        sizes: new sizes of the axes that were cut (``Cut.sizes``).
        source: end each call with the line of the model's source, ``# file.py:12``.
    """
    return _Printer(program, analysis, sizes or {}, source).write_text()


@dataclass
class _Printer:
    program: Program
    analysis: Analysis | None
    sizes: Mapping[Axis, int]
    source: bool
    symbols: dict[str, str] = field(default_factory=dict)
    axes: dict[Axis, str] = field(default_factory=dict)
    dims: dict[str, Sequence[Term] | Sequence[Sequence[Term] | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Names of symbols first: axes take theirs from them.
        self.constants = dict(self.program.graph.named_buffers())
        self._name_symbols()
        if self.analysis is not None:
            self.dims = {node.name: dims for node, dims in self.analysis.facts.results.items()}
            self.axes = {g.axis: f.name for f in self.analysis.families for g in f.groups}
            self._name_input_axes()

    def write_text(self) -> str:
        nodes = (n for n in self.program.graph.graph.nodes if self.find_constant(n) is None)
        shown = (n for n in nodes if n.op in ("placeholder", "output") or n.users)
        return "".join(f"{self.write_line(node)}\n" for node in shown)

    def write_line(self, node: fx.Node) -> str:
        if node.op == "output":
            (results,) = node.args
            several = isinstance(results, (list, tuple))
            return f"return {', '.join(map(self.describe_argument, results if several else [results]))}"  # type: ignore[arg-type]
        shape = self.shape(node.meta.get("val"), self.dims.get(node.name))
        line = self.describe_argument(node) + (f" : {shape}" if shape else "")
        if node.op == "placeholder":
            return line
        given = [
            *map(self.describe_argument, node.args),
            *(f"{k}={self.describe_argument(v)}" for k, v in node.kwargs.items()),
        ]
        line += f" = {_name_op(node)}({', '.join(given)})"
        place = find_source_line(node.meta.get("stack_trace") or "") if self.source else ""
        return f"{line}  # {place}" if place else line

    # ---- names ----

    def _name_symbols(self) -> None:
        inputs = set(self.program.user_inputs)
        for node in self.program.list_placeholders():
            value = node.meta.get("val")
            if node.name in inputs and isinstance(value, Tensor):
                for name, size in zip(INPUT_AXES, value.shape, strict=False):
                    if str(size).isidentifier() and name not in self.symbols.values():
                        self.symbols.setdefault(str(size), name)

    def _name_input_axes(self) -> None:
        """If an axis has a symbol as its size in some value, it has the symbol's name in all values."""
        assert self.analysis is not None
        names = set(self.symbols.values())
        for node in self.analysis.program.graph.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and node.name in self.dims:
                for term, size in zip(self.dims[node.name], value.shape, strict=True):
                    axis, name = resolve(term), self.write_size(size)  # type: ignore[arg-type]
                    if isinstance(axis, Axis) and name in names:
                        self.axes.setdefault(axis, name)

    # ---- shapes ----

    def shape(self, value: object, dims: Sequence[Term] | Sequence[Sequence[Term] | None] | None) -> str:
        """The shape of a node's value; empty if that is neither a tensor nor a number."""
        if isinstance(value, (list, tuple)):
            several = dims if isinstance(dims, list) else [None] * len(value)
            return f"({', '.join(self.shape(v, d) for v, d in zip(value, several, strict=True))})"
        if isinstance(value, Tensor):
            known: Sequence[Term | None] = dims if dims is not None else [None] * value.ndim  # type: ignore[assignment]
            return f"[{', '.join(self.describe_dimension(s, t) for s, t in zip(value.shape, known, strict=True))}]"
        return self.write_size(value) if isinstance(value, (int, torch.SymInt)) else ""

    def describe_dimension(self, size: int | torch.SymInt, term: Term | None) -> str:
        if term is None or self.axes.keys().isdisjoint(list_axes(term)):
            return self.write_size(size)
        # A pass may have made another shape of a value that keeps its name. Then the old terms are wrong.
        fits = not isinstance(size, int) or compute_size(term, self.sizes) == size
        return self.write_term(term) if fits else self.write_size(size)

    def write_term(self, term: Term, factor: bool = False) -> str:
        term = resolve(term)
        size = compute_size(term, self.sizes)
        if self.axes.keys().isdisjoint(list_axes(term)):
            return str(size)
        if isinstance(term, Axis):
            name = self.axes[term]
            return name if name in self.symbols.values() else f"{name}({size})"
        if isinstance(term, Product):
            return "·".join(self.write_term(f, factor=True) for f in term.factors)
        text = " + ".join(map(self.write_term, term.segments))
        return f"({text})" if factor else text

    def write_size(self, size: int | torch.SymInt) -> str:
        return re.sub(r"[A-Za-z_]\w*", lambda found: self.symbols.get(found[0], found[0]), str(size))

    # ---- arguments ----

    def find_constant(self, node: fx.Node) -> Tensor | None:
        """The tensor that a pass has put into the graph, such as a mask; None for any other node."""
        return self.constants.get(str(node.target)) if node.op == "get_attr" else None

    def describe_argument(self, value: object) -> str:
        if isinstance(value, fx.Node):
            constant = self.find_constant(value)
            if constant is not None:
                return self.describe_argument(constant.tolist())
            return self.program.weights.get(value.name, f"%{value.name}")
        if isinstance(value, (list, tuple)):
            flags = _flatten_flags(value)  # a mask is an argument of thousands of booleans
            return (
                f"keep({sum(flags)} of {len(flags)})" if flags else f"[{', '.join(map(self.describe_argument, value))}]"
            )
        if isinstance(value, (torch.dtype, torch.layout, torch.device)):
            return str(value).removeprefix("torch.")
        return "end" if value == sys.maxsize else repr(value)  # export writes x[a:] with the largest integer


def _flatten_flags(value: Sequence[object]) -> list[bool]:
    """The booleans of a nested list of booleans, such as a mask; empty if it holds anything else."""
    found: list[bool] = []
    for item in value:
        part = [item] if isinstance(item, bool) else _flatten_flags(item) if isinstance(item, (list, tuple)) else []
        if not part:
            return []
        found += part
    return found


def _name_op(node: fx.Node) -> str:
    """``aten.linear`` or ``aten.add.Tensor``, or the name of a Python function."""
    if isinstance(node.target, OpOverload):
        return str(node.target).removesuffix(".default")
    return str(getattr(node.target, "__name__", node.target))
