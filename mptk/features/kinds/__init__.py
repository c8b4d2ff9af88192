"""Kinds: classifiers, masked language models, detectors, estimators of depth, forecasters; sound and series as data.

Whoever has such a model names it as any other: ``mptk prune MODEL --data IMAGES``. Each kind has its own loss and
metric, and no labels are needed. docs/kinds.md lists them.

``classifier``, ``masked_lm``, ``numbers``: the kinds. ``audio``, ``series``: what they read.
"""

from mptk.protocols import Feature

FEATURE = Feature(
    "kinds",
    "cut classifiers, masked language models, detectors, forecasters and others",
    page="docs/kinds.md",
    tasks={
        "masked-lm": "mptk.features.kinds.masked_lm:MASKED_LM",
        "classification": "mptk.features.kinds.classifier:CLASSIFICATION",
        "token-classification": "mptk.features.kinds.classifier:TOKEN_CLASSES",
        "ctc": "mptk.features.kinds.classifier:CTC",
        "semantic-segmentation": "mptk.features.kinds.classifier:SEGMENTATION",
        "universal-segmentation": "mptk.features.kinds.numbers:MASKS",
        "question-answering": "mptk.features.kinds.numbers:ANSWERS",
        "object-detection": "mptk.features.kinds.numbers:DETECTION",
        "depth-estimation": "mptk.features.kinds.numbers:DEPTH",
        "time-series-prediction": "mptk.features.kinds.numbers:FORECASTS",
    },
    inputs={
        "input_features": "mptk.features.kinds.audio:SPECTROGRAMS",
        "input_values": "mptk.features.kinds.audio:WAVES",
        "past_values": "mptk.features.kinds.series:PAST_VALUES",
    },
)
