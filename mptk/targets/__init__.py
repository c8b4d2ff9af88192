"""targets: the forms in which a cut model is written, one file for each."""

from __future__ import annotations

from mptk.config import Settings
from mptk.plugins import find_entry, with_features, with_plugins
from mptk.protocols import Target
from mptk.targets.graph import GraphTarget
from mptk.targets.onnx import OnnxTarget
from mptk.targets.stock import StockTarget

ONNX = OnnxTarget()
STOCK_TARGET, GRAPH_TARGET = StockTarget(), GraphTarget()


def list_targets() -> dict[str, Target]:
    """Targets of mptk, of features and of plugins (group ``mptk.targets``), by name. Each can also write ONNX."""
    # The graph holds any widths, so it is named last.
    found = with_features({STOCK_TARGET.name: STOCK_TARGET, GRAPH_TARGET.name: GRAPH_TARGET}, "targets")
    graph = found.pop(GRAPH_TARGET.name)
    return with_plugins({**found, graph.name: graph}, "mptk.targets")


def find_target(name: str) -> Target:
    """The target of that name. Raises MptkError for an unknown name."""
    return find_entry("target", name, list_targets())


def list_run_targets(target: Target, settings: Settings) -> tuple[Target, ...]:
    """All targets that a run writes: ``target``, which decides the legal widths, and ONNX if requested."""
    return (target, ONNX) if settings.onnx else (target,)
