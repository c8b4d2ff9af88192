"""conversion: what changes a dense model before it is cut. ``mptk.conversions`` lists mptk's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor

from mptk.config.settings import Settings
from mptk.io.models import Loaded
from mptk.ir.families import Analysis
from mptk.ir.plan import Entry
from mptk.ir.program import Program
from mptk.ir.samples import Samples
from mptk.protocols.task import Task
from mptk.staged.staged import Executor
from passes.verify import StageOutputs


@dataclass(frozen=True)
class Analysed:
    """A dense model with its task and its analysis."""

    loaded: Loaded
    task: Task
    analysis: Analysis


Analyse = Callable[[Loaded], Analysed]
"""Traces and analyses a model, of which the conversion started from another with the same task."""
Change = Callable[[Analysed, Analyse], "Conversion"]
"""Converts a model."""


@dataclass(frozen=True)
class Conversion(ABC):
    """A conversion that was made: the model ``before`` and ``after`` it.

    ``config_changes``: field → [old, new]. ``weights``: those of ``after`` that were fitted, in their shapes there.

    Of each kind: ``name``: its key in a plan, in a report and, but for underscores, of its option. ``stage``: its stage
    in a run and in the proof. ``settles``: what its entry in a plan says. ``does``: what it does to a model. ``fits``:
    the stage that fits weights to samples, so that the model before stays the one that is compared with; empty if both
    models compute the same, and the one after is compared with. ``told``: keys of its row that a plan does not give.
    """

    name: ClassVar[str]
    stage: ClassVar[str]
    settles: ClassVar[str]
    does: ClassVar[str]
    fits: ClassVar[str] = ""
    told: ClassVar[tuple[str, ...]] = ()

    before: Analysed
    after: Analysed
    config_changes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    @abstractmethod
    def asked(cls, settings: Settings, texts: Sequence[str] | None) -> Change | None:
        """The change that the settings ask for, with ``texts`` that the caller gave; None if they ask for none.

        Raises:
            MptkError: it cannot be done with these settings.
        """

    @classmethod
    @abstractmethod
    def planned(cls, entry: Entry) -> Change:
        """The change that an entry of a plan says. Raises MptkError if it is no such entry."""

    @property
    @abstractmethod
    def entry(self) -> Entry:
        """Its entry in a plan."""

    @property
    @abstractmethod
    def note(self) -> str:
        """What a reader of the report must know; empty if nothing."""

    @abstractmethod
    def equal(self, executor: Executor) -> tuple[Program, Program | StageOutputs]:
        """Two that give the same outputs if it was made right."""

    def row(self) -> dict[str, Any]:
        """What a report says of it under its name; empty if it has no field for it."""
        return {}

    @property
    def config_row(self) -> dict[str, Any]:
        """The changes of the config, as a row of a report has them."""
        return {"config_changes": {name: list(values) for name, values in self.config_changes.items()}}

    def fitted(self, samples: Samples, few: Samples, executor: Executor) -> Self:
        """The same with weights fitted to ``samples``. ``few``: a short batch of these."""
        return self

    @property
    def tokens(self) -> Sequence[int] | None:
        """The ids that the tokens of ``after`` have in ``before``; None if they are the same."""
        return None


def imitated(conversions: Sequence[Conversion]) -> Analysed | None:
    """The model that the converted one is compared with; None if it is the converted one itself."""
    return next((each.before for each in conversions if each.fits), None)
