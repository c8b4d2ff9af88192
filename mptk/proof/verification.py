"""verification: ``verify``, which proves a pruned folder again and trusts nothing that the folder claims."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from torch import nn

from mptk.arguments import guard_arguments
from mptk.compat.torch import forget_sources, use_default_state
from mptk.compile.cut import COMPENSATION, compile_plan, find_changes
from mptk.compile.trace import fit_to_program, trace_loaded
from mptk.config import RECIPE_FILE, Settings
from mptk.conversions import convert_model, read_plan_conversions
from mptk.cost.model import CostModel
from mptk.errors import ChangedError, FileError, InputError, ProofError
from mptk.files import expand_path
from mptk.io import Loaded, check_folder_named, models, open_dense, read_object
from mptk.ir import Analysis, Log, Plan, Samples, resolve_plan
from mptk.methods import find_method
from mptk.methods.division.budget import build_alignment
from mptk.plugins import explain_absent, load_parts
from mptk.progress import show_nothing
from mptk.proof.claims import LATER, check_files, check_numbers, check_samples, read_proof_samples, require_same
from mptk.proof.proof import check_proof, prove_folder
from mptk.protocols import (
    METRICS,
    PROVEN_ON,
    REPORT_FILE,
    TRACKER,
    Analysed,
    Chosen,
    Compiled,
    Context,
    DenseModel,
    Opened,
    Prepared,
    Prover,
    Report,
    Target,
    build_executor,
    find_stored_type,
    make_report_error,
)
from mptk.publish.licence import CARD, list_notices
from mptk.publish.manifest import MARKER, check_manifest, hash_file, identify_file, list_files
from mptk.staged.staged import Executor
from mptk.targets import ONNX, find_target
from mptk.targets.beside import READ
from mptk.targets.stock_config import check_code, find_config_changes
from mptk.tasks import find_folder_task
from passes.analysis import group
from passes.verify import Difference

PRUNE_AGAIN = "do not use it, and prune the model again"


class Proof(list[Difference]):
    """Each stage's difference, and ``notes`` on what the proof does not cover."""

    def __init__(self, stages: Iterable[Difference], notes: Iterable[str]) -> None:
        super().__init__(stages)
        self.notes = list(notes)


@guard_arguments
@use_default_state()
@forget_sources()
def verify(
    folder: str | Path,
    *,
    like: str | Path | None = None,
    model: str | Path | nn.Module | None = None,
    trust_remote_code: bool = False,
    proof_length: int = Settings.proof_length,
    memory: int | None = None,
    device: str = Settings.device,
) -> Proof:
    """Prove a pruned folder again, from the dense model and ``plan.json``.

    First every file is compared with the folder's manifest. Then weights, config, widths and costs are computed again
    from the dense model and the plan; the folder's report must agree.

    A GGUF file is proven against the folder that it was made from: each field and each tensor is compared and, if
    llama.cpp (extra ``llama-cpp``) can be imported, its logits and how it reads text.

    Args:
        folder: an ``--out`` folder of ``prune``, or a GGUF file of one.
        like: of a GGUF file: the folder. It is not proven by this; verify it, too.
        model: the dense model, if it has moved; or the module, if it was pruned in memory. Of a GGUF file that was
            written with ``like``: the same dense model's GGUF file.
        trust_remote_code: whether the model's own Python code may run; the folder's report does not decide this.
        proof_length: tokens of the longest sequence in the proof, to go beyond the model's windows.
        memory, device: as in ``Settings``.

    Raises:
        MptkError: a file was changed, is missing or was added; the report contradicts the folder; the dense model is
            missing, or not the one that was pruned; a stage exceeds its tolerance; or somebody changed what is proven
            meanwhile.
    """
    provers: Collection[Prover] = load_parts("provers").values()
    file = expand_path(folder)
    if (prover := next((each for each in provers if each.takes(file)), None)) is not None:
        with _require_unchanged(file, *([] if like is None else [expand_path(like)])):
            return Proof(*prover.prove(file, like, model))
    if like is not None:
        kinds = " or ".join(each.kind for each in provers) or "proven"
        raise InputError(
            f"--like is the folder of a {kinds} file, and {folder} is not such a file; leave it out", name="like"
        )
    folder = Path(folder)
    check_folder_named(folder, "prune")
    # Only these settings are the caller's. All others are the folder's, and are checked against what it holds.
    with _require_unchanged(folder):
        asked = Settings(memory=memory, device=device, trust_remote_code=trust_remote_code, proof_length=proof_length)
        return repeat_proof(folder, str(model) if isinstance(model, Path) else model, asked)


