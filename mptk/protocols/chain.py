"""chain: the values that the stages of a run hand on, and the protocols of methods and targets.

Prepared → Chosen → Compiled → Proven → Report (``report.py``). One function of ``mptk.run`` makes each value.

Three things differ between runs: how units are chosen (``Method``), what is written (``Target``), and the kind of model
    (``Task``). mptk's own are in ``mptk/methods``, ``mptk/targets`` and ``mptk/tasks``. Other packages add more by
    entry points of the groups ``mptk.methods``, ``mptk.targets`` and ``mptk.tasks``. A class derives from its protocol
    and inherits the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mptk.config import Learning, Settings
from mptk.cost.estimate import Pass
from mptk.cost.model import CostModel
from mptk.distributed.processes import make_replica, run_once
from mptk.io import Loaded
from mptk.ir import (
    Alignment,
    Analysis,
    Cut,
    Log,
    Plan,
    Program,
    Samples,
    Variables,
    Weights,
    collect_kept_units,
    compute_typical_size,
)
from mptk.protocols.conversion import Analysed, Conversion, DenseModel
from mptk.protocols.task import Task
from mptk.protocols.values import Checks, Context, Extra, SampleSets, Witness, Written
from mptk.staged.staged import Executor
from passes.targets.legalize import Candidate, LegalWidths, find_graph_widths
from passes.transforms.fold_norms import find_epsilons
from passes.transforms.insert_masks import MaskSite, find_disturbance, find_mask_sites
from passes.transforms.masked_reference import mask
from passes.verify import Difference


@dataclass(frozen=True)
class Prepared:
    """An analysed dense model with the widths that the settings and the target allow.

    ``model``: what units are chosen from: the dense model or, in its shapes, a larger cut of it. ``legal``: all legal
    widths; ``candidates``: those that meet the budget. ``planned``: the choice of a given plan, in place of candidates.
    ``start``: the larger cut that the run begins with; None: the dense model.
    """

    dense: DenseModel
    model: Analysed
    settings: Settings
    method: Method
    target: Target
    legal: LegalWidths
    cost: CostModel
    candidates: tuple[Candidate, ...] = ()
    planned: Chosen | None = None
    start: Chosen | None = None

    @property
    def loaded(self) -> Loaded:
        """The weights of ``model``."""
        return self.model.loaded

    @property
    def task(self) -> Task:
        """The task of ``model``."""
        return self.model.task

    @property
    def analysis(self) -> Analysis:
        """The analysis of ``model``."""
        return self.model.analysis

    @property
    def conversions(self) -> tuple[Conversion, ...]:
        """The conversions that made ``model`` from the user's model."""
        return self.dense.conversions

    @property
    def executor(self) -> Executor:
        """Runs the programs."""
        return self.dense.executor

    @property
    def given(self) -> Loaded:
        """The user's dense model, before conversions."""
        return self.dense.given.loaded

    @property
    def compared(self) -> Loaded:
        """The reference for training and quality: the dense model before the conversions that change its outputs."""
        return self.dense.reference.loaded

    @property
    def reference(self) -> Program:
        """The program of ``compared``."""
        return self.dense.reference.analysis.program

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the weights are stored."""
        return find_stored_type(self.settings, self.loaded)

    @property
    def calibrator(self) -> Executor:
        """The executor for choosing and fitting, in the type that the settings name; the proof never uses it."""
        return replace(self.executor, compute=getattr(torch, self.settings.compute_dtype))

    @property
    def variables(self) -> Variables:
        """All widths of the model, of which legal sets and candidates name some."""
        return self.cost.variables

    @property
    def families(self) -> list[str]:
        """The names of what is cut: families, or layers of them."""
        return list(self.candidates[0].widths if self.planned is None else self.planned.plan.families)

    @property
    def stays(self) -> dict[str, Tensor]:
        """The units that a larger cut left to choose from: family → boolean [layers, scopes, size]. Others have all."""
        return (
            {}
            if self.start is None
            else collect_kept_units(self.analysis, self.start.cut, list(self.start.plan.families))
        )

    @cached_property
    def under_norms(self) -> list[str]:
        """The families whose norms get other weights with their width (``passes/transforms/fold_norms.py``)."""
        cut = [self.analysis.variable(name) for name in self.families]
        return [v.name for v in cut if v.kind == "channels" and find_epsilons(self.analysis, v.family)]

    @property
    def norms_change(self) -> list[str]:
        """Those of ``under_norms`` that a plan names, or some candidate cuts."""
        size = {name: self.analysis.variable(name).size for name in self.under_norms}
        cut = {name for name in size if any(each.widths[name] < size[name] for each in self.candidates)}
        return [name for name in size if self.planned is not None or name in cut]

    @cached_property
    def weight_size(self) -> float:
        """The median of the dense weight matrices' root mean squares, of which learning rates are a share."""
        return run_once(lambda: compute_typical_size(self.reference))

    @property
    def mask_learning(self) -> Learning:
        """How masks are learned."""
        return self.settings.learning.of_masks(self.weight_size)

    @property
    def recovery(self) -> Learning:
        """How the cut model is trained."""
        return self.settings.learning.of_recovery(bool(self.norms_change), self.weight_size)

    def copy_model(self, weights: bool = True) -> PreTrainedModel:
        """A copy of the dense module to adapt and to move; its parameters share the dense weights' memory.

        ``weights``: whether parameters need values; if not, they take no memory.
        """
        return make_replica(self.loaded.load_all() if weights else self.loaded.model, weights)

    def copy_teacher(self, weights: bool = True) -> PreTrainedModel:
        """The reference module, copied as in ``copy_model``."""
        return make_replica(self.compared.load_all() if weights else self.compared.model, weights)

    @cached_property
    def mask_sites(self) -> tuple[MaskSite, ...]:
        """The mask sites of these families in the module; families that masks cannot hold have none."""
        maskable = [name for name in self.families if find_disturbance(self.analysis, name) is None]
        return tuple(find_mask_sites(self.analysis, self.loaded.model, maskable))

    def find_plan_sites(self, plan: Plan) -> list[MaskSite]:
        """The mask sites of the families that a plan cuts."""
        return [site for site in self.mask_sites if site.family in plan.families]


