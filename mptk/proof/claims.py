"""claims: check report.json against the folder's plan, weights and files.

What can be computed again is computed again; the report's number must equal it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mptk.compile.cut import COMPENSATION
from mptk.conversions import list_conversions
from mptk.cost.model import CostModel
from mptk.errors import FileError, MptkError
from mptk.files import format_json
from mptk.io import CONFIG, read_object
from mptk.ir import Analysis, Plan, Program, Samples, is_tokens
from mptk.methods import find_method
from mptk.methods.criteria import list_criteria
from mptk.methods.division.budget import build_cost_model
from mptk.methods.division.selection import tie_as_planned
from mptk.protocols import PROVEN_ON, Conversion, Report, find_imitated
from mptk.publish.manifest import hash_weight_files, list_files
from mptk.reading import shorten_text
from mptk.targets import ONNX, list_targets
from passes.check_cut import find_table_size
from passes.targets.onnx.names import ONNX_FOLDER, count_graph_bytes, list_quantized_files

LATER = "bench.json"
"""The only file that is written into a published folder."""


def check_files(report: Report, folder: Path) -> None:
    """Check the report's claims on files: their names, the graphs, and whether the folder is a stock checkpoint."""
    # The files that the report names, and no others.
    there = list_files(folder)
    missing = sorted(set(report.files) - set(there))
    if missing:
        raise FileError(
            f"{folder} lacks {missing[0]}, which its report names; do not use it, prune the model again",
            name=missing[0],
        )
    _require("files", report.files, [name for name in there if name != LATER])
    # What was written: the target, the float graphs unless a note says why there are none, the quantised graphs.
    settings = report.settings
    known = list_targets()
    wrote = settings.target in known and known[settings.target].has_written(folder)
    _require("settings.target", settings.target, settings.target if wrote else _find_written_target(folder))
    refused = any(note.startswith("no ONNX") for note in report.notes)
    _require("settings.onnx", bool(settings.onnx and not refused), ONNX.has_written(folder))
    graphs = list_quantized_files(folder / ONNX_FOLDER)
    _require("quantized", sorted(report.quantized), sorted(graphs))
    for scheme, said in report.quantized.items():
        _require(f"quantized.{scheme}.file", folder / said["file"] in graphs[scheme], True)
        _require(f"quantized.{scheme}.bytes", said["bytes"], count_graph_bytes(graphs[scheme]))
    _require("weights_sha256", report.weights_sha256, hash_weight_files(folder))
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "transformers_version" in config:  # by which transformers decides how it reads some tokenizers
        _require("versions.transformers", report.versions.get("transformers"), config["transformers_version"])


def _find_written_target(folder: Path) -> str:
    """The target that the folder was written for, by its content."""
    return next((name for name, target in list_targets().items() if target.has_written(folder)), "none")


def check_numbers(
    report: Report,
    folder: Path,
    analysis: Analysis,
    plan: Plan,
    dense: torch.dtype,
    stored: torch.dtype,
    conversions: Sequence[Conversion] = (),
) -> None:
    """Check the report's claims on what was cut and trained: families, sparsity, cost, plan, trained weights.

    ``dense``, ``stored``: the types that the dense and the pruned model's weights are stored in. ``analysis``: of the
    model after its ``conversions``.
    """
    # Plan, widths, costs.
    _require("plan_sha256", report.plan_sha256, plan.digest)
    _require("families", report.families, compute_widths(analysis, plan))
    compared = find_imitated(conversions)
    cost = build_cost_model(analysis, report.settings, stored.itemsize, None if compared is None else compared.analysis)
    _require("sparsity", report.sparsity, 1 - cost.of(plan).block / cost.dense.block)
    for name, figures in compute_costs(cost, plan, dense, conversions).items():
        said = {k: v for k, v in report.cost[name].items() if k != "latency_ms"}
        _require(f"cost.{name}", said, figures)
    # Conversions: their rows follow from the plan, but for what only the run knew (``told``).
    rows = {each.name: each.to_row() for each in conversions}
    for kind in list_conversions():
        said, row = dict(report.rows.get(kind.name, {})), rows.get(kind.name, {})
        require_same(kind.name, said, row | {name: said.get(name, "") for name in kind.told if row})
    # Trained weights are taken from the folder, so only a run that trains or fits may claim any.
    settings, trained = report.settings, report.trained
    method = find_method(settings.method)
    fits = method.reconstructs or settings.reconstruct or settings.distil_epochs or compared
    learned = fits or method.learns or settings.steps or report.changed
    unknown = [name for name in trained if not learned or name not in analysis.program.state]
    _require("trained", trained, [name for name in trained if name not in unknown])
    # Corrected biases: only some criteria make them.
    if (folder / COMPENSATION).is_file():
        compensating = [name for name, criterion in list_criteria().items() if criterion.compensate]
        known = settings.method if settings.method in compensating else compensating[0]
        _require("settings.method", settings.method, known)
    for d in report.proof:
        _require(f"proof.{d['stage']}", d["ok"], True)


