"""dense_types: the dense model in the types of a run's quantised graphs, which a cut competes with.

On a CPU rounding a model's weights buys more than a cut does, so a report that compares a cut with the dense model in
float32 only would flatter it. The dense graphs are written to a temporary folder, rounded and calibrated as the pruned
model's are, and measured beside them. Their figures are kept in the cache folder for the next run on the same model and
samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mptk.config import Settings
from mptk.cost.estimate import Pass
from mptk.cost.fixed import ONNX_S
from mptk.files import format_json
from mptk.io import cache_dir, data, keep, read_kept
from mptk.ir import Log, Samples
from mptk.plain import hash_text
from mptk.protocols import Dense, Prepared, Report, Row, SampleSets
from mptk.tasks.onnx_export import export_form
from passes.targets.onnx.names import list_quantized_files

DENSE_TYPES = "write dense types"


def estimate_dense_types(settings: Settings) -> dict[str, Pass]:
    """The cost of writing and running the dense model's quantised graphs."""
    s = settings
    if not s.onnx or not s.schemes or s.logits != "all":
        return {}
    tokens = len(s.schemes) * s.eval_windows * s.eval_length
    return {DENSE_TYPES: Pass(tokens, s.eval_length, exact=True, fixed=ONNX_S)}


def write_dense_types(
    prepared: Prepared, schemes: Sequence[str], calibration: Samples, folder: Path, *, strict: bool
) -> dict[str, list[Path]]:
    """Write the dense model as ONNX into ``folder``, in float32 and in each scheme. Scheme → its graphs.

    ``strict``: whether all schemes must be there.

    Raises:
        MptkError: the model cannot be written, or ``strict``, and a scheme cannot.
    """
    assert prepared.task.onnx is not None
    settings = replace(prepared.settings, quantize=tuple(schemes), onnx=True, strict=strict)
    dense = Dense(prepared.compared, settings, prepared.reference, prepared.executor)
    export_form(prepared.task.onnx, dense, None, calibration, folder, Log())
    return list_quantized_files(folder)


def read_figures(report: Report, sets: SampleSets) -> dict[str, Row]:
    """Scheme → the dense model's ``bytes`` and ``quality``, as an earlier run left them; empty if one is missing."""
    found = read_kept(name_figures_file(report, sets))[0]
    rows = {scheme: row for scheme, row in found.items() if scheme in report.quantized and has_figures(row)}
    return rows if rows.keys() == report.quantized.keys() else {}


def has_figures(row: object) -> bool:
    """Whether a row of the cache has what it must have. Somebody may have changed the file."""
    return isinstance(row, dict) and all(isinstance(row.get(name), int | float) for name in ("bytes", "quality"))


def keep_figures(report: Report, sets: SampleSets, rows: Mapping[str, Row]) -> None:
    """Keep figures for the next run. Without a writable cache it measures again."""
    keep(name_figures_file(report, sets), {scheme: dict(row) for scheme, row in rows.items()})


def name_figures_file(report: Report, sets: SampleSets) -> Path:
    """The file in the cache folder. Its name is a digest of all that the figures depend on."""
    s, used = report.settings, {"evaluation": sets.evaluation}
    if "int4" in report.quantized:  # only int4 is rounded for a text
        used["calibration"] = sets.calibration
    about = {
        "model": report.model_sha256,
        "schemes": sorted(report.quantized),
        "settings": [s.objective, s.dtype],
        "samples": {name: [data.hash_windows(x) for x in each.inputs.values()] for name, each in used.items()},
        "versions": [report.mptk, *report.versions.values()],
    }
    return cache_dir() / "dense" / f"{hash_text(format_json(about), 24)}.json"
