"""onnx_form: the protocol of how a kind of model is written as ONNX, and the dense model that it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from mptk.config.settings import Settings
from mptk.io.models import Loaded
from mptk.ir.passes import Log
from mptk.ir.plan import Plan
from mptk.ir.program import Program
from mptk.ir.samples import Samples
from mptk.protocols.values import Checks
from mptk.staged.staged import EXECUTOR, Executor
from passes.verify import Difference


@dataclass(frozen=True)
class Dense:
    """A dense model that is to be written as ONNX, in the type and the form that the settings name.

    ``program``: as its task traces it, with its weights; with those that a method changed. None for a decoder whose
    model has its weights, and runs itself. ``about``: what the graphs' metadata say beside the source, the plan and
    versions.
    """

    loaded: Loaded
    settings: Settings
    program: Program | None
    executor: Executor = EXECUTOR
    about: Mapping[str, str] = field(default_factory=dict)

    def weighted(self, program: Program) -> Program:
        """Another trace of the same model, with the weights of this one."""
        if self.program is None:
            return self.loaded.with_weights(program)
        own = self.program.state_dict().updated(self.program.state)  # tied weights by all their names
        return self.loaded.with_weights(program).with_state(own)

    def run(self, samples: Samples) -> Tensor:
        """What the program computes."""
        assert self.program is not None
        output: Tensor = next(self.executor.outputs([self.program], [samples.tensors]))
        return output


class OnnxForm(Protocol):
    """How a kind of model is written as ONNX, and how the graphs are run.

    ``described``: the files that ``describe`` may write; a folder is whole without them.
    """

    described: tuple[str, ...] = ()

    def check(self, model: PreTrainedModel, settings: Settings) -> None:
        """Raise MptkError if a model like this is not written as the settings ask."""
        return None

    def export(self, dense: Dense, plan: Plan | None, samples: Samples | None, folder: Path, log: Log) -> list[str]:
        """Write the model, cut to ``plan`` if there is one, as ONNX into ``folder``. Returns notes for the report.

        ``samples``: of the task, to calibrate on; None: there are none. ``log`` is given a record of each pass.

        Raises:
            MptkError: this model cannot be exported.
        """
        ...

    def stages(self, folder: Path, crossed: Sequence[int], device: torch.device, settings: Settings) -> Checks:
        """Stages of the proof: what runs the graphs of ``folder`` on ``device``, its tolerance, and what ran them.

        ``crossed``: positions that decoding must cross. ``settings``: what the graphs must be.

        Raises:
            ProofError: a graph is not as the settings ask.
        """
        ...

    def outputs(self, file: Path, device: torch.device) -> Callable[[Samples], Tensor]:
        """What runs one graph, as the program runs."""
        ...

    def rounding(self, scheme: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Difference:
        """The largest difference that a quantised graph makes. ``pairs``: its outputs and the float graph's."""
        ...

    def describe(
        self, config: PreTrainedConfig, generation: GenerationConfig | None, folder: Path, graphs: str
    ) -> None:
        """Write into ``folder`` what programs need that look for the graphs in its subfolder ``graphs``."""
        return None

    def half(self, folder: Path) -> bool:
        """Whether the main graph computes in float16."""
        return False
