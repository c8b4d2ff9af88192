"""conversion: the protocol of a change of the dense model before it is cut. Features bring them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

from torch import Tensor

from mptk.config import Settings
from mptk.io import Loaded
from mptk.ir import Analysis, Entry, Program, Samples
from mptk.protocols.task import Task
from mptk.staged.staged import EXECUTOR, Executor
from passes.verify import StageOutputs


@dataclass(frozen=True)
class Analysed:
    """A dense model with its task and its analysis."""

    loaded: Loaded
    task: Task
    analysis: Analysis


@dataclass(frozen=True)
class Opened:
    """A dense model that is open, with its task. ``plain``: not a transformers model, so it has no stock class."""

    loaded: Loaded
    task: Task
    plain: bool = False


Analyse = Callable[[Loaded], Analysed]
"""Traces and analyses a converted model; the task is the original model's."""
Change = Callable[[Analysed, Analyse], "Conversion"]
"""Converts an analysed model, and analyses the result with the function that it is given."""


@dataclass(frozen=True)
class Conversion(ABC):
    """A conversion that was made: the model ``before`` and ``after`` it.

    ``config_changes``: field → [old, new]. ``weights``: the fitted weights of ``after``, in its shapes.

    Each kind declares: ``name``: its key in a plan and in a report and, with hyphens, its option. ``stage``: its stage
    in a run and in the proof. ``settles``: what its entry in a plan decides. ``does``: what it does to a model.
    ``fits``: the stage that fits weights to samples; then quality is compared with the model before. It is empty if
    both models compute the same; then quality is compared with the model after. ``told``: keys of its report row that
    the plan lacks. ``label``: how a message names another such conversion. ``lever``: budgets that it makes smaller,
    and what to do for that.
    """

    name: ClassVar[str]
    stage: ClassVar[str]
    settles: ClassVar[str]
    does: ClassVar[str]
    fits: ClassVar[str] = ""
    told: ClassVar[tuple[str, ...]] = ()
    label: ClassVar[str] = ""
    lever: ClassVar[tuple[Sequence[str], str]] = ((), "")

    before: Analysed
    after: Analysed
    config_changes: Mapping[str, Sequence[object]] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    @abstractmethod
    def find_change(cls, settings: Settings, texts: Mapping[str, Sequence[str]]) -> Change | None:
        """The conversion that the settings ask for, with the caller's ``texts`` by setting; None if they ask for none.

        Raises:
            MptkError: it cannot be done with these settings.
        """

    @classmethod
    @abstractmethod
    def from_entry(cls, entry: Entry) -> Change:
        """The conversion that a plan's entry asks for. Raises MptkError if the entry is wrong."""

    @property
    @abstractmethod
    def entry(self) -> Entry:
        """Its entry in a plan."""

    @property
    @abstractmethod
    def note(self) -> str:
        """A note for the report; may be empty."""

    @abstractmethod
    def make_equal_pair(self, executor: Executor) -> tuple[Program, Program | StageOutputs]:
        """Two programs that must give the same outputs."""

    def to_row(self) -> dict[str, object]:
        """Its row in a report, under its name; empty if the report has no field for it."""
        return {}

    @property
    def config_row(self) -> dict[str, object]:
        """The changes of the config, as in a report's row."""
        return {"config_changes": {name: list(values) for name, values in self.config_changes.items()}}

    def fit_weights(self, samples: Samples, few: Samples, executor: Executor) -> Self:
        """Fit its weights to ``samples``. ``few``: a short batch of these."""
        return self

    @property
    def tokens(self) -> Sequence[int] | None:
        """The ids in ``before`` of the tokens of ``after``; None if they are the same."""
        return None


@dataclass(frozen=True)
class DenseModel:
    """A dense model that is analysed, after its conversions. The runs of a ladder share it.

    ``given``: the user's model and its task, before conversions. ``executor``: runs its programs. ``training``,
    ``evaluation``: the caller's samples in memory, which may come from an iterator that is read only once; None: they
    were not read yet.
    """

    given: Opened
    model: Analysed
    conversions: tuple[Conversion, ...] = ()
    executor: Executor = EXECUTOR
    training: Samples | None = None
    evaluation: Samples | None = None

    @property
    def reference(self) -> Analysed:
        """The reference for training and quality: the model before the conversions that change its outputs."""
        return find_imitated(self.conversions) or self.model


def find_imitated(conversions: Sequence[Conversion]) -> Analysed | None:
    """The reference for quality if it is not the converted model itself; else None."""
    return next((each.before for each in conversions if each.fits), None)
