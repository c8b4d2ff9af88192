"""exporting: what the ONNX forms share: the trace with named inputs, the cut, the proof's stages, and its samples.

In order: the trace, the cut and the files; the stages of the proof and what quantising may change; samples of other
sizes, for graphs without a cache.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import TensorArgument

from mptk.config import Settings
from mptk.errors import MptkError, take_first_line
from mptk.ir import Log, Plan, Program, Samples, is_tokens, resolve_plan, transfer_cut
from mptk.ort.sessions import OrtGraph
from mptk.progress import step
from mptk.protocols import Checks, Dense, describe_left_out, find_stored_type
from mptk.staged.staged import Executor
from mptk.tasks.inputs.base import Named
from mptk.tasks.inputs.image_forms import PIXELS
from mptk.tasks.padding import (
    PADDING_KEY,
    describe_padding,
    has_token_ids,
    list_input_choices,
    pad_by_metadata,
    with_mask,
)
from mptk.version import __version__
from passes.analysis import group
from passes.frontend.trace import export_program
from passes.pipelines import cut_program, quantize_onnx
from passes.targets.onnx.check_quantized import DIVERGENCES, compute_token_divergence
from passes.targets.onnx.names import CACHE, name_data_file, name_quantized_file
from passes.verify import (
    HALF_TOLERANCE,
    RUNTIME_TOLERANCE,
    Difference,
    Placed,
    StageOutputs,
    compare_outputs,
    split_outputs,
)

HALF, DTYPE = "float16", "dtype"
"""A type, and the key in a graph's metadata of the type in which it computes."""
VERSION, EXPORTER = "mptk_version", "exporter"
"""The keys of the versions of mptk, and of the packages that decide about a graph's nodes."""
EXPORTERS = ("torch", "transformers", "onnxscript", "onnx-ir")
CHANGED = "padding changes what the model computes, with a mask as well; give the ONNX graph rows of one length"

GraphRuns = Callable[[Mapping[str, Tensor]], Tensor | list[Tensor]]
"""Named inputs → what a form's graphs compute: one output, or several."""


