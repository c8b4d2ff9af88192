"""report: ``report.json``: how a folder was made, its costs, its quality, its proof.

docs/report.md describes every field. ``verify`` trusts none of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, GetPydanticSchema, WrapValidator, with_config
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from mptk.arguments import guard_arguments
from mptk.config import Settings, from_json, to_json
from mptk.errors import FileError, MptkError
from mptk.files import tidy, write_json
from mptk.io import check_folder_named
from mptk.notebook import build_html, build_line, build_table
from mptk.plugins import list_part_names, load_parts
from mptk.publish.manifest import REPORT_FILE as REPORT_FILE
from mptk.reading import Json, make_damage_error, make_typed, read_json, shorten_text

REPORT_FORMAT, OLD_FORMAT = "mptk-report/2", "mptk-report/1"
"""The format that is written, and the one of before, in which a feature's row was a field of its own."""
PROVEN_ON = "proof/inputs.safetensors"
"""The samples of the proof, inputs by name: in a subfolder, since programs take any ``*.safetensors`` for weights."""
Row = Mapping[str, Any]
"""An object of the JSON file."""
Number = float | None
"""Null if it is not finite."""
Rows = Mapping[str, Row]
"""Name → row."""
ConfigChanges = Mapping[str, Sequence[object]]
"""Field of a config → [old, new]."""


# ---- the rows of the file, as pydantic checks them ----
#
# A row is a mapping in the code and a TypedDict only where the file is read: other code may put more into it.


class OpenRow(TypedDict):
    """A row may have fields that are not read."""

    __pydantic_config__ = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)  # type: ignore[misc]


class FamilyRow(OpenRow):
    """A family: units in each layer of the dense and of the pruned model."""

    of: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]
    layers: int


def _check_narrower(row: FamilyRow) -> FamilyRow:
    if row["width"] > row["of"]:
        raise ValueError(f"it keeps {row['width']} of {row['of']}")
    return row


class CostRow(OpenRow):
    """Figures of ``cost.model.Cost``. The dense model's must not be 0, as they are divisors."""

    block: Annotated[float, Field(gt=0)]
    parameters: Annotated[float, Field(gt=0)]
    flops: Annotated[float, Field(gt=0)]
    bytes: Annotated[float, Field(gt=0)]
    latency_ms: NotRequired[float]
    kv_cache: NotRequired[Annotated[float, Field(gt=0)]]
    serving: NotRequired[Annotated[float, Field(gt=0)]]


class CostRows(OpenRow):
    """Both models' costs."""

    dense: CostRow
    pruned: CostRow


class QualityRow(OpenRow):
    """The quality of both models."""

    metric: str
    protocol: str
    dense: Number
    pruned: Number


class DenseTypeRow(OpenRow):
    """The dense model in the scheme of a quantised graph."""

    bytes: int
    quality: NotRequired[Number]


class QuantizedRow(OpenRow):
    """A quantised graph."""

    file: str
    bytes: int
    quality: NotRequired[Number]
    dense: NotRequired[DenseTypeRow]


class ProofRow(OpenRow):
    """A stage of the proof."""

    stage: str
    max_abs: Number
    relative: Number
    tolerance: Number
    ok: bool
    widened: NotRequired[str]
    ran: NotRequired[str]
    failure: NotRequired[str]


class StageRow(OpenRow):
    """A stage of the run; passes with their differences."""

    name: str
    seconds: float


class LegalRow(OpenRow):
    """``widths``: legal ones, the dense one last; ``refused``: the reason why no other width is legal, or None."""

    widths: Sequence[int]
    refused: str | None


class RecoveryRow(OpenRow):
    """Training after the cut. ``rank``: of LoRA, 0 if all weights were trained. ``lr``: the peak rate.

    Only if samples were held out: ``losses`` on them by step, and ``kept``, the step whose weights were kept.
    """

    rank: NotRequired[int]
    lr: NotRequired[Number]
    metric: NotRequired[str]
    protocol: NotRequired[str]
    losses: NotRequired[Mapping[str, Number]]
    kept: NotRequired[int]


