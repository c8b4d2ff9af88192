"""onnx_export: the exporter of all ``OnnxForm``s: trace, cut, emit, quantise; and a trace with named inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from torch import Tensor, fx, nn
from torch.export.graph_signature import TensorArgument

from mptk.config import Settings
from mptk.errors import InputError, MptkError, TargetError, take_first_line
from mptk.ir import Log, Plan, Program, Samples, resolve_plan, transfer_cut
from mptk.ort.sessions import DTYPE, HALF
from mptk.progress import step
from mptk.protocols import Dense, OnnxForm, Traced, describe_left_out, find_stored_type
from mptk.tasks.inputs.base import Named
from mptk.tasks.padding import (
    IDS,
    Unpadded,
    describe_padding,
    has_token_ids,
    list_input_choices,
    pad_by_metadata,
    with_mask,
)
from mptk.version import __version__
from passes.analysis import group
from passes.frontend.trace import export_program
from passes.pipelines import cut_program, emit_onnx, quantize_onnx
from passes.targets.onnx.emit import Interface
from passes.targets.onnx.extract import GraphPart
from passes.targets.onnx.names import CACHE, Axes, name_data_file, name_quantized_file
from passes.verify import RUNTIME_TOLERANCE, compare_outputs

VERSION, EXPORTER = "mptk_version", "exporter"
"""The keys of the versions of mptk, and of the packages that decide about a graph's nodes."""
EXPORTERS = ("torch", "transformers", "onnxscript", "onnx-ir")
CHANGED = "padding changes what the model computes, with a mask as well; give the ONNX graph rows of one length"


def check_form(form: OnnxForm, settings: Settings) -> None:
    """Raise MptkError if the form's graphs cannot be written as the settings ask."""
    if form.float_only and settings.onnx_dtype == HALF:
        raise InputError(
            f"the graphs of {form.float_only} are written in float32; leave out --onnx-dtype, or give --quantize fp16",
            name="onnx_dtype",
        )


def export_form(
    form: OnnxForm, dense: Dense, plan: Plan | None, samples: Samples | None, folder: Path, log: Log
) -> list[str]:
    """Write the model, cut to ``plan`` if there is one, as ONNX into ``folder``. Returns notes for the report.

    ``samples``: to calibrate on, if there are any. ``log`` gets a record of each pass.

    Raises:
        MptkError: this model cannot be exported.
    """
    settings, traced = dense.settings, form.trace(dense, samples)
    program = traced.program
    # What is between the graphs is no output while the plan cuts. A second trace of the model has the same families as
    # the first, so the plan fits it, too; one with other outputs may have others.
    if form.between:
        names = list_output_names(program)
        outputs, between = names[: -len(form.between)], names[-len(form.between) :]
        program = cut_to_plan(replace_outputs(program, outputs), dense, plan, log, dense.program)
        program = replace_outputs(program, [*list_output_names(program), *between])
    else:
        program = cut_to_plan(program, dense, plan, log)

    step(0, 0, "translate the graph")
    # The plan may cut layers with their caches, whose inputs are the last ones.
    axes = dict(list(name_axes(form, traced).items())[: len(program.user_inputs)])
    caches = [name for name in axes if name.startswith(CACHE)]
    gives = (*(traced.outputs or form.outputs), *(name.replace("past_key_values", "present") for name in caches))
    emit_onnx(
        program,
        folder,
        Interface(axes, (*gives, *form.between)),
        parts=divide_graph(form, [*axes, *form.between], caches, gives),
        # A graph without a cache has one phase.
        objective=settings.objective if caches else "prefill",
        half=settings.onnx_dtype == HALF,
        metadata={**traced.about, **make_graph_metadata(dense, plan), **(traced.padding or {})},
        log=log,
    )
    # int4 is rounded for a text (GPTQ), if that is all that the graph reads.
    decoder = bool(caches) and len(form.parts) == 1
    text = samples.inputs[IDS] if decoder and samples is not None else None
    notes = write_quantized_graphs(dense, [folder / name for name in form.graphs], text, log)
    return notes + ([CHANGED] if IDS in axes and traced.padding == {} else [])


def name_axes(form: OnnxForm, traced: Traced) -> dict[str, Axes]:
    """The names of each input's axes."""
    known, first = {**form.axes, **traced.axes}, form.other_axes[0]
    return {
        name: found
        if len(found := known.get(name, form.other_axes)) == rank
        else (first, *(f"{name}_{i}" for i in range(1, rank)))
        for name, rank in traced.ranks.items()
    }


def divide_graph(
    form: OnnxForm, there: Sequence[str], caches: Sequence[str], gives: tuple[str, ...]
) -> dict[str, GraphPart] | None:
    """The parts of a graph with the values ``there``, by their files; None if it is not divided.

    ``caches``, ``gives``: what the main part also reads, and its outputs.
    """
    *first, main = form.parts
    if not first:
        return None
    reads = {part.file: {name: new for name, new in part.reads.items() if name in there} for part in form.parts}
    reads[main.file] |= {name: name for name in caches}
    return {part.file: GraphPart(reads[part.file], part.gives or gives) for part in form.parts}


