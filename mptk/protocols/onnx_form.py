"""onnx_form: the protocol for writing a kind of model as ONNX, and the dense model that it gets.

A form gets the dense model and the plan, not the cut program: a decoder is traced anew, with a KV cache, and then cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from mptk.config import Settings
from mptk.io import Loaded
from mptk.ir import Log, Plan, Program, Samples
from mptk.protocols.values import Checks
from mptk.staged.staged import EXECUTOR, Executor
from passes.targets.onnx.names import ONNX_FILE, name_quantized_file
from passes.verify import Difference


@dataclass(frozen=True)
class Dense:
    """A dense model to write as ONNX, in the type and the form that the settings name.

    ``program``: as its task traces it, with the weights that a method changed. None for a decoder whose model holds its
    weights and runs itself. ``about``: entries for the graphs' metadata, beside source, plan and versions.
    """

    loaded: Loaded
    settings: Settings
    program: Program | None
    executor: Executor = EXECUTOR
    about: Mapping[str, str] = field(default_factory=dict)

    def put_weights(self, program: Program) -> Program:
        """Another trace of the same model, with the weights of this one."""
        if self.program is None:
            return self.loaded.with_weights(program)
        return self.loaded.with_weights(program).with_state(self.program.collect_module_state())

    def compute_first(self, samples: Samples) -> Tensor:
        """The program's first output."""
        assert self.program is not None
        found = next(self.executor.run_programs([self.program], [samples.tensors]))
        output: Tensor = found if isinstance(found, Tensor) else found[0]
        return output


@dataclass(frozen=True)
class Use:
    """How graphs are used in a proof, and which.

    ``crossed``: positions that decoding must cross. ``positions``: how many the model has; 0: not known. ``scheme``: of
    the quantised graphs; empty: the main ones.
    """

    crossed: Sequence[int] = ()
    positions: int = 0
    scheme: str = ""

    def find_graph(self, file: Path) -> Path:
        """The scheme's graph beside the main one in ``file``."""
        return name_quantized_file(file, self.scheme) if self.scheme else file


class OnnxForm(Protocol):
    """How to write a kind of model as ONNX, and how to run the graphs.

    ``graphs``: the files of the float graphs, the main one first. ``described``: the files that ``describe`` may write;
    they are optional.
    """

    graphs: tuple[str, ...] = (ONNX_FILE,)
    described: tuple[str, ...] = ()

    def check(self, model: PreTrainedModel, settings: Settings) -> None:
        """Raise MptkError if a model like this cannot be written as the settings ask."""
        return None

    def export(self, dense: Dense, plan: Plan | None, samples: Samples | None, folder: Path, log: Log) -> list[str]:
        """Write the model, cut to ``plan`` if there is one, as ONNX into ``folder``. Returns notes for the report.

        ``samples``: to calibrate on, if there are any. ``log`` gets a record of each pass.

        Raises:
            MptkError: this model cannot be exported.
        """
        ...

    def list_stages(self, folder: Path, use: Use, device: torch.device, settings: Settings) -> Checks:
        """Stages of the proof: functions that run the graphs of ``folder`` on ``device``, tolerances, and providers.

        ``settings``: the form that the graphs must have.

        Raises:
            ProofError: a graph differs from what the settings ask for.
        """
        ...

    def make_batches(self, samples: Samples, seed: str, longer: bool) -> list[Samples]:
        """What the proof also runs, besides its own batches: other sizes and values, drawn by ``seed``.

        Empty if the stages run other sizes by themselves. ``samples``: the proof's short batch. ``longer``: whether
        the program takes any length.
        """
        return []

    def make_runner(self, file: Path, device: torch.device) -> Callable[[Samples], Tensor]:
        """A function that runs a main graph as the program runs, with the graphs of its scheme beside it."""
        ...

    def measure_rounding(self, scheme: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Difference:
        """The largest difference that quantising makes. ``pairs``: its outputs and the float graph's."""
        ...

    def describe(
        self, config: PreTrainedConfig, generation: GenerationConfig | None, folder: Path, graphs: str
    ) -> None:
        """Write the files that programs need to find the graphs in the subfolder ``graphs`` of ``folder``."""
        return None

    def is_half(self, folder: Path) -> bool:
        """Whether the main graph computes in float16."""
        return False
