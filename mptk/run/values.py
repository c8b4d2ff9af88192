"""values: what the stages of a run hand on: Prepared → Chosen → Compiled → Proven → Report (``report.py``).

Each is made by one function of ``mptk.driver``; ``Method``, ``Target`` and ``Task`` are what differs between runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedConfig

from mptk.cost.model import CostModel
from mptk.io.models import Loaded
from mptk.ir.families import Analysis
from mptk.ir.passes import Log
from mptk.ir.plan import Plan
from mptk.ir.program import Program
from mptk.ir.resolved_plan import Cut
from mptk.progress import Progress
from mptk.run.folder import RunFolder
from mptk.run.settings import Settings
from passes.targets.legalize import Candidate, LegalWidths
from passes.targets.stock.config import StockConfig
from passes.transforms.insert_masks import MaskSite, disturbed, find_mask_sites
from passes.transforms.masked_reference import mask
from passes.verify import Difference, StageLogits

if TYPE_CHECKING:
    from mptk.run.protocols import Method, Target, Task

PROOF_SHAPE = (2, 48)
"""Sequences and tokens of the proof's short batch."""


@dataclass(frozen=True)
class Context:
    """What every stage may use: where it says how far it is and, if the run trains, its folder and its processes."""

    log: Log
    progress: Progress
    folder: RunFolder | None = None
    accelerator: Accelerator | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce and time a stage."""
        self.progress(name, 0, 0)
        with self.log.stage(name):
            yield


@dataclass(frozen=True)
class Prepared:
    """A dense model, analysed, with the widths that the settings and the target allow.

    ``source``: the model as the user named it. ``candidates``: legal widths that meet the budget, none if a ``plan`` is
    given; ``cut`` is that plan, resolved.
    """

    source: str
    settings: Settings
    loaded: Loaded
    task: Task
    method: Method
    target: Target
    analysis: Analysis
    legal: LegalWidths
    cost: CostModel
    candidates: tuple[Candidate, ...] = ()
    plan: Plan | None = None
    cut: Cut | None = None

    @property
    def families(self) -> list[str]:
        """The families that are cut."""
        return list(self.candidates[0].widths if self.plan is None else self.plan.families)

    @cached_property
    def mask_sites(self) -> tuple[MaskSite, ...]:
        """Where masks of these families go into the module, of those families that masks can hold."""
        maskable = [name for name in self.families if disturbed(self.analysis, name) is None]
        return tuple(find_mask_sites(self.analysis, self.loaded.model, maskable))


@dataclass(frozen=True)
class Text:
    """Windows of token ids, int64 [n, length]: to train on, to calibrate on (the first of these), to measure on.

    ``source``: where the windows for measuring come from.
    """

    training: Tensor
    calibration: Tensor
    evaluation: Tensor
    source: str

    @property
    def proof(self) -> Tensor:
        """The proof's short batch, int64 [sequences, tokens]."""
        return short_batch(self.calibration)


def short_batch(windows: Tensor) -> Tensor:
    """The first ``PROOF_SHAPE`` of windows [n, length]."""
    return windows[: PROOF_SHAPE[0], : PROOF_SHAPE[1]]


@dataclass(frozen=True)
class Witness:
    """A trained model's own ``logits`` on the proof's short batch, before its weights are taken over.

    ``tolerance``: how near the weights taken over must come, relative to the largest logit.
    """

    stage: str
    logits: Tensor
    tolerance: float


@dataclass(frozen=True)
class Chosen:
    """What is cut: the plan, that plan resolved, and the dense model's weights that ``changes`` replaces.

    ``trained``: the names of changed weights that are in the folder as trained. ``losses``: widths tried → loss on
    calibration text. ``compensation``: whether the changes are biases that make up for what is removed.
    ``steps``: training steps that choosing took.
    """

    plan: Plan
    cut: Cut
    changes: Mapping[str, Tensor] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    witness: Witness | None = None
    steps: int = 0


@dataclass(frozen=True)
class Written:
    """What is written as a checkpoint: ``stock`` is its class and config, ``loaded`` the dense model.

    ``cut``: the dense model's own config after the cut; that of ``stock`` unless another class holds the weights.
    ``note``: why it is another class; empty if it is not.
    """

    stock: StockConfig
    loaded: Loaded
    cut: PreTrainedConfig
    note: str = ""


@dataclass(frozen=True)
class Compiled:
    """The cut program and the form in which the target holds it.

    ``analysis``: of the dense model with ``chosen.changes``. ``epsilons``: the norms' epsilons that the cut changed,
    old → new. ``written``: the class and config that hold it; None if the target needs none.
    """

    prepared: Prepared
    chosen: Chosen
    analysis: Analysis
    program: Program
    epsilons: Mapping[float, float]
    written: Written | None = None

    @cached_property
    def masked(self) -> Program:
        """The reference: the dense model with the removed channels masked."""
        return mask(self.analysis, self.chosen.cut)


@dataclass(frozen=True)
class Checks:
    """What a target puts up for proof.

    ``exact``: differences of what is compared without being run: configs, stored weights. ``stages``: stage of the
    proof → its logits, and the largest difference relative to the largest logit.
    """

    exact: tuple[Difference, ...] = ()
    stages: Mapping[str, tuple[StageLogits, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Proven:
    """Each stage's difference from the masked dense model. ``length``: tokens of the longest sequence that was run.

    ``note``: what the proof does not reach; empty if nothing.
    """

    differences: tuple[Difference, ...]
    length: int
    note: str = ""
