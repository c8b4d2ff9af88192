"""values: what a run's stages use beside the values of ``chain.py``: context, samples, witness, checks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedConfig

from mptk.cost.limit import TimeLimit
from mptk.errors import MptkError
from mptk.io import Loaded
from mptk.ir import Log, Program, Samples, Weights
from mptk.progress import Progress, enter_stage
from mptk.protocols.run_folder import Keeper, RunFolder, make_now
from passes.targets.stock.config import StockConfig
from passes.verify import Difference, StageOutputs

PROOF_SHAPE = (3, 48)
"""Number of samples in the proof's short batch, and the tokens of each."""
LONG = 192
"""Tokens of the proof's long sequence; fewer if the model has fewer positions, more to cross its windows."""


@dataclass(frozen=True)
class Context:
    """What every stage may use: progress and, if the run chooses or trains something, the run's folder.

    ``accelerator``: the processes of a run that trains. ``limit``: the time of a run whose minutes choose its steps.
    """

    log: Log
    progress: Progress
    folder: RunFolder | None = None
    accelerator: Accelerator | None = None
    limit: TimeLimit | None = None

    @property
    def keep(self) -> Keeper:
        """``keep(name, make)``: what the unfinished run kept under that name; else what ``make`` gives, which it keeps.

        A run without a folder keeps nothing. Arguments are those of ``RunFolder.keep``.
        """
        return make_now if self.folder is None else self.folder.keep

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce and time a stage."""
        self.progress(name, 0, 0)
        with self.log.stage(name), enter_stage(self.progress, name):
            yield


@dataclass(frozen=True)
class SampleSets:
    """Samples for training, for calibration (the first of these), and for measurement.

    ``source``: where the samples for measurement come from. ``sequences``: as in their task. ``held_out``: samples of
    the same data that are never trained on; None if nothing is trained.
    """

    training: Samples
    calibration: Samples
    evaluation: Samples
    source: str
    sequences: bool = True
    held_out: Samples | None = None

    @property
    def proof(self) -> Samples:
        """The proof's short batch."""
        return shorten_samples(self.calibration, self.sequences)


def shorten_samples(samples: Samples, sequences: bool) -> Samples:
    """The proof's short batch of ``samples``, repeated if they are few. ``sequences``: as in their task."""
    # Only sequences may be cut: a model may take other inputs in one length only.
    count, length = PROOF_SHAPE
    found = samples.shorten(count, length if sequences else sys.maxsize)
    if len(found) == count or samples.together is not None:
        return found
    return Samples(found.repeat(count).inputs)[:count]


@dataclass(frozen=True)
class Witness:
    """A trained model's own ``outputs`` on the proof's short batch, before its weights are adopted.

    They show that merging adapters, or turning learned masks into a plan, lost nothing. ``tolerance``: largest allowed
    difference of the adopted weights' outputs, relative to the largest output.
    """

    stage: str
    outputs: Tensor | tuple[Tensor, ...]
    tolerance: float


@dataclass(frozen=True)
class Companion:
    """What the dense checkpoint holds beside the weights of the model's class, after the cut. Features make it.

    ``note``: why there is none; may be empty. ``weights``: by their names in the checkpoint; what the class splits when
    it is saved, as experts, is still joined.
    """

    note: str = ""
    weights: Weights = field(default_factory=lambda: Weights({}))

    def check(self, written: Written, folder: Path) -> Sequence[Difference]:
        """The differences of what ``folder`` holds of it from what it should. Raises ProofError if that is missing."""
        return ()


@dataclass(frozen=True)
class Written:
    """A checkpoint to write: ``stock`` is its class and config, ``loaded`` the dense model.

    ``cut``: the dense model's own config after the cut; it equals ``stock``'s unless another class holds the weights.
    ``dtype``: the type of the stored weights.
    ``note``: the reason for another class; empty if it is the model's own.
    ``companions``: what else is written beside the model.
    """

    stock: StockConfig
    loaded: Loaded
    cut: PreTrainedConfig
    dtype: torch.dtype
    note: str = ""
    companions: tuple[Companion, ...] = ()


@dataclass(frozen=True)
class Further:
    """A function for the logits of what a target wrote, which also runs on inputs of other kinds than the run's.

    ``takes``: whether it runs on such samples. ``ran``: as in ``Checks``.
    """

    run: StageOutputs
    tolerance: float
    takes: Callable[[Samples], bool] = lambda _: True
    ran: str = ""


@dataclass(frozen=True)
class Checks:
    """The parts of a target that are proven.

    ``exact``: differences of parts that are compared without a run: configs, stored weights. ``stages``: stage of the
    proof → a function for its logits, and the largest allowed difference relative to the largest logit. ``ran``: stage
    → its execution provider, if ONNX Runtime runs it. ``further``: the start of a stage's name → what is also proven on
    inputs of other kinds.
    """

    exact: tuple[Difference, ...] = ()
    stages: Mapping[str, tuple[Program | StageOutputs, float]] = field(default_factory=dict)
    ran: Mapping[str, str] = field(default_factory=dict)
    further: Mapping[str, Further] = field(default_factory=dict)


@dataclass(frozen=True)
class Extra:
    """An optional part of a folder, like a quantised graph.

    ``name``: its file. ``check`` gives its differences, or raises ProofError. ``remove`` takes it out of the folder.
    """

    name: str
    check: Callable[[], Sequence[Difference]]
    remove: Callable[[], None]


def describe_left_out(name: str, error: MptkError) -> str:
    """The note on an optional file that could not be made or proven."""
    return f"{name} was left out: {str(error).partition('; ')[0]}"  # the cause without the remedy
