"""numbers: models that give numbers: a depth for each pixel, the next values of a series.

What counts is how far they move from the dense model's. One more task is one more ``Numbers``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from mptk.io.evaluation import Runs
from mptk.ir.samples import Samples
from mptk.progress import Progress
from mptk.protocols.onnx_form import OnnxForm
from mptk.protocols.values import SampleSets
from mptk.tasks.base import ComparedTask, compared, known_to
from mptk.tasks.classifier import Lists
from mptk.tasks.encoder import distances, errors, projection
from mptk.tasks.model_form import ModelForm


@dataclass(frozen=True)
class Numbers(ComparedTask):
    """Fields as of ``Classifier``. ``ending``: of the names of classes that do it and are in no list."""

    name: str
    summary: str
    lists: Lists
    gives: str
    onnx: OnnxForm
    ending: str = ""
    classes = False

    def refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        if self.ending and classes and all(each.__name__.endswith(self.ending) for each in classes):
            return None
        return known_to(self.lists, config, classes, f"give {self.gives}")

    def loss(self, output: Tensor, samples: Samples) -> Tensor:
        """Sum over samples of ‖f − f*‖² / ‖f*‖², f* the dense model's numbers (``targets``)."""
        assert samples.targets is not None
        return errors(output, samples.targets).sum()

    def sensitivity(self, output: Tensor, samples: Samples) -> Tensor:
        return projection(output, samples)

    def quality(self, runs: Runs, sets: SampleSets, progress: Progress) -> dict[str, Any]:
        samples = sets.evaluation
        protocol = (
            f"{sets.source}: mean over {len(samples)} samples of the distance of {self.gives} from the dense model's, "
            "relative to their norm"
        )
        return compared(runs, samples.split(1), {"distance": distances}, progress, protocol)


DEPTH = Numbers(
    "depth-estimation",
    "estimator of depth",
    (auto.MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES,),
    "a depth for each pixel",
    ModelForm("predicted_depth"),
)
SERIES = Numbers(
    "time-series-prediction",
    "forecaster",
    (auto.MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES,),
    "the next values of a series",
    ModelForm("prediction_outputs"),
    "ForPrediction",
)
