"""coupling: draw which matrices of one layer must be cut together, as a graph from top to bottom.

A node is a module with weights, or a family. An edge joins a module with a family whose units one of its weights holds.
It leads from the module that makes the units to the family, and from there to the modules that sum over them or hold
them in another way (a norm's weight). A module's left side has the colours of the families in its weights' first
dimension, its top the colours of the second.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import networkx as nx

from mptk.ir import Analysis, Family, Group, Member
from mptk.report.page.svg import INK, LINE, PAPER, QUIET, SERIES, WIDTH, Svg, draw_chart
from passes.targets.legalize import LegalWidths

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Rectangle

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""The number in a module's name."""
BEFORE, AFTER = "before", "after"
MAKES, SUMS, HOLDS = "makes the units", "sums over them", "holds them"
STYLES = {MAKES: "-", SUMS: "--", HOLDS: ":"}
APART, BETWEEN = 0.74, 1.0
"""Least distance of nodes in a row, and the distance of rows, in inches."""
BOX = (0.58, 0.44)
"""Size of a node, in inches."""
STRIP = 0.06
"""Width of a coloured side, in inches."""
LETTERS = 10
"""Most letters in a line of a node: what a box of this width holds."""


@dataclass(frozen=True)
class Edge:
    """A module's weight that holds a family's units in one dimension. ``how``: a key of ``STYLES``."""

    module: str
    family: str
    how: str
    weight: str
    dim: int


@dataclass(frozen=True)
class Layer:
    """The part of a model that is drawn.

    ``name``: the module that holds it. ``shapes``: of each weight. ``units``: family → its width. ``through``: families
    that run through all layers. ``refused``: families that the target cannot cut.
    """

    name: str
    edges: tuple[Edge, ...]
    shapes: Mapping[str, tuple[int, ...]]
    units: Mapping[str, int]
    through: frozenset[str]
    refused: frozenset[str]

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """Each weight, its shape, and each of its dimensions with the families in it."""
        found: dict[str, dict[int, list[str]]] = {}
        for edge in self.edges:
            found.setdefault(edge.weight, {}).setdefault(edge.dim, []).append(edge.family)
        return [
            (
                name,
                " × ".join(map(str, self.shapes[name])),
                "; ".join(f"{dim}: {', '.join(dims[dim])}" for dim in sorted(dims)),
            )
            for name, dims in found.items()
        ]

    def list_families(self, module: str, dim: int) -> list[str]:
        """The families in a dimension of a module's weights."""
        return list(dict.fromkeys(e.family for e in self.edges if e.module == module and e.dim == dim))


def choose_layer(analysis: Analysis, legal: LegalWidths) -> Layer:
    """The layer with the most families, the first of equal ones; the whole model if it has no layers.

    Modules that differ only in their number (experts) are one node, as their weights are cut in the same way.
    """
    # Layers differ in models of mixed blocks. One with the most families shows most of what is coupled.
    layered = [family for family in analysis.families if len(family.groups) > 1]
    found = Counter(layer for family in layered for layer in dict.fromkeys(map(_find_layer, family.groups)) if layer)
    name = next((n for n, count in found.items() if count == max(found.values())), "")
    # One edge for each dimension of each weight. Experts have the same name once their numbers are masked.
    edges: dict[tuple[str, str, int], Edge] = {}
    for family in analysis.families:
        for member in _list_members(family, name):
            weight = _mask_numbers(member.weight, name)
            how = {"producer": MAKES, "consumer": SUMS}.get(member.role, HOLDS)
            edge = Edge(weight.rpartition(".")[0] or weight, family.name, how, weight, member.dim)
            edges.setdefault((weight, family.name, member.dim), edge)
    shapes = {_mask_numbers(n, name): tuple(term.size for term in dims) for n, dims in analysis.weights.items()}
    drawn = {edge.family for edge in edges.values()}
    return Layer(
        name=name,
        edges=tuple(edges.values()),
        shapes=shapes,
        units={f.name: f.size for f in analysis.families if f.name in drawn},
        through=frozenset(f.name for f in analysis.families if f.name in drawn and _is_through(f, name)),
        refused=frozenset(n for n in drawn if n in legal.refused),
    )