@dataclass(frozen=True)
class Traced:
    """A program and the names of its inputs, in order. ``outputs``: of its outputs, if they are not the form's."""

    program: Program
    names: list[str]
    outputs: tuple[str, ...] = ()

    def run(self, executor: Executor, inputs: Mapping[str, Tensor]) -> Tensor:
        """The first output. ``inputs`` that it does not have are ignored; a cache that they lack is empty."""
        return self.run_all(executor, inputs)[0]

    def run_all(self, executor: Executor, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Every output."""
        # An empty cache has no positions, and the sizes of the traced one.
        rows = len(next(iter(inputs.values())))
        caches = {name: x for name, x in self.traced.items() if name.startswith(CACHE)}
        shapes = {name: (rows, int(x.shape[1]), 0, int(x.shape[3])) for name, x in caches.items()}
        empty = {name: torch.zeros(shape, dtype=caches[name].dtype) for name, shape in shapes.items()}
        given = {**empty, **inputs}
        found = next(executor.run_programs([self.program], [[given[name] for name in self.names]]))
        return found if isinstance(found, tuple | list) else [found]

    @property
    def traced(self) -> dict[str, Tensor]:
        """The inputs as they were traced, without numbers."""
        values = {node.name: node.meta["val"] for node in self.program.list_placeholders()}
        return {name: values[node] for name, node in zip(self.names, self.program.user_inputs, strict=True)}

    @property
    def ranks(self) -> dict[str, int]:
        """How many dimensions each input has."""
        return {name: x.ndim for name, x in self.traced.items()}

    def check_sizes(self) -> None:
        """Raise MptkError if the program runs on one number of samples or tokens only."""
        for name, x in self.traced.items():
            # A size that the trace has fixed is a number; an open one is a symbol.
            axes = x.shape[: 2 if is_tokens(x) else 1]
            if fixed := [size for size in axes if str(size).isdigit()]:
                raise MptkError(f"the trace of this model runs only on {name} with {fixed[0]} rows or columns")


Unpadded = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""Outputs and the inputs without padding → the outputs without those at padding."""


def trace_named(
    dense: Dense,
    wrap: Callable[[nn.Module, list[str]], nn.Module],
    example: Named,
    samples: Samples,
    unpadded: Unpadded,
) -> tuple[Traced, dict[str, str]]:
    """The model with named inputs, and what its graph's metadata says of padding: nothing if that changes outputs.

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
        raise MptkError(f"{type(model).__name__} is not written with named inputs: {reason}")
    if not has_token_ids(inputs):
        return traced, {}

    # The graph's metadata promise padding only if these samples, padded, have the same outputs.
    said = describe_padding(model)
    longer, rows = pad_by_metadata(inputs, said)
    same = is_same_output(unpadded(traced.run(dense.executor, longer)[rows], inputs), expected)
    return traced, said if same else {}


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
        raise MptkError(f"the graph has no value {missing[0]} after the cut")
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


def check_float(settings: Settings, kind: str) -> None:
    """Raise MptkError if the settings ask for main graphs in float16. ``kind``: of the model."""
    if settings.onnx_dtype == HALF:
        raise MptkError(f"the graphs of {kind} are written in float32; leave out --onnx-dtype, or give --quantize fp16")


def is_half(graph: OrtGraph) -> bool:
    """Whether a graph computes in float16."""
    return graph.metadata.get(DTYPE) == HALF


def list_proof_stages(
    run: GraphRuns,
    graph: OrtGraph,
    unpadded: Unpadded,
    more: Mapping[str, StageOutputs] | None = None,
) -> Checks:
    """Stages that run the proof's samples, and the same with padding; ``more``: other stages.

    ``graph``: its metadata tell the type and the padding of all graphs. ``unpadded``: drops outputs at padding.
    """
    said, tolerance = graph.metadata, HALF_TOLERANCE if is_half(graph) else RUNTIME_TOLERANCE

    def run_plain(samples: Samples) -> Tensor | list[Tensor]:
        return run(with_mask(samples.inputs))

    def run_padded(samples: Samples) -> Tensor | list[Tensor]:
        given, rows = pad_by_metadata(samples.inputs, said)
        found = run(given)
        several = [unpadded(each[rows], samples.inputs) for each in ([found] if isinstance(found, Tensor) else found)]
        return several[0] if isinstance(found, Tensor) else several

    # A graph is run with padding only if its metadata say that it may be.
    runs = {"ONNX Runtime": run_plain, **(more or {})} | (
        {"ONNX Runtime padded": run_padded} if PADDING_KEY in said else {}
    )
    stages: dict[str, tuple[Program | StageOutputs, float]] = {name: (run, tolerance) for name, run in runs.items()}
    return Checks(stages=stages, ran=dict.fromkeys(stages, graph.provider))


Pairs = Sequence[tuple[Tensor, Tensor]]
"""Outputs of the quantised graph and of the float graph."""

DISTANCES = {"fp16": 0.01, "int8": 0.1, "int4": 0.5}
"""Allowed distance of features, relative to their norm."""


def compare_logits(scheme: str, pairs: Pairs) -> Difference:
    """The divergence of the distributions, in nats."""
    apart = max(compute_token_divergence(*pair) for pair in pairs)
    return Difference(f"{scheme} logits", apart, apart, DIVERGENCES[scheme])


def compare_features(scheme: str, pairs: Pairs) -> Difference:
    """The distance of the features, relative to their norm."""
    apart = max(_compute_distance(*pair) for pair in pairs)
    return Difference(f"{scheme} features", apart, apart, DISTANCES[scheme])


USED = {"fp16": 0.01, "int8": 0.15, "int4": 0.15}
"""Allowed distance of a quantised graph's outputs, as it is used, from its own in one run without padding, relative to
their norm. A kernel for one token sums in another order than one for many, and the rounding of activations makes more
of it. SmolLM2-135M: at most 0.0005, 0.04 and 0.03. A mask that is ignored, or keys for values, give 0.5 and more."""


def use_apart(scheme: str, pairs: Sequence[tuple[Tensor | Placed, Tensor]]) -> Difference:
    """The distance of outputs at some positions from the outputs of whole samples, relative to their norm."""
    apart, whole = 0.0, 0.0
    for found, reference in pairs:
        for one, other in split_outputs(found, reference):
            apart += (one.double() - other.double()).square().sum().item()
            whole += other.double().square().sum().item()
    far = (apart / whole) ** 0.5 if whole else apart
    # NaN must not pass.
    far = far if far == far else float("inf")
    return Difference(f"{scheme} in use", far, far, USED[scheme])


def _compute_distance(found: Tensor, reference: Tensor) -> float:
    """‖f − f*‖ / ‖f*‖. NaN counts as infinite."""
    apart = ((found.double() - reference.double()).norm() / reference.double().norm()).item()
    return apart if apart == apart else float("inf")


# ---- samples of other sizes and values than the proof's own, drawn by a seed ----
#
# What a graph without a cache computes for a text depends on the whole text, so each length needs a run of the
# reference. The stages of a decoder run other sizes by themselves: a position's logits are the same however its text
# goes on.

OTHER_LENGTHS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 20, 31, 32, 33)
"""Tokens of a text: about powers of two, at which kernels and exporters change."""
MOST_ROWS = 9
"""Samples of a batch: one more than a power of two."""
TOKENS_TRIED = 96
"""Tokens of one batch, so that these cost little."""
TEXTS_TRIED = 4
"""Batches of texts."""
LARGEST = (6.0, 0.5, 16.0, 1.0, 64.0, 2.0, 255.0, 4.0, 0.0)
"""The largest value of each image of a batch: normalised ones, ones that a program forgot to normalise, a black one."""
DECODER = "decoder_"
"""What the names of inputs of a decoder start with: their lengths are another text's."""


def draw_texts(samples: Samples, seed: str) -> Iterator[Samples]:
    """Samples with other numbers of rows and of tokens; none if it is not clear which inputs belong to the tokens."""
    # An input with as many columns as the text, but other numbers than tokens, may belong to the tokens or not.
    read = {name for name, x in samples.inputs.items() if is_tokens(x) and not name.startswith(DECODER)}
    lengths = {samples.inputs[name].shape[1] for name in read}
    others = [x for name, x in samples.inputs.items() if name not in read and not name.startswith(DECODER)]
    if len(lengths) != 1 or samples.together is not None or any(x.shape[1:2] == (min(lengths),) for x in others):
        return
    draw = random.Random(seed)
    known = [length for length in OTHER_LENGTHS if length < min(lengths)]
    for length in draw.sample(known, min(TEXTS_TRIED, len(known))):
        count = draw.randint(1, min(MOST_ROWS, max(1, TOKENS_TRIED // length)))
        cut = {name: x[:, :length] if name in read else x for name, x in samples.inputs.items()}
        yield Samples(cut)[torch.arange(count) % len(samples)]


def draw_row_counts(samples: Samples, seed: str) -> Iterator[Samples]:
    """The samples, more of them at once."""
    if samples.together is None:
        yield samples[torch.arange(random.Random(seed).randint(4, MOST_ROWS)) % len(samples)]


def scale_pixels(samples: Samples) -> Samples:
    """Images whose values are smaller and larger than the samples' own: each row has another largest value."""
    pixels = samples.inputs[PIXELS].clone()
    for row, largest in zip(pixels, LARGEST, strict=False):
        row *= largest / max(float(row.abs().max()), torch.finfo(torch.float32).tiny)
    return Samples({**samples.inputs, PIXELS: pixels})
