"""report: ``report.json``, what a folder says of itself: how it was made, what it costs, how good it is, its proof.

docs/report.md describes every field. ``verify`` believes none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mptk.config.setting import from_json
from mptk.config.settings import Settings
from mptk.conform import made
from mptk.errors import MptkError
from mptk.files import tidy, write_json
from mptk.protocols.report_rows import check_rows
from mptk.reading import read_json

FILE = "report.json"
FORMAT = "mptk-report/1"
PROVEN_ON = "proof/inputs.safetensors"
"""The samples of the proof, the model's inputs by name. It lies apart: programs take any *.safetensors for weights."""
Row = Mapping[str, Any]
"""An object of the JSON file."""


@dataclass(frozen=True)
class Report:
    """The fields of ``report.json``, in its order.

    ``families``: name → ``of``, ``width``, ``layers``. ``legal``: family → ``widths`` that the target can hold, the
    dense one last, and ``refused``, why it can hold no other, or None. ``cost``: ``dense`` and ``pruned`` → figures of
    ``cost.model.Cost``. ``splits``: widths tried → loss. ``quality``: ``metric``, ``dense``, ``pruned``, ``protocol``;
    empty if the run was stopped after publishing.
    ``quantized``: scheme → ``file``, ``bytes``, ``quality``. ``proof``: a row a stage. ``config_changes``: field →
    [old, new]. ``stages``: a row a stage of the run, passes with their differences. ``data``: what was trained,
    calibrated and measured on, each with ``source``, ``samples``, ``inputs`` and ``seed``; ``files``: path → sha256.
    ``live``: the dense model was given in memory, and ``model_sha256`` is of its weights alone.
    ``versions``: of Python and of the packages that compute. ``recovery``: ``rank`` of LoRA (0: all
    weights were trained) and peak ``lr``; and if samples were held out ``metric``, ``protocol``, ``losses`` on them by
    step, and ``kept``, the step whose weights were kept.
    ``vocabulary``: ``of`` and ``kept`` tokens, the ``corpus`` that decided, ``config_changes`` of token ids; empty if
    all tokens stay. ``kv_heads``: ``of`` and ``kept`` KV heads of a layer, and ``config_changes`` of their number;
    empty if all stay.
    ``search``: the ranking of ``mptk shapes --json``, of which the first is what was cut; empty if none was asked for.
    """

    mptk: str
    model: str
    model_sha256: str
    settings: Settings
    families: Mapping[str, Row]
    sparsity: float
    cost: Mapping[str, Row]
    splits: Mapping[str, float]
    trained: Sequence[str]
    weights_sha256: str
    quality: Row
    quantized: Mapping[str, Row]
    proof: Sequence[Row]
    proof_length: int
    config_changes: Mapping[str, Sequence[Any]]
    plan_sha256: str
    notes: Sequence[str]
    stages: Sequence[Row]
    files: Sequence[str]
    task: str = "causal-lm"
    legal: Mapping[str, Row] = field(default_factory=dict)
    data: Row = field(default_factory=dict)
    live: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    recovery: Row = field(default_factory=dict)
    search: Row = field(default_factory=dict)
    vocabulary: Row = field(default_factory=dict)
    kv_heads: Row = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of ``report.json``."""
        return {"format": FORMAT, **asdict(self)}

    def write(self, folder: Path) -> None:
        """Write ``folder/report.json``."""
        write_json(folder / FILE, self.to_json())

    @staticmethod
    def read(folder: str | Path) -> Report:
        """``report.json`` of a pruned folder. Raises MptkError if there is none, or it is no report."""
        path = Path(folder) / FILE
        tidy(path.parent.parent)
        if not path.is_file():
            raise MptkError(f"{folder} holds no {FILE}; give the --out folder of `mptk prune`")
        data = read_json(path, lambda why: MptkError(f"{path} is damaged: {why}; prune the model again"))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise MptkError(f"{path} is no {FORMAT}; read it with the version of mptk that wrote it")
        try:
            settings = from_json(Settings, data.get("settings"), "settings")
            check_rows(data)
            return made(Report, {**data, "settings": settings}, "")
        except ValueError as error:
            raise unreadable(folder, error) from error


def unreadable(folder: str | Path, error: Exception) -> MptkError:
    """The error of a report that lacks a word, or has one of another kind."""
    said = str(error) if isinstance(error, ValueError) else repr(error)
    return MptkError(
        f"{FILE} in {folder} is not as `mptk prune` writes it ({said}); do not use it, and prune the model again"
    )