def trace_named(
    dense: Dense,
    wrap: Callable[[nn.Module, list[str]], nn.Module],
    example: Named,
    samples: Samples,
    unpadded: Unpadded,
) -> Traced:
    """The model with named inputs.

    Args:
        wrap: makes a module that takes tensors by position of the model and their names.
        example: inputs to trace it with, and a cache if ``wrap``'s module takes one.
        samples: inputs for which it must compute what the dense model does. Raises MptkError if no choice of inputs
            does.
    """
    step(0, 0, "trace with named inputs")
    model, inputs, expected = dense.loaded.model, samples.inputs, dense.compute_first(samples)
    # The first choice of inputs that can be traced, runs on any number of rows and tokens, and computes what the dense
    # model does.
    given, caches = with_mask(example), [name for name in example if name.startswith(CACHE)]
    reason = "with a mask of ones it computes other outputs than without a mask"
    for read in list_input_choices(dense.loaded, inputs):
        names = [*read, *caches]
        try:
            program = export_program(wrap(model, names), tuple(given[name] for name in names), dynamic=True)
            traced = Traced(dense.put_weights(program), names)
            traced.check_sizes()
            if is_same_output(traced.run(dense.executor, with_mask(inputs)), expected):
                break
        except (MptkError, RuntimeError) as error:
            reason = take_first_line(error)
    else:
        raise TargetError(
            f"{type(model).__name__} is not written with named inputs: {reason}", name=type(model).__name__
        )
    if not has_token_ids(inputs):
        return replace(traced, padding={})

    # The graph's metadata promise padding only if these samples, padded, have the same outputs.
    said = describe_padding(model)
    longer, rows = pad_by_metadata(inputs, said)
    same = is_same_output(unpadded(traced.run(dense.executor, longer)[rows], inputs), expected)
    return replace(traced, padding=said if same else {})


def is_same_output(found: Tensor, expected: Tensor) -> bool:
    """Whether two outputs are equal up to rounding."""
    if found.shape != expected.shape:
        return False
    return compare_outputs("trace", found.to(expected.device), expected, RUNTIME_TOLERANCE).ok


def cut_to_plan(program: Program, dense: Dense, plan: Plan | None, log: Log, whole: Program | None = None) -> Program:
    """The program, cut to the plan. Raises MptkError if the plan does not fit.

    ``whole``: another program of the same model, whose families the plan names. None: ``program`` has them.
    """
    if plan is None:
        return program
    analysis = group.analyze_program(program)

    # The plan names the families of ``whole``: its cut is transferred to this program's.
    source = analysis if whole is None else group.analyze_program(whole)
    found = resolve_plan(source, plan)
    found = found if whole is None else transfer_cut(found, source, analysis)
    return cut_program(analysis, found, log, find_stored_type(dense.settings, dense.loaded)).program


def list_output_names(program: Program) -> list[str]:
    """The names of the values that a program returns, in order."""
    return [node.name for node in program.graph.graph.output_node().args[0] if isinstance(node, fx.Node)]  # type: ignore[union-attr]


def replace_outputs(program: Program, names: Sequence[str]) -> Program:
    """``program`` with the values of these names as its outputs.

    What an analysis may cut depends on the outputs, and passes keep the names of values. So a value can be taken from
    the outputs for an analysis, and be made an output again after the cut.
    """
    module = program.copy_graph()
    values = {node.name: node for node in module.graph.nodes}
    if missing := [name for name in names if name not in values]:
        raise TargetError(f"the graph has no value {missing[0]} after the cut", name=missing[0])
    module.graph.output_node().args = (tuple(values[name] for name in names),)
    module.recompile()
    signature = copy.deepcopy(program.signature)
    like = signature.output_specs[0]
    specs = [replace(like, arg=TensorArgument(name=name)) for name in names]
    return replace(program, graph=module, signature=replace(signature, output_specs=specs))


def write_quantized_graphs(dense: Dense, files: Sequence[Path], text: Tensor | None, log: Log) -> list[str]:
    """Write the quantised graphs that the settings name beside ``files``. Returns notes on schemes that are left out.

    ``files``: the float graphs, the main one first. ``text``: to calibrate its int4 on.

    Raises:
        MptkError: one cannot be made, and the settings are strict.
    """
    notes, windows = [], None if text is None else text.numpy()
    for scheme in dense.settings.quantize:
        made = list[Path]()
        try:
            for file in files:
                # The text is what the main graph reads. The others (an encoder's) read something else.
                given = windows if file is files[0] else None
                made.append(quantize_onnx(file, scheme, given, log, dense.executor.device))
        except MptkError as error:
            if dense.settings.strict:
                raise
            # One scheme is made of all graphs or of none.
            for file in made:
                file.unlink()
                file.with_name(name_data_file(file.name)).unlink()
            notes.append(
                describe_left_out(f"{files[0].parent.name}/{name_quantized_file(files[0], scheme).name}", error)
            )
    return notes


def make_graph_metadata(dense: Dense, plan: Plan | None) -> dict[str, str]:
    """The metadata of every graph."""
    said = {
        VERSION: __version__,
        EXPORTER: ", ".join(f"{name} {version(name)}" for name in EXPORTERS),
        "source": dense.loaded.source,
        DTYPE: HALF if dense.settings.onnx_dtype == HALF else "float32",
    }
    return {**said, **dense.about, **({} if plan is None else {"plan_sha256": plan.digest})}