def should_reconstruct(settings: Settings, method: Method) -> bool:
    """Whether consumers are fitted to the dense layers' outputs."""
    if settings.reconstruct is None:
        return bool(settings.distil_epochs) or (not settings.fixed and method.reconstructs)
    return settings.reconstruct


def find_stored_type(settings: Settings, loaded: Loaded) -> torch.dtype:
    """The type in which the result's weights are stored."""
    made: torch.dtype = loaded.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    return made


@dataclass(frozen=True)
class Chosen:
    """What is cut: the plan, the resolved plan, and ``changes``, which replace weights of the dense model.

    ``trained``: names of the changed weights that were trained. ``losses``: widths tried → loss on calibration text.
    ``compensation``: whether the changes are biases that compensate for removed units. ``steps``: training steps that
    choosing took, of ``seconds`` each by the clock.
    """

    plan: Plan
    cut: Cut
    changes: Mapping[str, Tensor] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    witness: Witness | None = None
    steps: int = 0
    seconds: float = 0.0

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What an unfinished run keeps of it as tensors."""
        return self.changes

    @property
    def facts(self) -> Mapping[str, object]:
        """What else an unfinished run keeps of it. A choice that was trained is not kept (``mptk/run/prune.py``)."""
        return {"plan": self.plan.to_json(), "trained": self.trained, "losses": self.losses, "notes": self.notes}

    def with_weights(self, weights: Mapping[str, Tensor]) -> Chosen:
        """Add ``weights`` as trained weights."""
        changes = Weights(self.changes).with_entries(weights)
        return replace(self, changes=changes, trained=tuple(changes))


@dataclass(frozen=True)
class Compiled:
    """The cut program and the form in which the target holds it.

    ``analysis``: of the dense model with ``chosen.changes``, in the stored type. ``program``: the cut program in the
    stored type; ``exact``: the same before folded norms were rounded to that type. ``epsilons``: the norms' epsilons
    that the cut changed, old → new. ``written``: the class and config that hold it; None if the target needs none.
    ``recovery``: the loss on held-out samples during recovery, for the report.
    """

    prepared: Prepared
    chosen: Chosen
    analysis: Analysis
    program: Program
    exact: Program
    epsilons: Mapping[float, float]
    written: Written | None = None
    recovery: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def masked(self) -> Program:
        """The reference: the dense model with the removed channels masked."""
        return mask(self.analysis, self.chosen.cut)


@dataclass(frozen=True)
class Proven:
    """Each stage's difference from the masked dense model. ``length``: tokens of the longest sequence in the proof.

    ``note``: what the proof does not cover; may be empty. ``left_out``: notes on optional files that failed and were
    removed from the folder.
    """

    differences: tuple[Difference, ...]
    length: int
    note: str = ""
    left_out: tuple[str, ...] = ()


class Method(Protocol):
    """How to choose the units that stay.

    ``learns``: it trains before the cut, in ``settings.steps``. ``reconstructs``: by default consumers are fitted
    to the dense layers' outputs. ``divides``: it can give each layer its own width. ``splits``: most divisions of the
    budget among families to choose from, spread over all legal ones; None: all.
    """

    name: str
    summary: str
    learns: bool = False
    reconstructs: bool = False
    divides: bool = False
    splits: int | None = 24

    def check(self, settings: Settings) -> None:
        """Raise MptkError if the method cannot do what the settings ask."""
        return None

    def explain_refusal(self, analysis: Analysis, family: str) -> str | None:
        """The reason why the method cannot choose among this family's units, or None."""
        return None

    def work(self, settings: Settings) -> Mapping[str, Pass]:
        """The cost of ``choose`` before any training: stage → work; by default a pass over the calibration text."""
        return {f"score ({self.name})": Pass(settings.windows * settings.length, settings.length)}

    def choose(self, prepared: Prepared, sets: SampleSets, context: Context) -> Chosen:
        """The plan, for one of ``prepared.candidates``, and the weights that change.

        Raises:
            MptkError: the method cannot score a family.
        """
        ...


