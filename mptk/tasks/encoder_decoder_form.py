"""encoder_decoder_form: an encoder–decoder as ONNX: two graphs, divided at the encoder's last hidden state.

The whole is traced, analysed and cut as one program, so both parts follow the plan. The encoder's last hidden state is
no output meanwhile: the plan may cut its channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import TensorArgument
from transformers import PreTrainedModel

from mptk.config.settings import Settings
from mptk.errors import MptkError
from mptk.ir.passes import Log
from mptk.ir.plan import Plan
from mptk.ir.program import Program
from mptk.ir.samples import Samples
from mptk.ort.decoder import DECODER_FILE, ENCODER_FILE
from mptk.ort.sessions import OrtGraph
from mptk.progress import step
from mptk.protocols.onnx_form import Dense, OnnxForm
from mptk.protocols.values import PROOF_SHAPE, Checks
from mptk.tasks.exporting import (
    CHANGED,
    GraphRun,
    about,
    check_float,
    cut,
    logits_apart,
    quantised,
    stages_of,
    traced_as,
)
from mptk.tasks.inputs import inputs_of
from mptk.tasks.inputs.text import example_ids
from mptk.tasks.model_form import LOGITS
from mptk.tasks.padding import IDS, MASK, with_mask
from passes.frontend.trace import uncached
from passes.pipelines import emit_onnx
from passes.targets.onnx.emit import Interface
from passes.targets.onnx.extract import GraphPart
from passes.targets.onnx.names import quantized, scheme_of
from passes.verify import Difference, Placed

DECODER_IDS = "decoder_input_ids"
HIDDEN = "last_hidden_state"
DECODER_NAMES = {MASK: "encoder_attention_mask", DECODER_IDS: IDS, HIDDEN: "encoder_hidden_states"}
"""Name in the whole → optimum's name of the decoder's input, in the order of these inputs."""
TEXT_AXES = ("batch_size", "encoder_sequence_length")
DECODER_AXES = {
    "input_features": ("batch_size", "feature_size", "encoder_sequence_length"),
    DECODER_IDS: ("batch_size", "decoder_sequence_length"),
}


class WithHidden(nn.Module):
    """Calls an encoder–decoder with named tensors; returns its logits and its encoder's last hidden state."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, tuple(names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        output = self.module(**dict(zip(self.names, inputs, strict=True)), **uncached(self.module))
        return output.logits, output.encoder_last_hidden_state


class EncoderDecoderForm(OnnxForm):
    """``encoder_model.onnx`` and ``decoder_model.onnx``, which takes all tokens of the text so far."""

    graphs = (DECODER_FILE, ENCODER_FILE)

    def check(self, model: PreTrainedModel, settings: Settings) -> None:
        check_float(settings, "an encoder-decoder")

    def export(self, dense: Dense, plan: Plan | None, samples: Samples | None, folder: Path, log: Log) -> list[str]:
        model = dense.loaded.model
        example = {**inputs_of(model).example(model), DECODER_IDS: example_ids(length=5)}
        given = Samples(example) if samples is None else samples.shortened(*PROOF_SHAPE)
        traced, padding = traced_as(dense, WithHidden, example, given, lambda output, _: output)
        logits, hidden = output_names(traced.program)
        program = cut(with_outputs(traced.program, [logits]), dense, plan, log)
        program = with_outputs(program, [*output_names(program), hidden])
        step(0, 0, "translate the graph")
        read = [name for name in traced.names if name != DECODER_IDS]
        decoder = {name: new for name, new in DECODER_NAMES.items() if name in (*traced.names, HIDDEN)}
        emit_onnx(
            program,
            folder,
            Interface({name: DECODER_AXES.get(name, TEXT_AXES) for name in traced.names}, (LOGITS, HIDDEN)),
            parts={
                ENCODER_FILE: GraphPart({name: name for name in read}, (HIDDEN,)),
                DECODER_FILE: GraphPart(decoder, (LOGITS,)),
            },
            objective="prefill",
            metadata=about(dense, plan) | padding,
            log=log,
        )
        notes = quantised(dense, [folder / name for name in self.graphs], None, log)
        return notes + ([CHANGED] if IDS in traced.names and not padding else [])

    def stages(self, folder: Path, crossed: Sequence[int], device: torch.device, settings: Settings) -> Checks:
        run = both(folder / DECODER_FILE, device)
        steps = {"ONNX Runtime steps": partial(steps_of, run)}
        return stages_of(run, OrtGraph(folder / ENCODER_FILE), lambda output, _: output, steps)

    def outputs(self, file: Path, device: torch.device) -> Callable[[Samples], Tensor]:
        run = both(file, device)
        return lambda samples: run(with_mask(samples.inputs))

    def rounding(self, scheme: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Difference:
        return logits_apart(scheme, pairs)


def steps_of(run: GraphRun, samples: Samples) -> Placed:
    """The logits of the first token of a text by itself, and of the first half of the text."""
    ids = samples.inputs[DECODER_IDS]
    parts = [ids[:, :count] for count in sorted({1, (ids.shape[1] + 1) // 2})]
    found = [run(with_mask({**samples.inputs, DECODER_IDS: part})) for part in parts]
    return Placed(torch.cat(found, 1), torch.cat([torch.arange(part.shape[1]).expand_as(part) for part in parts], 1))


def both(file: Path, device: torch.device) -> GraphRun:
    """What the decoder in ``file`` and the encoder of its scheme compute together."""
    beside, scheme = file.with_name(ENCODER_FILE), scheme_of(file)
    encoder, decoder = OrtGraph(quantized(beside, scheme) if scheme else beside, device), OrtGraph(file, device)

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        made = dict(inputs) | {HIDDEN: encoder(inputs)}
        return decoder({new: made[name] for name, new in DECODER_NAMES.items() if name in made})

    return run


def output_names(program: Program) -> list[str]:
    """The names of the values that a program returns, in order."""
    return [node.name for node in program.graph.graph.output_node().args[0] if isinstance(node, fx.Node)]  # type: ignore[union-attr]


def with_outputs(program: Program, names: Sequence[str]) -> Program:
    """``program`` with the values of these names as its outputs.

    What an analysis may cut depends on the outputs, and passes keep the names of values. So a value can be taken from
    the outputs for an analysis, and be made an output again after the cut.

    Raises:
        MptkError: there is no such value.
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
