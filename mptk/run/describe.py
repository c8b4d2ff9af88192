"""describe: make the report of a proven folder from the values of the run."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from mptk.config import Settings
from mptk.errors import MptkError
from mptk.files import make_scratch
from mptk.io import data, resolve_model_name, write_weights
from mptk.ir import Samples, Weights
from mptk.methods import list_methods
from mptk.progress import Count
from mptk.proof.claims import compute_costs, compute_widths
from mptk.protocols import (
    PROVEN_ON,
    REPORT_FILE,
    Compiled,
    Context,
    OnnxForm,
    Proven,
    Report,
    SampleSets,
    list_sources,
    list_stages,
)
from mptk.publish.folder import amend
from mptk.publish.licence import CARD
from mptk.publish.manifest import hash_weight_files, list_files, update_manifest
from mptk.reading import Json
from mptk.report.card import write_card
from mptk.run.dense_types import DENSE_TYPES, keep_figures, read_figures, write_dense_types
from mptk.run.run import Run
from mptk.targets.stock_config import find_config_changes
from mptk.tasks.onnx_proof import make_runner
from mptk.version import __version__
from passes.targets.onnx.names import ONNX_FOLDER, count_graph_bytes, list_quantized_files, name_quantized_file

PACKAGES = ("numpy", "onnxruntime", "torch", "transformers")


def describe(compiled: Compiled, proven: Proven, sets: SampleSets, notes: list[str], folder: Path, run: Run) -> Report:
    """The report of a proven folder without its quality, which ``measure`` adds."""
    prepared, chosen = compiled.prepared, compiled.chosen
    # The proof's samples stay in the folder, so that `verify` can repeat it without the data. They come before the
    # report, which lists all files.
    (folder / PROVEN_ON).parent.mkdir()
    write_weights(folder / PROVEN_ON, Weights(sets.proof.inputs))
    rows = {each.name: row for each in prepared.conversions if (row := each.to_row())}
    described = {name: row for stage in list_stages() for name, row in stage.describe(compiled).items()}
    figures = compute_costs(prepared.cost, chosen.plan, prepared.loaded.dtype, prepared.conversions)
    return Report(
        mptk=__version__,
        model=resolve_model_name(run.source),
        model_sha256=run.origin.model,
        live=prepared.loaded.live,
        settings=replace(prepared.settings, trust_remote_code=False),  # a word of this call, not of the result
        families=compute_widths(prepared.analysis, chosen.plan),
        sparsity=1 - figures["pruned"]["block"] / prepared.cost.dense.block,
        cost=figures,
        splits=chosen.losses,
        trained=chosen.trained,
        weights_sha256=hash_weight_files(folder),
        quality={},
        quantized=measure_graphs(folder / ONNX_FOLDER, prepared.task.onnx),
        proof=[d.to_dict() for d in proven.differences],
        proof_length=proven.length,
        config_changes={} if compiled.written is None else find_config_changes(compiled.written, folder),
        plan_sha256=chosen.plan.digest,
        notes=[note for note in notes if note],  # most sources of notes give an empty one if they have nothing to say
        stages=run.log.to_list(),
        files=sorted([*list_files(folder), REPORT_FILE, CARD]),  # the last two are written from this report
        task=prepared.task.name,
        legal={
            name: {"widths": list(ladder), "refused": prepared.legal.refused.get(name) or prepared.legal.left.get(name)}
            for name, ladder in prepared.legal.ladders.items()
        },
        data=describe_data(sets, prepared.settings),
        recovery=compiled.recovery,
        versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        rows={**rows, **run.rows, **described},
        # A plan's file may say anything, so only names that mptk knows go into a report.
        chosen_by=next((name for name in list_methods() if name == chosen.plan.meta.get("method")), "")
        if prepared.settings.plan is not None
        else "",
    )


def describe_data(sets: SampleSets, settings: Settings) -> dict[str, object]:
    """The data of a run: source and hash of each set of samples, and of the files."""
    found: dict[str, Json] = {}
    for name, samples, source in (
        ("training", sets.training if settings.steps else None, settings.data),
        ("held-out", sets.held_out, settings.data),
        ("calibration", sets.calibration, settings.data),
        ("evaluation", sets.evaluation, sets.source),
    ):
        if samples is not None:
            inputs = {n: {"shape": list(x.shape), "sha256": data.hash_windows(x)} for n, x in samples.inputs.items()}
            found[name] = {"source": source, "samples": len(samples), "inputs": inputs}
            if name != "evaluation":
                found[name]["seed"] = settings.seed
    return {**found, "files": data.hash_text_files(*list_sources(settings))}


def measure(report: Report, compiled: Compiled, sets: SampleSets, folder: Path, context: Context) -> Report:
    """The report with the quality of both models, also in the scheme of each quantised graph in ``folder``."""
    prepared, s = compiled.prepared, compiled.prepared.settings
    form, device = prepared.task.onnx, prepared.executor.device
    # A graph that gives only the last position's logits cannot be measured: the metrics need each position's.
    schemes = report.quantized if form is not None and s.logits == "all" else {}
    dense = read_figures(report, sets) if schemes else {}
    with make_scratch() as scratch:
        graphs = {scheme: folder / row["file"] for scheme, row in schemes.items()}
        if schemes and not dense:
            # The cut is published and proven: if the dense model cannot be written, its report says so.
            try:
                with context.stage(DENSE_TYPES):
                    written = write_dense_types(prepared, [*schemes], sets.calibration, scratch.folder, strict=False)
            except MptkError as error:
                written, why = {}, f"the dense model was not measured in {', '.join(schemes)}: {error}"
                report = replace(report, notes=[*report.notes, why])
            dense = {scheme: {"bytes": count_graph_bytes(files)} for scheme, files in written.items()}
            graphs |= {f"dense {scheme}": scratch.folder / graphs[scheme].name for scheme in written}
        rounded = {name: make_runner(form, file, device) for name, file in graphs.items()} if form is not None else {}

        def run_batches(batches: Sequence[Samples], progress: Count) -> Iterator[tuple[str, int, Tensor]]:
            programs = {"dense": prepared.reference, "pruned": compiled.program}
            # All batches go through one stage of both programs before the next stage is read. ONNX Runtime holds a
            # whole graph, so graphs get their batch beside these results.
            results = prepared.executor.run_programs(
                list(programs.values()), [batch.tensors for batch in batches], progress
            )
            for i, batch in enumerate(batches):
                for name in programs:
                    yield name, i, next(results)
                for name, run in rounded.items():
                    yield name, i, run(batch)

        with context.stage("measure"):
            quality = prepared.task.measure_quality(run_batches, sets, context.progress)

    # The figures of graphs stand beside their files; those of the dense model are kept for other runs.
    measured = {name: {"quality": quality.pop(name)} for name in graphs if name in quality}
    dense = {scheme: {**row, **measured.get(f"dense {scheme}", {})} for scheme, row in dense.items()}
    if any(f"dense {scheme}" in measured for scheme in dense):
        keep_figures(report, sets, dense)
    beside = {scheme: {"dense": row} for scheme, row in dense.items()}
    quantized = {
        scheme: {**row, **measured.get(scheme, {}), **beside.get(scheme, {})}
        for scheme, row in report.quantized.items()
    }
    report = replace(report, quality=quality, quantized=quantized, stages=context.log.to_list())
    publish_report(report, compiled, folder)
    return report


def publish_report(report: Report, compiled: Compiled, folder: Path) -> None:
    """Replace the report and the card of a published folder."""
    with amend(folder) as new:
        report.write(new)
        write_card(report, compiled, new)
        update_manifest(new, REPORT_FILE, CARD)


def measure_graphs(folder: Path, form: OnnxForm | None) -> dict[str, dict[str, str | int]]:
    """Scheme → the file of its main graph in the checkpoint, and the bytes of all its graphs."""
    main = "" if form is None else form.graphs[0]
    return {
        scheme: {"file": f"{folder.name}/{name_quantized_file(Path(main), scheme)}", "bytes": count_graph_bytes(files)}
        for scheme, files in list_quantized_files(folder).items()
    }
