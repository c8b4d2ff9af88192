"""numbers: models that give numbers: a depth for each pixel, the next values of a series.

What counts is how far they move from the dense model's. One more task is one more ``Numbers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from mptk.io import Runs
from mptk.progress import Progress
from mptk.protocols import OnnxForm, SampleSets
from mptk.reading import Json
from mptk.tasks.base import AutoLists, ComparedTask, explain_unlisted, measure_figures, sum_output_distances
from mptk.tasks.model_form import LOGITS, MODEL_FORM, trace_model
from mptk.tasks.onnx_proof import compare_logits, list_whole_cases
from mptk.tasks.padding import IDS


@dataclass(frozen=True)
class Numbers(ComparedTask):
    """Fields as in ``Classifier``. ``ending``: how the names of models end that are in no list of transformers."""

    name: str
    summary: str
    lists: AutoLists
    gives: str
    onnx: OnnxForm
    ending: str = ""
    classes = False

    def explain_refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        if self.ending and classes and all(each.__name__.endswith(self.ending) for each in classes):
            return None
        return explain_unlisted(self.lists, config, classes, f"give {self.gives}")

    def measure_quality(self, runs: Runs, sets: SampleSets, progress: Progress) -> Json:
        samples = sets.evaluation
        protocol = (
            f"{sets.source}: mean over {len(samples)} samples of the distance of {self.gives} from the dense model's, "
            "relative to their norm"
        )
        return measure_figures(runs, samples.split(1), {"distance": sum_output_distances}, progress, protocol)


def keep_tokens(output: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """An output with a number for each token, without those at padding."""
    return output[:, : inputs[IDS].shape[1]]


ANSWERS = Numbers(
    "question-answering",
    "finder of answers in a text",
    (auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,),
    "the scores of an answer's start and end",
    replace(
        MODEL_FORM,
        trace=partial(trace_model, unpad=keep_tokens),
        cases=list_whole_cases(unpad=keep_tokens),
        outputs=("start_logits", "end_logits"),
    ),
)
DETECTION = Numbers(
    "object-detection",
    "detector of objects",
    (auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,),
    "the classes and boxes of objects",
    replace(MODEL_FORM, outputs=(LOGITS, "pred_boxes"), judge=compare_logits),
)
MASKS = Numbers(
    "universal-segmentation",
    "finder of objects and their masks",
    (auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES, auto.MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES),
    "the classes and masks of objects",
    replace(MODEL_FORM, outputs=("class_queries_logits", "masks_queries_logits")),
)
DEPTH = Numbers(
    "depth-estimation",
    "estimator of depth",
    (auto.MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES,),
    "a depth for each pixel",
    replace(MODEL_FORM, outputs=("predicted_depth",)),
)
FORECASTS = Numbers(
    "time-series-prediction",
    "forecaster",
    (auto.MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES,),
    "the next values of a series",
    replace(MODEL_FORM, outputs=("prediction_outputs",)),
    "ForPrediction",  # transformers lists PatchTST's classes in no list of forecasters
)
