"""task: the protocol of a kind of model. mptk's own are in ``mptk/tasks``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mptk.config.settings import Settings
from mptk.io.data import protocol_name
from mptk.io.evaluation import Runs
from mptk.io.models import Loaded
from mptk.ir.program import Program
from mptk.ir.samples import Samples
from mptk.progress import Count, Progress
from mptk.protocols.onnx_form import OnnxForm
from mptk.protocols.values import SampleSets
from passes.frontend.trace import uncached


class Task(Protocol):
    """What kind of model it is: its samples, its loss, how good it is, its ONNX form.

    ``compares``: the loss compares outputs with the dense model's, which then are the samples' targets.
    ``classes``: outputs are logits, [..., classes], so that a teacher's distribution can be distilled.
    ``sequences``: inputs of token ids may be cut to any length. ``onnx``: how it is written as ONNX; None if it is not.
    """

    name: str
    summary: str
    compares: bool = False
    classes: bool = True
    sequences: bool = True
    onnx: OnnxForm | None = None

    def refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        """Why a model of this config is of another kind, or None. ``classes``: empty for a model with its own code."""
        ...

    def bind(self, loaded: Loaded) -> Task:
        """The task for this model. Raises MptkError if the model lacks something."""
        return self

    def check(self, loaded: Loaded, run: Callable[[Samples], Any]) -> None:
        """Raise MptkError if the model does not compute what its class promises."""
        return None

    def example(self, model: nn.Module) -> Samples:
        """A few small samples to trace the model with. It may have no weights."""
        ...

    def only_length(self, program: Program) -> int | None:
        """The tokens that each sample must have; None if there may be any number of them, or there are none."""
        return program.length if self.sequences else None

    def samples(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Samples:
        """``count`` samples to calibrate or train on.

        Raises:
            MptkError: no data is given and the model cannot make any.
        """
        ...

    def evaluation(self, loaded: Loaded, settings: Settings) -> Samples:
        """Samples to measure quality on."""
        ...

    def made(self, loaded: Loaded, inputs: Mapping[str, Tensor]) -> Samples:
        """Samples of inputs that the caller prepared, with the targets that the loss needs beside them."""
        return Samples(dict(inputs))

    def named(self, model: nn.Module, data: str) -> str:
        """``data`` of the settings, by default text, as the protocol of a measurement names it."""
        return protocol_name(data)

    def loss(self, output: Tensor, samples: Samples) -> Tensor:
        """Sum over all that is predicted of ``samples``: how bad the model's ``output`` is."""
        ...

    def sensitivity(self, output: Tensor, samples: Samples) -> Tensor:
        """What gradients are taken of at the dense model; another function if ``loss`` is at its minimum there."""
        return self.loss(output, samples)

    def predicted(self, samples: Samples) -> int:
        """How many terms ``loss`` sums over."""
        ...

    def output(self, module: nn.Module, samples: Samples) -> Tensor:
        """What the program computes, by the module itself."""
        found = module(**samples.inputs, **uncached(module))
        output: Tensor = found if isinstance(found, Tensor) else found[0]
        return output

    def quality(self, runs: Runs, sets: SampleSets, progress: Progress) -> dict[str, Any]:
        """Name → how good each run is, and ``protocol``: how it was measured."""
        ...