class InputRow(OpenRow):
    """An input of a set of samples."""

    sha256: str


class UsedRow(OpenRow):
    """A set of samples."""

    source: str
    samples: int
    inputs: Mapping[str, InputRow]


UsedRows = TypedDict(
    "UsedRows",
    {
        "training": UsedRow,
        "held-out": UsedRow,
        "calibration": UsedRow,
        "evaluation": UsedRow,
        "files": Mapping[str, str],
    },
    total=False,
)
"""The data of training, calibration and measurement; ``files``: path → sha256."""
with_config(ConfigDict(extra="forbid"))(UsedRows)


def _of(kind: object) -> GetPydanticSchema:
    """Check a field of a file as ``kind``, whatever its annotation in ``Report`` says."""
    return GetPydanticSchema(lambda _, schema: schema(kind))


def _check_rows(rows: Rows) -> Rows:
    known = load_parts("rows") if rows else {}
    for name, row in rows.items():
        if name in known:  # another one is of a feature that is not installed
            make_typed(known[name], row, name)
    return rows


def _check_method_name(name: str) -> str:
    # It stands in the screen and in the model card as it is, and a report may be somebody else's.
    if not re.fullmatch(r"[\w .+-]{0,100}", name):
        raise ValueError(f"{shorten_text(name, 40)!r} is not the name of a method")
    return name


# An empty object stands for a part that was not done; any other must be whole.
_OR_EMPTY = WrapValidator(lambda value, check: check(value) if value or not isinstance(value, dict) else value)


