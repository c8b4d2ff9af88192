"""Latency: predict how long a cut decoder takes in ONNX Runtime, so that milliseconds can be the budget.

For whoever knows the time of a step and not a sparsity: ``mptk prune MODEL --max-decode-ms 15`` times the operators of
the model once on this machine, and finds the widths that meet the time. docs/latency.md tells more.
"""

from mptk.protocols import Feature

FEATURE = Feature(
    "latency",
    "make milliseconds the budget of a cut",
    page="docs/latency.md",
    predictors={"latency": "mptk.features.latency.predict:Latency"},
)