def repeat_proof(
    folder: Path, model: str | nn.Module | None, asked: Settings, analysis: Analysis | None = None
) -> Proof:
    """``verify`` of a folder that nobody changes meanwhile. ``analysis``: as of ``compile_folder``."""
    # What can be checked without the dense model, the cheapest first.
    plan, report = read_folder_plan(folder), Report.read(folder)
    check_manifest(folder)
    with _explain_unreadable(folder):
        check_files(report, folder)
    compiled, samples = compile_folder(folder, report, plan, model, asked, analysis)
    targets = (compiled.prepared.target, ONNX)
    proven = prove_folder(compiled, targets, folder, samples, again=True)
    check_proof(proven.differences, PRUNE_AGAIN)
    check_planted(compiled, targets, folder)  # last: the fault of a known file says more
    unread = describe_unread_tokenizer(compiled.prepared.loaded, folder)
    return Proof(proven.differences, [note for note in (proven.note, unread) if note])


def compile_folder(
    folder: Path,
    report: Report,
    plan: Plan,
    model: str | nn.Module | None,
    asked: Settings,
    analysis: Analysis | None = None,
) -> tuple[Compiled, Samples]:
    """The cut that a folder should hold, made anew from the dense model, and the proof's samples.

    ``analysis``: of the dense model before conversions, if another folder of it was verified before; it is traced if
    there is none.

    Raises:
        MptkError: the dense model is missing or another one; or the report contradicts it and the plan.
    """
    # The dense model, by the digest that the report gives, and what ``prune`` made of it up to the choice.
    resident, executor = build_executor(asked)
    loaded = open_dense(report.model, report.model_sha256, model, asked.trust, resident, live=report.live)
    check_code(loaded.path, folder)
    context = Context(Log(), show_nothing)
    dense, samples = _analyse_dense(folder, report, plan, loaded, executor, context, analysis)
    settings = replace(report.settings, proof_length=asked.proof_length, rehome=_is_rehomed(folder, dense.model.loaded))
    prepared = _prepare_dense(settings, dense, plan)
    assert prepared.planned is not None
    changes = find_changes(prepared.analysis, prepared.planned.cut, folder, report, asked.trust)
    chosen = replace(prepared.planned, changes=changes)
    compiled = compile_plan(prepared, chosen, samples, context)
    found = {} if compiled.written is None else find_config_changes(compiled.written, folder)
    require_same("config_changes", report.config_changes, found)
    return compiled, samples


def describe_unread_tokenizer(loaded: Loaded, folder: Path) -> str:
    """The proof's note if the tokenizer in ``folder`` cannot be compared; empty if it can, or if there is none."""
    if loaded.tokenizer is not None or not models.has_tokenizer(folder):
        return ""
    return (
        "the tokenizer was not compared, since the dense model has none; save it beside the dense model, and give "
        "--model DIR"
    )


def _analyse_dense(
    folder: Path,
    report: Report,
    plan: Plan,
    loaded: Loaded,
    executor: Executor,
    context: Context,
    analysis: Analysis | None,
) -> tuple[DenseModel, Samples]:
    """The dense model that was cut, what it went through before, and the proof's samples; the report must agree."""
    task = find_folder_task(folder, report, loaded)
    require_same("task", report.task, task.name)
    samples, example = read_proof_samples(folder, task.make_examples(loaded.model))
    # As in ``prune``: a trace may fix the samples' sizes, but not if the graph itself is written.
    like = samples if find_target(report.settings.target).classed else None
    if analysis is None:
        analysis = group.analyze_program(trace_loaded(loaded, task, executor, report.settings.length, like))
    samples = fit_to_program(task, analysis.program, samples, PROVEN_ON)
    given, start = Opened(loaded, task), Analysed(loaded, task, analysis)
    start, conversions = convert_model(
        start, read_plan_conversions(plan), context, executor, report.settings.length, like
    )
    loaded, stored = start.loaded, find_stored_type(report.settings, start.loaded)
    with _explain_unreadable(folder):
        check_numbers(report, folder, start.analysis, plan, loaded.dtype, stored, conversions)
        check_samples(samples, folder, start.analysis.program, example)
    return DenseModel(given, start, conversions, executor), samples


def _prepare_dense(settings: Settings, dense: DenseModel, plan: Plan) -> Prepared:
    """The dense model, prepared as in ``prune``."""
    target, method, model = find_target(settings.target), find_method(settings.method), dense.model
    return Prepared(
        dense,
        model,
        settings,
        method,
        target,
        legal=target.find_legal(model.analysis, model.loaded.model, build_alignment(settings)),
        cost=CostModel(model.analysis, itemsize=find_stored_type(settings, model.loaded).itemsize),
        planned=Chosen(plan, resolve_plan(model.analysis, plan)),
    )