def read_proof_samples(folder: Path, examples: Sequence[Samples]) -> tuple[Samples, Samples]:
    """The samples of the proof, unchecked, and the one of ``examples`` that is of their kind.

    Raises:
        MptkError: they are missing, or not inputs of this kind.
    """
    try:
        tensors = load_file(folder / PROVEN_ON)
    except (OSError, SafetensorError) as error:
        raise _make_inputs_error(folder) from error
    example = next((each for each in examples if each.inputs.keys() == tensors.keys()), None)
    if example is None:
        raise _make_inputs_error(folder)
    return Samples({name: tensors[name] for name in example.inputs}), example


def check_samples(samples: Samples, folder: Path, program: Program, example: Samples) -> None:
    """Raise MptkError unless the proof has samples, each with 8 tokens or more of the model's vocabulary.

    ``program``: the dense one.
    """
    # The samples are a file of the folder: too few or too short ones would make the proof blind, and ids outside the
    # vocabulary would end it with an index error.
    fault = _make_inputs_error(folder)
    nodes = (node for node in program.list_placeholders() if node.name in program.user_inputs)
    for node, tensor, like in zip(nodes, samples.tensors, example.tensors, strict=True):
        rows = find_table_size(node)
        bounded = rows is None or (tensor.numel() > 0 and int(tensor.min()) >= 0 and int(tensor.max()) < rows)
        same = tensor.dtype == like.dtype and tensor.ndim == like.ndim and len(tensor) == len(samples) > 0
        if not same or not bounded or (is_tokens(tensor) and tensor.shape[1] < min(8, like.shape[1])):
            raise fault


def _make_inputs_error(folder: Path) -> MptkError:
    return FileError(
        f"{PROVEN_ON} in {folder} holds no inputs of this model; do not use the folder, prune again", name=PROVEN_ON
    )


def compute_costs(
    cost: CostModel,
    plan: Plan,
    dense: torch.dtype,
    conversions: Sequence[Conversion] = (),
) -> dict[str, dict[str, float]]:
    """``dense`` and ``pruned`` → costs. ``cost`` counts bytes of the stored type, ``dense`` of the dense model's type.

    ``conversions``: the conversions that made ``cost``'s model from the dense model.
    """
    analysis = conversions[0].before.analysis if conversions else cost.analysis
    return {"dense": cost.of_whole(analysis, dense.itemsize).to_dict(), "pruned": cost.of(plan).to_dict()}


def compute_widths(analysis: Analysis, plan: Plan) -> dict[str, dict[str, int]]:
    """Variable → its dense width, its width after the cut, and its layers. A depth is included if it is cut.

    If the plan names single layers of a family, its layers are separate entries.
    """
    return {
        name: {"of": variable.size, "width": plan.widths.get(name, variable.size), "layers": len(variable.layers)}
        for name, variable in tie_as_planned(analysis, plan.families).items()
        if variable.kind == "channels" or name in plan.families
    }


def require_same(name: str, said: object, true: object) -> None:
    """Check one claim: the report's value ``said`` must equal ``true``, both as JSON."""
    _require(name, said, json.loads(format_json(true)))


def _require(name: str, said: object, true: object) -> None:
    if not _is_same(said, true):
        raise FileError(
            f"{name} in report.json is wrong: it says {shorten_text(format_json(said))}, but the folder and its plan "
            f"give {shorten_text(format_json(true))}; do not use it, and prune the model again",
            name=name,
        )


def _is_same(said: object, true: object) -> bool:
    if isinstance(true, Mapping):
        return (
            isinstance(said, Mapping) and said.keys() == true.keys() and all(_is_same(said[k], true[k]) for k in true)
        )
    if isinstance(true, float) and isinstance(said, int | float):  # a sum that is computed again may round otherwise
        return math.isclose(said, true, rel_tol=1e-9, abs_tol=1e-12)
    return bool(said == true)