class Target(Protocol):
    """A form of the result: its legal widths, how to write it, and what it must equal.

    ``classed``: ``fit`` returns a class, which supports adapters, gradient checkpointing and shards. ``ragged``: layers
    may have different widths. ``companions``: it writes what else the dense checkpoint holds (``Companion``), too.
    """

    name: str
    summary: str
    classed: bool = False
    ragged: bool = False
    companions: bool = False

    def find_legal(self, analysis: Analysis, model: nn.Module, alignment: Alignment) -> LegalWidths:
        """Each family's legal widths; by default all widths that the graph's ops accept."""
        return find_graph_widths(analysis, alignment)

    def check_program(self, program: Program) -> None:
        """Raise MptkError, before any work, if the target cannot hold a program's calls or its conditions on sizes."""
        return None

    def find_elsewhere(self, analysis: Analysis, legal: LegalWidths, alignment: Alignment) -> LegalWidths | None:
        """Additional widths that the model's own class cannot hold but another class can; None if there are none.

        ``legal``: the result of ``find_legal``.
        """
        return None

    def name_home(
        self, analysis: Analysis, model: nn.Module, legal: LegalWidths, widths: Mapping[str, int]
    ) -> str | None:
        """The name of that other class for ``widths``, or None."""
        return None

    def fit(self, compiled: Compiled, sample: Samples) -> Written | None:
        """The class and config that hold the cut program; None if it needs none. ``sample``: one sample to run it on.

        Raises:
            MptkError: no class can hold it.
        """
        return None

    def emit(self, compiled: Compiled, sets: SampleSets, folder: Path, log: Log) -> list[str]:
        """Write into the existing ``folder``; returns notes for the report. ``log``: for records of passes."""
        ...

    def has_written(self, folder: Path) -> bool:
        """Whether ``folder`` was written for this target."""
        ...

    def list_files(self, compiled: Compiled, folder: Path) -> frozenset[str] | None:
        """The names of the files that ``emit`` may have written, by which ``verify`` finds planted ones; None: any.

        Raises:
            ProofError: one of them holds more than ``emit`` writes.
        """
        return None

    def make_checks(self, compiled: Compiled, folder: Path, crossed: Sequence[int]) -> Checks:
        """The parts of ``folder`` that must equal the cut program. ``crossed``: positions that decoding must cross.

        Raises:
            MptkError: a file is missing or was changed.
        """
        return Checks()

    def compare_rounded(self, compiled: Compiled, folder: Path, batches: Sequence[Samples]) -> list[Difference]:
        """Parts that may differ by rounding, as a graph in float16. They are checked last."""
        return []

    def compare_remade(self, compiled: Compiled, folder: Path, batches: Sequence[Samples]) -> str:
        """Write again what only a comparison with the written can prove, as a graph that is wrong for one length.

        ``verify`` asks for it, ``prune`` does not: it would compare its files with themselves. Returns a note; may be
        empty.

        Raises:
            ProofError: ``folder`` holds something else.
        """
        return ""

    def list_extras(self, compiled: Compiled, folder: Path, batches: Sequence[Samples]) -> list[Extra]:
        """Parts that are left out of the folder if their check fails, as a quantised graph. They are checked last."""
        return []
