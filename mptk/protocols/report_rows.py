"""report_rows: what the objects within ``report.json`` hold (docs/report.md), as types that it is read against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from mptk.conform import misfit
from mptk.protocols.shapes import Shapes

Number = float | None
"""What is not finite is null."""


class FamilyRow(TypedDict):
    """A family: units of the dense and of the pruned model in each of its layers."""

    of: int
    width: int
    layers: int


class CostRow(TypedDict):
    """Figures of ``cost.model.Cost``."""

    block: float
    parameters: float
    flops: float
    bytes: float
    latency_ms: NotRequired[float]


class CostRows(TypedDict):
    """Both models' costs."""

    dense: CostRow
    pruned: CostRow


class QualityRow(TypedDict):
    """How good both models are; empty if it was not measured."""

    metric: NotRequired[str]
    protocol: NotRequired[str]
    dense: NotRequired[Number]
    pruned: NotRequired[Number]


class QuantizedRow(TypedDict):
    """A quantised graph."""

    file: str
    bytes: int
    quality: NotRequired[Number]


class ProofRow(TypedDict):
    """A stage of the proof."""

    stage: str
    max_abs: Number
    relative: Number
    tolerance: Number
    ok: bool
    widened: NotRequired[str]
    ran: NotRequired[str]
    failure: NotRequired[str]


class StageRow(TypedDict):
    """A stage of the run."""

    name: str
    seconds: float


class LegalRow(TypedDict):
    """The widths that the target can hold."""

    widths: Sequence[int]
    refused: str | None


class RecoveryRow(TypedDict):
    """How training after the cut went; empty if there was none. ``losses``: steps done → loss.

    ``rank``: of LoRA, 0 if all weights were trained. ``lr``: the peak learning rate.
    """

    rank: NotRequired[int]
    lr: NotRequired[Number]
    metric: NotRequired[str]
    protocol: NotRequired[str]
    losses: NotRequired[Mapping[str, Number]]
    kept: NotRequired[int]


class VocabularyRow(TypedDict):
    """Tokens of the dense and of the pruned model, and what decided."""

    of: int
    kept: int
    corpus: str
    config_changes: Mapping[str, Sequence[Any]]


class HeadsRow(TypedDict):
    """Of KV heads that were merged."""

    of: int
    kept: int
    config_changes: Mapping[str, Sequence[Any]]


class Rows(TypedDict):
    """The fields of a report that hold objects."""

    families: Mapping[str, FamilyRow]
    cost: CostRows
    splits: Mapping[str, Number]
    quality: QualityRow
    quantized: Mapping[str, QuantizedRow]
    proof: Sequence[ProofRow]
    config_changes: Mapping[str, Sequence[Any]]
    stages: Sequence[StageRow]
    legal: NotRequired[Mapping[str, LegalRow]]
    data: NotRequired[Mapping[str, Mapping[str, Any]]]
    recovery: NotRequired[RecoveryRow]
    search: NotRequired[Mapping[str, Any]]
    vocabulary: NotRequired[Mapping[str, Any]]
    kv_heads: NotRequired[Mapping[str, Any]]


def check_rows(data: Mapping[str, Any]) -> None:
    """Raise ValueError, with the name of the place, if an object within a report is not as it must be."""
    wrong = misfit(data, Rows)
    if wrong is None:
        wrong = next(filter(None, (_family(name, row) for name, row in data["families"].items())), None)
    if wrong is None:
        costs = data["cost"]["dense"]
        wrong = next(
            (
                f"cost.dense.{name} is {costs[name]}"
                for name in ("block", "parameters", "flops", "bytes")
                if costs[name] <= 0
            ),
            None,
        )
    if wrong is None:
        wrong = _sets(data.get("data", {}))
    if wrong is None and data.get("vocabulary"):  # it is empty if all tokens stay
        wrong = misfit(data["vocabulary"], VocabularyRow, "vocabulary")
    if wrong is None and data.get("kv_heads"):  # it is empty if all heads stay
        wrong = misfit(data["kv_heads"], HeadsRow, "kv_heads")
    if wrong is not None:
        raise ValueError(wrong)
    if data.get("search"):
        Shapes.from_json(data["search"])


def _family(name: str, row: FamilyRow) -> str | None:
    if row["of"] < 1 or not 0 < row["width"] <= row["of"]:
        return f"families.{name} keeps {row['width']} of {row['of']}"
    return None


def _sets(data: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What of the sets of samples, or of the files that they were read from, is not as it must be."""
    for name, used in data.items():
        kind = Mapping[str, str] if name == "files" else UsedRow
        if (wrong := misfit(used, kind, f"data.{name}")) is not None:
            return wrong
    return None


class InputRow(TypedDict):
    """An input of a set of samples."""

    sha256: str


class UsedRow(TypedDict):
    """A set of samples."""

    source: str
    samples: int
    inputs: Mapping[str, InputRow]
