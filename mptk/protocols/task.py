"""task: the protocol of a kind of model: what its samples, its loss, its metric and its outputs are.

mptk's own are in ``mptk/tasks``. A class derives from ``Task`` and inherits the defaults, which fit a model whose
``forward`` takes the samples' inputs by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mptk.config import IN_MEMORY, Settings
from mptk.io import Loaded, Runs, name_data
from mptk.ir import Program, ProgramModule, Samples
from mptk.progress import Count, Progress
from mptk.protocols.onnx_form import OnnxForm
from mptk.protocols.values import SampleSets
from mptk.reading import Json
from passes.frontend.trace import Flat, OpenSizes, find_cache_switch, pick_results, unwrap_module


class Task(Protocol):
    """A kind of model: its samples, its loss, its metric, its ONNX form.

    ``priority``: of several tasks that take a model, the one with the highest has it. ``compares``: the loss compares
    outputs with the dense model's, which are then the samples' targets. ``classes``: outputs are logits, [...,
    classes], so a teacher's distribution can be distilled. ``sequences``: inputs of token ids may be cut to any length.
    ``caches``: the model generates with a KV cache, to which all its attentions add. ``onnx``: how to write it as ONNX;
    None if that is impossible.
    """

    name: str
    summary: str
    priority: int = 0
    compares: bool = False
    classes: bool = True
    sequences: bool = True
    caches: bool = False
    onnx: OnnxForm | None = None

    def explain_refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        """Why a model of this config is of another kind, or None. ``classes``: empty for a model with its own code."""
        ...

    def bind(self, loaded: Loaded) -> Task:
        """The task for this model. Raises MptkError if the model lacks something that the task needs."""
        return self

    def check(self, loaded: Loaded, run: Callable[[Samples], Any], example: Samples) -> None:
        """Raise MptkError if the model does not compute what its class promises. ``example``: it was traced with it."""
        return None

    def make_example(self, model: nn.Module) -> Samples:
        """A few small samples to trace the model with. The model may have no weights."""
        ...

    def make_examples(self, model: nn.Module) -> Sequence[Samples]:
        """``example``, and one of each other kind of samples that data may give."""
        return (self.make_example(model),)

    def choose_wrapper(self, model: nn.Module, example: Samples) -> Callable[[nn.Module, Sequence[str]], Flat]:
        """A function of a module and the names of its inputs that makes what is traced: it gives the loss's output."""
        return Flat

    def choose_example(self, example: Samples, samples: Samples) -> Samples:
        """An example to trace with for a program that will run on ``samples``."""
        return example

    def open_sizes(self, example: Samples) -> OpenSizes:
        """The sizes of ``example`` that a trace leaves open, if the class allows it."""
        return True

    def make_further(self, model: nn.Module, samples: Samples) -> Mapping[str, Samples]:
        """Inputs of other kinds that the class takes, made of ``samples``, by the end of their stage's name."""
        return {}

    def name_parts(self, model: nn.Module) -> Mapping[str, Sequence[str]]:
        """Names that stand for families in ``--families`` and ``--keep`` → the modules that hold these families."""
        return {}

    def find_fixed_length(self, program: Program) -> int | None:
        """The tokens that each sample must have; None if any number is allowed, or samples have no tokens."""
        return program.length if self.sequences else None

    def draw_samples(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Samples:
        """``count`` samples to calibrate or train on.

        Raises:
            MptkError: no data is given, and the model cannot generate any.
        """
        ...

    def draw_evaluation(self, loaded: Loaded, settings: Settings) -> Samples:
        """Samples to measure quality on."""
        ...

    def should_measure_texts(self, loaded: Loaded) -> bool:
        """Whether it is measured on single texts, as they are used (``make_text_rows``), and not on windows of text."""
        return False

    def make_samples(
        self, loaded: Loaded, inputs: Mapping[str, Tensor], data: str = IN_MEMORY, seed: int = 0
    ) -> Samples:
        """Samples of inputs, with the targets that the loss needs. ``data``: where the inputs come from."""
        return Samples(dict(inputs))

    def name_data(self, model: nn.Module, data: str) -> str:
        """The name of ``data`` in the protocol of a measurement; ``data`` comes from the settings."""
        return name_data(data)

    def compute_loss(self, output: Tensor, samples: Samples) -> Tensor:
        """The loss of the model's ``output``, summed over all predictions of ``samples``."""
        ...

    def compute_sensitivity(self, output: Tensor, samples: Samples) -> Tensor:
        """For gradients at the dense model; differs from ``compute_loss`` if the dense model minimises that."""
        return self.compute_loss(output, samples)

    def count_predictions(self, samples: Samples) -> int:
        """The number of terms in ``compute_loss``."""
        ...

    def call(self, module: nn.Module, samples: Samples, **more: Any) -> Any:
        """What a module of the class gives for samples. It may be in wrappers. ``more``: further keywords."""
        return module(**samples.inputs, **find_cache_switch(module), **more)

    def read(self, called: Any) -> Any:
        """The program's outputs in what ``call`` gave."""
        return pick_results(called)

    def compute_output(self, module: nn.Module, samples: Samples) -> Any:
        """The program's outputs, computed by a module of the class or of a program."""
        if isinstance(unwrap_module(module), ProgramModule):
            return module(**samples.inputs)
        return self.read(self.call(module, samples))

    def measure_quality(self, runs: Runs, sets: SampleSets, progress: Progress) -> Json:
        """Name → quality of each run, and ``protocol``: how it was measured."""
        ...