def _is_rehomed(folder: Path, loaded: Loaded) -> bool:
    """Whether the folder's class differs from the dense model's; a folder without a config has no class."""
    file = folder / "config.json"
    return file.is_file() and read_object(file).get("model_type") != loaded.model.config.model_type


def read_folder_plan(folder: str | Path) -> Plan:
    """The plan of a pruned folder. Raises MptkError if there is none."""
    path = Path(folder) / "plan.json"
    if not path.is_file():
        absent = explain_absent()  # it may be a file that a feature proves
        raise FileError(
            f"{folder} holds no plan.json; give the --out folder of `mptk prune`{absent and f' ({absent})'}",
            name=folder,
        )
    return Plan.load(path)


@contextmanager
def _require_unchanged(*places: Path) -> Iterator[None]:
    """Raise MptkError if somebody changed or replaced the files during the proof.

    Then neither a result nor an error is about what is there now, so this error replaces both.
    """
    before = [_identify_files(place) for place in places]
    try:
        yield
    except Exception as error:
        _check_as_before(places, before, error)
        raise
    _check_as_before(places, before)


def _check_as_before(
    places: Sequence[Path], before: Sequence[Mapping[str, tuple[int, ...]]], error: Exception | None = None
) -> None:
    for place, files in zip(places, before, strict=True):
        if _identify_files(place) != files:
            raise ChangedError(
                f"{place} was changed or replaced while it was verified; verify it again", name=place
            ) from error


def _identify_files(place: Path) -> dict[str, tuple[int, ...]]:
    """Name → identity of each file. Its last part goes: it also changes if only another link to the file is made."""
    names = list_files(place) if place.is_dir() else [""]
    found = dict[str, tuple[int, ...]]()
    for name in [*names, MARKER] if place.is_dir() else names:
        with suppress(OSError):  # it goes at this moment
            found[name] = identify_file(place / name)[:-1]
    return found


@contextmanager
def _explain_unreadable(folder: Path) -> Iterator[None]:
    """Turn errors from wrong values in a report into a user's error."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise make_report_error(folder, error) from error


# ---- files that mptk would not have written ----

ALWAYS = frozenset({"plan.json", REPORT_FILE, CARD, RECIPE_FILE, LATER, PROVEN_ON})
"""Files that any folder has, or may have."""


def check_planted(compiled: Compiled, targets: Sequence[Target], folder: Path) -> None:
    """Raise ProofError if a file of ``folder`` is not one that mptk writes for this cut, or holds more than it writes.

    The manifest does not help: whoever plants a file can forge it. Programs act on files by their names (an adapter, a
    list of modules, an index of weights), and nobody knows all such names, so only what mptk writes is allowed.

    ``targets``: what the folder was written for. If one is of another package and does not list its files, any may be.
    """
    found, settings, dense = list_files(folder), compiled.prepared.settings, compiled.prepared.loaded.path
    for name in (each for each in (*found, MARKER) if each.endswith(".json")):
        _check_once(folder, name)
    known = set(ALWAYS)
    for target in targets:
        files = target.list_files(compiled, folder)
        if files is None:
            return
        known |= files
    # Files that depend on the run: metrics, FLAP's biases, parts of other results, a tokenizer, licence notices.
    if settings.steps:
        known |= {METRICS, *(name for name in found if name.startswith(f"{TRACKER}/"))}
    if compiled.chosen.changes and not compiled.chosen.trained:
        known.add(COMPENSATION)
    known |= {name for name in found if name.startswith(tuple(f"{each}/" for each in settings.subfolders))}
    if compiled.prepared.loaded.tokenizer is None:  # of a model in memory: verify's note says that nothing reads them
        known |= {name for name in found if any(PurePosixPath(name).match(pattern) for pattern in READ)}
    copies = ((each, folder / each.name) for each in list_notices(dense))
    known |= {each.name for each, copy in copies if copy.is_file() and hash_file(each) == hash_file(copy)}
    if more := sorted(set(found) - known):
        raise ProofError(
            f"the proof fails: {more[0]} is not a file that mptk writes for this model; do not use {folder}, and prune "
            "the model again",
            name=more[0],
        )


def _check_once(folder: Path, name: str) -> None:
    """Raise ProofError if a JSON file has a field twice: some programs take the first, some the last."""

    def check_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ProofError(
                f"the proof fails: {name} has {twice} twice; do not use {folder}, and prune the model again", name=name
            )
        return fields

    json.loads((folder / name).read_text(encoding="utf-8"), object_pairs_hook=check_pairs)
