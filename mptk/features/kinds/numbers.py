"""numbers: models that give numbers: a depth for each pixel, the next values of a series, the boxes of objects.

What counts is how far they move from the dense model's. One more task is one more ``Numbers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor
from transformers.models.auto import modeling_auto as auto

from mptk.tasks.model_form import LOGITS, MODEL_FORM, trace_model
from mptk.tasks.numbers import Numbers
from mptk.tasks.onnx_proof import compare_logits, list_whole_cases
from mptk.tasks.padding import IDS


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
