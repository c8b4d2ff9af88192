"""verification: ``verify``, which proves a pruned folder again and believes nothing of what it says of itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import passes.frontend.trace
from mptk.driver.api import plan_of
from mptk.driver.claims import check_files, check_numbers, check_tokens, require_same
from mptk.driver.configs import check_code, config_changes
from mptk.driver.proof import Claim, check_proof, find_reach, proof_batches, prove_folder
from mptk.driver.settings import Settings
from mptk.driver.stock import Written, find_stock
from mptk.errors import MptkError
from mptk.io import models
from mptk.io.dense import load_dense
from mptk.io.manifest import check_manifest
from mptk.ir.families import Analysis
from mptk.ir.passes import Log
from mptk.ir.plan import Plan
from mptk.ir.resolved_plan import resolve_plan
from passes.analysis import group
from passes.pipelines import cut_program
from passes.verify import Difference

REPORT = "mptk-report/1"
REMEDY = "do not use it, and prune the model again"


class Proof(list[Difference]):
    """Each stage's difference, and in ``notes`` what the proof does not reach."""

    def __init__(self, stages: Iterable[Difference], notes: list[str]) -> None:
        super().__init__(stages)
        self.notes = notes


def verify(
    folder: str | Path,
    *,
    model: str | None = None,
    trust_remote_code: bool = False,
    proof_length: int = Settings.proof_length,
) -> Proof:
    """Prove a pruned folder again, from the dense model and ``plan.json``.

    First every file is compared with the folder's manifest. What the plan makes of the dense model (weights, config,
    widths, costs) is found anew; what the folder's report says must agree.

    Args:
        folder: an ``--out`` folder of ``prune``.
        model: the dense model, if it is no longer where the report says.
        trust_remote_code: whether the model's own Python code may run; the folder's report has no say in it.
        proof_length: tokens of the longest sequence that may be run, to go beyond the model's windows.

    Raises:
        MptkError: a file was changed, is missing or was added; the report contradicts the folder; the dense model is
            not there, or not the one that was pruned; or a stage is above its tolerance.
    """
    folder = Path(folder)
    plan, report = plan_of(folder), read_report(folder)
    check_manifest(folder)
    with _readable(folder):
        check_files(report, folder)
        loaded = load_dense(report, model, trust_remote_code)
    check_code(loaded.path, folder)
    analysis = group.analyze(passes.frontend.trace.trace(loaded.model, dynamic=True))
    embeddings: Any = loaded.model.get_input_embeddings()
    with _readable(folder):
        check_numbers(report, folder, analysis, plan)
        tokens = torch.tensor(check_tokens(report, embeddings.num_embeddings))
    changes = changes_of(analysis, plan, folder, report, trust_remote_code)
    changed = replace(analysis, program=analysis.program.with_state(changes))
    pruned, epsilons = cut_program(changed, plan, Log())
    written = None
    if (folder / "config.json").is_file():
        written = _written(folder, analysis, loaded, plan, pruned, epsilons, tokens)
    require_same("config_changes", report.get("config_changes"), {} if written is None else config_changes(written))
    claim = Claim(changed, plan, pruned, written, trust_remote_code)
    reach = find_reach(claim, loaded.model.config, proof_length)
    proof = prove_folder(claim, folder, proof_batches(tokens, reach.length), reach.borders)
    check_proof(proof, REMEDY)
    return Proof(proof, [reach.note] if reach.note else [])


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """A report that lacks a word or has one of another kind is a user's error, too."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise MptkError(f"report.json in {folder} is not as `mptk prune` writes it ({error!r}); {REMEDY}") from error


def _written(folder: Path, analysis: Analysis, loaded: models.Loaded, *found: Any) -> Written:
    """The class and config that the plan asks for; another class only if the folder has one."""
    plan, pruned, epsilons, tokens = found
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    other = kind != loaded.model.config.model_type
    return find_stock(analysis, loaded, plan, pruned, epsilons, tokens=tokens[:1], elsewhere=other)


def changes_of(
    analysis: Analysis, plan: Plan, folder: Path, report: Mapping[str, Any], trust: bool
) -> Mapping[str, Tensor]:
    """Weights in which the folder differs from a cut of the dense model: trained ones, or FLAP's biases."""
    state = analysis.program.state
    if (folder / "compensation.safetensors").is_file():
        biases = load_file(folder / "compensation.safetensors")
        for name, bias in biases.items():
            if name not in state or bias.ndim != 1 or bias.shape != state[name].shape:
                raise MptkError(f"compensation.safetensors holds {name}, which is no bias of the model; {REMEDY}")
        return biases
    if not report["trained"]:
        return {}
    small = models.load(str(folder), trust_remote_code=trust).model.state_dict()
    return widened(analysis, plan, {name: small[name] for name in report["trained"]})


def widened(analysis: Analysis, plan: Plan, small: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The dense weights with a cut model's weights at the positions that stay."""
    cut, state = resolve_plan(analysis, plan), analysis.program.state
    return {name: cut.scatter(state[name], tensor, analysis.weights[name]) for name, tensor in small.items()}


def read_report(folder: str | Path) -> dict[str, Any]:
    """``report.json`` of a pruned folder. Raises MptkError if there is none, or it is no report."""
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise MptkError(f"{folder} holds no report.json; give the --out folder of `mptk prune`")
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise MptkError(f"{path} is damaged ({error}); prune the model again") from error
    if report.get("format") != REPORT:
        raise MptkError(f"{path} is no {REPORT}; read it with the version of mptk that wrote it")
    return report