def _find_layer(group: Group) -> str:
    """The numbered module that holds a group: the outermost, as experts are numbered, too."""
    parts = group.layer.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return "" if numbered is None else ".".join(parts[: numbered + 1])


def _list_members(family: Family, layer: str) -> Iterable[Member]:
    """A family's members in a layer; without layers, the members of its first group."""
    groups = family.groups if layer else family.groups[:1]
    return [m for group in groups for m in group.members if not layer or m.weight.startswith(f"{layer}.")]


def _is_through(family: Family, layer: str) -> bool:
    """Whether a family's group has weights both in the layer and outside of it."""
    inside = [g for g in family.groups if any(m.weight.startswith(f"{layer}.") for m in g.members)]
    return bool(layer) and any(not m.weight.startswith(f"{layer}.") for g in inside for m in g.members)


def _mask_numbers(weight: str, layer: str) -> str:
    """A weight's name below its layer, with ``*`` for numbers."""
    return NUMBER.sub("*", weight.removeprefix(f"{layer}.") if layer else weight)


Node = tuple[str, str]
"""``("module", name)``, ``("family", name)``, or the start or end of a family that runs through all layers."""


def build_flow(layer: Layer) -> nx.DiGraph[Node]:
    """The graph of a layer. A family that runs through all layers stands above and below it."""
    # Edges from the modules that make units to the family, and from the family to those that use them. A weight that
    # only holds units (a norm's) is drawn behind the family, unless its module also makes or sums over them.
    graph: nx.DiGraph[Node] = nx.DiGraph()
    for edge in layer.edges:
        module: Node = ("module", edge.module)
        makes = edge.how == MAKES
        kind = (AFTER if makes else BEFORE) if edge.family in layer.through else "family"
        ends = (module, (kind, edge.family)) if makes else ((kind, edge.family), module)
        how = HOLDS if edge.how == HOLDS and not graph.has_edge(*ends) else edge.how
        if not (graph.has_edge(*ends) and how == HOLDS):  # a bias goes the way of its matrix
            graph.add_edge(*ends, how=how, family=edge.family)
    # A module that makes the units and holds them, too, would be above and below its family: only the making is drawn.
    for module, kind, name in [(m, k, f) for (k, f), m in graph.edges if m[0] == "module"]:
        if graph.has_edge(module, (kind, name)) and graph.edges[(kind, name), module]["how"] == HOLDS:
            graph.remove_edge((kind, name), module)
    return graph


def order_rows(graph: nx.DiGraph[Node]) -> list[list[Node]]:
    """The nodes of each row. A node is below all nodes that lead to it and, in its row, near to them."""
    # Rows: topological generations. Modules on a cycle (in a recurrent block) share a row. Outgoing families are last.
    condensed = nx.condensation(graph)
    found = [
        [node for part in parts for node in sorted(condensed.nodes[part]["members"]) if node[0] != AFTER]
        for parts in nx.topological_generations(condensed)
    ]
    found = [row for row in [*found, [node for node in graph if node[0] == AFTER]] if row]
    # Order in a row: by the mean place of the predecessors, row after row from the top (Sugiyama's barycentre method).
    order = {node: number for number, node in enumerate(graph)}
    place: dict[Node, float] = {}
    for row in found:
        near = {node: [place[other] for other in graph.predecessors(node) if other in place] for node in row}
        row.sort(key=lambda node: (sum(near[node]) / len(near[node]) if near[node] else 0.5, order[node]))
        place |= {node: (number + 0.5) / len(row) for number, node in enumerate(row)}
    return found


def place_nodes(rows: Sequence[Sequence[Node]], wide: float) -> dict[Node, tuple[float, float]]:
    """The position of each node, in inches: rows from top to bottom, each over the whole width."""
    return {
        node: ((number + 0.5) * wide / len(row), (len(rows) - at - 0.5) * BETWEEN)
        for at, row in enumerate(rows)
        for number, node in enumerate(row)
    }


def shorten_labels(modules: Sequence[str]) -> dict[str, str]:
    """The last parts of each name, as few as distinguish them."""
    found = {}
    for name in modules:
        parts = name.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        found[name] = next(
            end for end in ends if end == name or not any(o != name and f".{o}".endswith(f".{end}") for o in modules)
        )
    return found


