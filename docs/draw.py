"""Draws docs/pipeline.svg: the compiler's stages, on one gated feed-forward layer of six units.

    python docs/draw.py

The same file each time. Everything stands on light cards, so that it can be read on a light and on a dark page.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

CARD, EDGE, TEXT, QUIET = "#f6f8fa", "#8b949e", "#1f2328", "#57606a"
HEAD, DROPPED, ACCENT = "#0a4b8c", "#d0d7de", "#bc4c00"
UNITS = ("#0969da", "#1a7f37", "#8250df", "#9a6700", "#bf3989", "#1b7c83")
KEPT = (0, 1, 3, 5)
WIDTH, GAP, TOP, HEIGHT = 2.3, 0.45, 4.55, 3.35
CELL = 0.15
STAGES = (
    ("trace", "passes/frontend", "Program: a graph\nof ATen operators"),
    ("analyse", "passes/analysis", "Families: channels that\ncan only go together"),
    ("choose", "mptk/methods", "Plan: the units\nthat every layer keeps"),
    ("cut", "passes/transforms", "Program: same graph,\nsmaller weights"),
    ("emit", "passes/targets", "You get: a stock folder\nand an ONNX decoder"),
)


def left(column: int) -> float:
    """The x of a stage's card."""
    return column * (WIDTH + GAP)


def card(ax: Axes, x: float, y: float, width: float, height: float, fill: str = CARD) -> None:
    """A rounded box."""
    style = "round,pad=0,rounding_size=0.08"
    ax.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=fill, edgecolor=EDGE, linewidth=1))


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str = EDGE) -> None:
    """An arrow from ``start`` to ``end``."""
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, linewidth=1.6, color=color))


def stage(ax: Axes, column: int) -> None:
    """A card: the stage's name and folder, room for its picture, the value that it hands on."""
    name, folder, value = STAGES[column]
    x, middle = left(column), left(column) + WIDTH / 2
    card(ax, x, TOP - HEIGHT, WIDTH, HEIGHT)
    card(ax, x, TOP - 0.62, WIDTH, 0.62, HEAD)
    ax.text(middle, TOP - 0.22, name, color="white", size=13, weight="bold", ha="center", va="center")
    ax.text(middle, TOP - 0.47, folder, color="white", size=8.5, family="monospace", ha="center", va="center")
    ax.text(middle, TOP - HEIGHT + 0.3, value, color=TEXT, size=8.8, ha="center", va="center", linespacing=1.3)
    if column:
        y = TOP - 0.31
        arrow(ax, (x - GAP + 0.04, y), (x - 0.04, y))


def graph(ax: Axes, column: int) -> None:
    """The layer's operators: down(silu(gate(x)) * up(x))."""
    x = left(column) + WIDTH / 2
    places = {"x": (x, 3.68), "gate": (x - 0.55, 3.2), "up": (x + 0.55, 3.2), "mul": (x, 2.65), "down": (x, 2.12)}
    for a, b in (("x", "gate"), ("x", "up"), ("gate", "mul"), ("up", "mul"), ("mul", "down")):
        ends = zip(places[a], places[b], strict=True)
        ax.plot(*ends, color=QUIET, linewidth=1.2, zorder=1)
    for name, (px, py) in places.items():
        ax.text(
            px, py, name, color=TEXT, size=8.5, family="monospace", ha="center", va="center", zorder=2,
            bbox={"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": QUIET},
        )  # fmt: skip


def matrix(ax: Axes, x: float, y: float, units: list[str], across: int, name: str, *, columns: bool) -> None:
    """A weight from (x, y) down: one colour for each unit, by rows or by columns."""
    n = len(units)
    for i, color in enumerate(units):
        place, size = ((x + i * CELL, y - across * CELL), (CELL, across * CELL))
        if not columns:
            place, size = ((x, y - (i + 1) * CELL), (across * CELL, CELL))
        ax.add_patch(Rectangle(place, *size, facecolor=color, edgecolor="white", linewidth=0.8))
    wide = (n if columns else across) * CELL
    ax.text(x + wide / 2, y + 0.11, name, color=QUIET, size=8, family="monospace", ha="center", va="center")


def layer(ax: Axes, column: int, units: list[str]) -> None:
    """gate and up with a row for each unit, down with a column for each."""
    x = left(column)
    matrix(ax, x + 0.42, 3.58, units, 4, "gate", columns=False)
    matrix(ax, x + 1.28, 3.58, units, 4, "up", columns=False)
    matrix(ax, x + WIDTH / 2 - len(units) * CELL / 2, 2.42, units, 4, "down", columns=True)


def files(ax: Axes, column: int) -> None:
    """What the run writes."""
    names = ("config.json", "model.safetensors", "onnx/model.onnx", "plan.json", "report.json")
    for i, name in enumerate(names):
        y = 3.53 - i * 0.37
        card(ax, left(column) + 0.2, y - 0.14, WIDTH - 0.4, 0.28, "white")
        ax.text(left(column) + WIDTH / 2, y, name, color=TEXT, size=8.5, family="monospace", ha="center", va="center")


def proof(ax: Axes) -> None:
    """What the result is compared with: the masked model."""
    x, width = left(2), left(4) + WIDTH - left(2)
    card(ax, x, 0.1, width, 0.72)
    ax.text(x + width / 2, 0.6, "proof", color=ACCENT, size=11, weight="bold", ha="center", va="center")
    text = "logits on real tokens: masked model = cut graph = reloaded checkpoint = ONNX Runtime"
    ax.text(x + width / 2, 0.32, text, color=TEXT, size=9, ha="center", va="center")
    for column in (2, 3, 4):
        middle = left(column) + WIDTH / 2
        arrow(ax, (middle, TOP - HEIGHT - 0.02), (middle, 0.84), ACCENT)


def given(ax: Axes) -> None:
    """What the user gives."""
    width = left(1) + WIDTH
    card(ax, 0, 0.1, width, 0.72)
    ax.text(width / 2, 0.6, "you give", color=HEAD, size=11, weight="bold", ha="center", va="center")
    text = "a model, text, and a budget in parameters, bytes or ms"
    ax.text(width / 2, 0.32, text, color=TEXT, size=9, ha="center", va="center")


def draw(path: Path) -> None:
    """Write the picture to ``path``."""
    rcParams.update({"svg.hashsalt": "mptk", "font.family": "DejaVu Sans"})
    width = left(4) + WIDTH
    figure = Figure(figsize=(width, TOP))
    ax = figure.add_subplot()
    for column in range(len(STAGES)):
        stage(ax, column)
    graph(ax, 0)
    layer(ax, 1, list(UNITS))
    layer(ax, 2, [color if i in KEPT else DROPPED for i, color in enumerate(UNITS)])
    layer(ax, 3, [UNITS[i] for i in KEPT])
    files(ax, 4)
    given(ax)
    proof(ax)
    ax.set(xlim=(-0.1, width + 0.1), ylim=(0, TOP + 0.1), aspect="equal")
    ax.axis("off")
    figure.savefig(path, transparent=True, bbox_inches="tight", pad_inches=0.05, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(__file__).with_name("pipeline.svg"))
