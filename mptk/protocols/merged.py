"""merged: the model as it was given to a run that starts with fewer KV heads and all query heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mptk.io.models import Loaded
from mptk.ir.families import Analysis
from mptk.ir.plan import Heads
from mptk.ir.program import Program
from passes.analysis.shared_heads import SharedHeads
from passes.transforms.merge_heads import How, repeated_first


@dataclass(frozen=True)
class Merged:
    """A model with all its KV heads, each run of which becomes one.

    ``loaded``, ``analysis``: the model as it was before. ``layers``: its projections. ``heads``: of each layer, before
    and after. ``first``: the program of the model after, in which a merged head is the first of its run.
    ``config_changes``: field → [old, new]. ``keys``, ``values``: how they were merged; ``keep`` if they were not
    yet. ``weights``: the merged projections, in their shapes afterwards.
    """

    loaded: Loaded
    analysis: Analysis
    layers: Sequence[SharedHeads]
    heads: Heads
    first: Program
    config_changes: Mapping[str, Sequence[Any]]
    keys: How = "keep"
    values: How = "keep"
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def equal(self) -> Program:
        """The model before, with each head equal to the first of its run: what ``first`` must compute, too."""
        program = self.analysis.program
        changes = {n: change for layer in self.layers for n, change in repeated_first(layer, self.heads.width).items()}
        return program.with_state(program.state.changed(changes, moves=True))

    @property
    def note(self) -> str:
        """How they were merged; empty if they were not in this run."""
        if "keep" in (self.keys, self.values):
            return ""
        ways = {"fit": "by principal components", "mean": "by their mean, since a norm or the like follows"}
        return (
            f"{self.heads.of} KV heads of a layer became {self.heads.width}, all query heads stay: "
            f"keys merged {ways[self.keys]}; values {ways[self.values]}"
        )

    def row(self) -> dict[str, Any]:
        """What the report says of it."""
        return {
            "of": self.heads.of,
            "kept": self.heads.width,
            "config_changes": {name: list(values) for name, values in self.config_changes.items()},
        }