def break_name(name: str) -> str:
    """A name in lines of at most ``LETTERS`` letters, broken at its separators."""
    lines = [""]
    for part in re.findall(r"[^._]+[._]?|[._]", name):
        if lines[-1] and len(lines[-1]) + len(part) > LETTERS:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def draw_coupling_chart(layer: Layer) -> Svg:
    """Draw the layer from top to bottom: modules as white boxes, families as coloured ones, and the edges."""
    # Where everything is, in inches. A row of many modules makes the chart wider.
    graph = build_flow(layer)
    rows = order_rows(graph)
    wide = max(WIDTH - 0.1, APART * max(map(len, rows)))
    tall = BETWEEN * len(rows)
    place = place_nodes(rows, wide)
    named = shorten_labels([name for kind, name in graph if kind == "module"])
    colours = {name: SERIES[i % len(SERIES)] for i, name in enumerate(layer.units)}

    def draw(axes: Axes) -> None:
        # Edges first, under the boxes: from the bottom of a node to the top of the one below.
        for one, other, edge in graph.edges(data=True):
            (x0, y0), (x1, y1) = _find_port(one, place, -1), _find_port(other, place, 1)
            axes.plot([x0, x1], [y0, y1], STYLES[edge["how"]], color=colours[edge["family"]], linewidth=1.6, zorder=1)
        for (kind, name), (x, y) in place.items():
            if kind == "module":
                sides = [[colours[family] for family in layer.list_families(name, dim)] for dim in (0, 1)]
                _draw_module(axes, break_name(named[name]), x, y, sides)
            else:
                _draw_family(axes, layer, kind, name, x, y, colours[name])
        for how, style in STYLES.items():  # empty lines: only for the legend
            axes.plot([], [], style, color=INK, label=how)
        axes.figure.legend(loc="outside lower left", ncols=3, handlelength=2.4, columnspacing=1.2, fontsize=8.5)
        axes.set_xlim(0, wide)
        axes.set_ylim(0, tall)
        axes.axis("off")

    return draw_chart(draw, f"which modules of {layer.name or 'the model'} are cut together", tall + 0.35, wide + 0.1)


def _find_port(node: Node, place: Mapping[Node, tuple[float, float]], side: int) -> tuple[float, float]:
    """The end of an edge: the middle of a family, or of a module's top (``side`` 1) or bottom (−1)."""
    x, y = place[node]
    return (x, y + side * BOX[1] / 2) if node[0] == "module" else (x, y)


def _draw_module(axes: Axes, label: str, x: float, y: float, sides: Sequence[Sequence[str]]) -> None:
    """Draw a box. ``sides``: the colours of its left side and of its top."""
    wide, tall = BOX
    left, bottom = x - wide / 2, y - tall / 2
    axes.add_patch(_make_box(left, bottom, wide, tall, facecolor=PAPER, edgecolor=QUIET, linewidth=0.9, zorder=2))
    first, second = sides
    for number, colour in enumerate(first):
        each = tall / len(first)
        axes.add_patch(_make_box(left - STRIP, bottom + number * each, STRIP, each, facecolor=colour, zorder=3))
    for number, colour in enumerate(second):
        each = wide / len(second)
        axes.add_patch(_make_box(left + number * each, bottom + tall, each, STRIP, facecolor=colour, zorder=3))
    axes.text(x, y, label, ha="center", va="center", size=7.5, linespacing=1.2, zorder=4)


def _draw_family(axes: Axes, layer: Layer, kind: str, name: str, x: float, y: float, colour: str) -> None:
    refused = name in layer.refused
    where = {BEFORE: "\ncomes in", AFTER: "\ngoes on"}.get(kind, "\nrefused" if refused else "")
    style = {"boxstyle": "round,pad=0.45", "facecolor": LINE if refused else colour, "edgecolor": colour}
    ink = INK if refused else PAPER
    text = f"{break_name(name)}\n{layer.units[name]}{where}"
    axes.text(x, y, text, ha="center", va="center", size=8, linespacing=1.2, color=ink, bbox=style, zorder=4)


def _make_box(left: float, bottom: float, wide: float, tall: float, **style: Any) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle((left, bottom), wide, tall, **style)
