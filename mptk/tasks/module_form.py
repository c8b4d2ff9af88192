"""module_form: a module of given inputs as ONNX: one graph with the names of ``forward``'s arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from mptk.config.settings import Settings
from mptk.errors import MptkError
from mptk.ir.samples import Samples
from mptk.protocols.onnx_form import Dense
from mptk.tasks.exporting import Traced
from mptk.tasks.model_form import AXES, ModelForm
from mptk.tasks.padding import IDS
from passes.targets.onnx.emit import TOKEN_AXES, Axes
from passes.targets.onnx.quantize import BLOCKS

OUTPUT = "output"


@dataclass(frozen=True)
class ModuleForm(ModelForm):
    """``model.onnx`` with one output. ``inputs``: examples, by the names that the graph's inputs get."""

    inputs: Mapping[str, Tensor]

    def check(self, model: PreTrainedModel, settings: Settings) -> None:
        if blocks := [scheme for scheme in settings.quantize if scheme in BLOCKS]:
            raise MptkError(f"{blocks[0]} is for models that read tokens alone, not --inputs; use fp16")

    def traced(self, dense: Dense, samples: Samples | None) -> tuple[Traced, dict[str, str]]:
        if not isinstance(dense.run(Samples(dict(self.inputs))), Tensor):
            raise MptkError("the module has several outputs; export the folder with torch.onnx")
        assert dense.program is not None
        traced = Traced(dense.program, list(self.inputs))
        traced.check_sizes()
        return traced, {}

    def axes(self, name: str) -> Axes:
        known = AXES.get(name, TOKEN_AXES if name == IDS else ())
        count = self.inputs[name].ndim
        return known if len(known) == count else ("batch_size", *(f"{name}_{i}" for i in range(1, count)))