@dataclass(frozen=True)
class Report:
    """The fields of ``report.json``, in its order.

    ``splits``: widths tried → loss. ``quality``: empty if the run was stopped after publishing. ``quantized``: scheme →
    its graph. ``proof``: one row for each stage. ``live``: the dense model was given in memory, and ``model_sha256``
    covers only its weights. ``versions``: of Python and of the packages that compute. ``recovery``: empty if nothing
    was trained. ``changed``: the weights were changed in memory after the cut, through ``Pruned.model``. ``rows``: what
    features say of the run, by name (``mptk.plugins.Feature.rows``). ``chosen_by``: the method of the run that made the
    plan, if a plan was given, as it is to a recovery; empty if the plan does not say.
    """

    mptk: str
    model: str
    model_sha256: str
    settings: Settings
    families: Annotated[Rows, _of(Mapping[str, Annotated[FamilyRow, AfterValidator(_check_narrower)]])]
    sparsity: float
    cost: Annotated[Rows, _of(CostRows)]
    splits: Annotated[Mapping[str, float], _of(Mapping[str, Number])]
    trained: Sequence[str]
    weights_sha256: str
    quality: Annotated[Row, _of(QualityRow), _OR_EMPTY]
    quantized: Annotated[Rows, _of(Mapping[str, QuantizedRow])]
    proof: Annotated[Sequence[Row], _of(Sequence[ProofRow])]
    proof_length: int
    config_changes: ConfigChanges
    plan_sha256: str
    notes: Sequence[str]
    stages: Annotated[Sequence[Row], _of(Sequence[StageRow])]
    files: Sequence[str]
    task: str = "causal-lm"
    legal: Annotated[Rows, _of(Mapping[str, LegalRow])] = field(default_factory=dict)
    data: Annotated[Row, _of(UsedRows)] = field(default_factory=dict)
    live: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    recovery: Annotated[Row, _of(RecoveryRow)] = field(default_factory=dict)
    changed: bool = False
    rows: Annotated[Rows, AfterValidator(_check_rows)] = field(default_factory=dict)
    chosen_by: Annotated[str, AfterValidator(_check_method_name)] = ""

    @property
    def narrower_widths(self) -> dict[str, tuple[int, int]]:
        """Family → units in each layer of the dense and of the pruned model, for each family that was cut."""
        return {name: (row["of"], row["width"]) for name, row in self.families.items() if row["width"] < row["of"]}

    def list_cut_words(self) -> list[str]:
        """``ffn 1536 → 928`` for each family that was cut."""
        return [f"{name} {of} → {width}" for name, (of, width) in self.narrower_widths.items()]

    def describe_choice(self) -> str:
        """`` by wanda``: what chose the units, after a space; empty if none were chosen."""
        if self.settings.plan is not None:
            return f" by {self.chosen_by or 'a plan'}"
        return "" if self.settings.fixed else f" by {self.settings.method}"

    def __repr__(self) -> str:
        cut = ", ".join(self.list_cut_words()) or "no family was cut"
        return f"Report({self.model}: {self.sparsity:.1%} removed; {cut}; {self._describe()})"

    def _repr_html_(self) -> str:
        cut = [[name, str(of), str(width)] for name, (of, width) in self.narrower_widths.items()]
        cost = [
            [name, f"{self.cost['dense'][key]:,.0f}", f"{self.cost['pruned'][key]:,.0f}"]
            for name, key in (("parameters", "parameters"), ("bytes", "bytes"))
        ]
        figures = [f"{self.quality[name]:.4g}" for name in ("dense", "pruned") if self.quality.get(name) is not None]
        quality = [[str(self.quality["metric"]), *figures]] if len(figures) == len(self.cost) else []
        table = build_table(["", "dense", "pruned"], [*cut, *cost, *quality])
        return build_html(f"{self.model}: {self.sparsity:.1%} removed", table, build_line(self._describe()))

    def _describe(self) -> str:
        """Quality and proof in a line."""
        values = [self.quality.get(name) for name in ("dense", "pruned")]
        shown = " → ".join("not finite" if value is None else f"{value:.4g}" for value in values)
        quality = f"{self.quality['metric']} {shown}" if self.quality else "quality was not measured"
        return f"{quality}; {sum(row['ok'] for row in self.proof)} of {len(self.proof)} stages proven"

    def to_json(self) -> Json:
        """The content of ``report.json``."""
        return {"format": REPORT_FORMAT, **asdict(self), "settings": to_json(self.settings)}

    def write(self, folder: Path) -> None:
        """Write ``folder/report.json``."""
        write_json(folder / REPORT_FILE, self.to_json())

    @staticmethod
    @guard_arguments
    def read(folder: str | Path) -> Report:
        """Read ``report.json`` of a pruned folder. Raises MptkError if there is none, or it is not a report."""
        path = Path(folder) / REPORT_FILE
        # A command that was killed while it replaced the folder has left it under a hidden name: put it back first.
        tidy(path.parent.parent)
        check_folder_named(folder, "prune")
        if not path.is_file():
            raise FileError(f"{folder} holds no {REPORT_FILE}; give the --out folder of `mptk prune`", name=folder)
        data = read_json(path, make_damage_error(path, "prune the model again"))
        if isinstance(data, dict) and data.get("format") == OLD_FORMAT:
            rows = {name: data[name] for name in list_part_names("rows") if data.get(name)}
            data = {**data, "format": REPORT_FORMAT, "rows": rows}
        if not isinstance(data, dict) or data.get("format") != REPORT_FORMAT:
            raise FileError(
                f"{path} is not a {REPORT_FORMAT}; read it with the version of mptk that wrote it", name=path
            )
        try:
            settings = from_json(Settings, data.get("settings"), "settings")
            return make_typed(Report, {**data, "settings": settings})
        except ValueError as error:
            raise make_report_error(folder, error) from error


def make_report_error(folder: str | Path, error: Exception) -> MptkError:
    """The error for a report with a missing or wrong field."""
    said = shorten_text(str(error) if isinstance(error, ValueError) else repr(error), 300)
    return FileError(
        f"{REPORT_FILE} in {folder} is damaged or was changed ({said}); do not use it, and prune the model again",
        name=REPORT_FILE,
    )
