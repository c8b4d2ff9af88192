"""cut: from a choice to the cut program and the form in which the target holds it.

Below are the weights with which that begins or ends: changed by training or by FLAP's biases, read from a pruned
folder, with zeros in place of removed units, or scattered back to the dense shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mptk.errors import FileError
from mptk.io import Resident, load_tensors, models
from mptk.ir import Analysis, Cut, Dims, Lazy, ProgramModule, Samples, Weights, build_renumbering, join_outputs
from mptk.protocols import Chosen, Compiled, Context, Prepared, Report, list_stages
from mptk.reading import make_damage_error
from mptk.targets.graph import WEIGHTS, GraphTarget
from mptk.trust import Trust
from passes.pipelines import cut_program
from passes.transforms.masked_reference import keep_along
from passes.transforms.weight_types import Store

COMPENSATION = "compensation.safetensors"
"""A folder's file of corrected biases (FLAP), which do not follow from the dense model and the plan."""
DENSE_POSITIONS = 2048
"""Positions in a batch of the dense model, to bound the memory that its outputs take."""


def apply_choice(prepared: Prepared, chosen: Chosen) -> Analysis:
    """The analysis over the dense weights with the choice's changes."""
    return prepared.analysis.with_weights(chosen.changes)


def cut_to(prepared: Prepared, chosen: Chosen, context: Context) -> Compiled:
    """The program cut to the plan, still without ``written``."""
    analysis = apply_choice(prepared, chosen)
    # Rounded before the cut: the masked reference then has exactly the numbers that the folder will hold.
    analysis = replace(analysis, program=Store(prepared.dtype).run(analysis.program).program)
    pruned = cut_program(analysis, chosen.cut, context.log, prepared.dtype)
    return Compiled(prepared, chosen, analysis, pruned.program, pruned.exact, pruned.epsilons)


def cut_to_form(prepared: Prepared, chosen: Chosen, samples: Samples, context: Context) -> Compiled:
    """Cut the program to the plan and find the form in which the target holds it."""
    compiled = cut_to(prepared, chosen, context)
    return replace(compiled, written=prepared.target.fit(compiled, samples[:1]))


def compile_plan(prepared: Prepared, chosen: Chosen, samples: Samples, context: Context) -> Compiled:
    """Cut the model to the plan, with all that is written beside it."""
    compiled = cut_to_form(prepared, chosen, samples, context)
    for stage in list_stages():
        compiled = stage.complete(compiled)
    return compiled


def build_small_model(compiled: Compiled, weights: Mapping[str, Tensor], *, shared: bool = False) -> nn.Module:
    """The cut model in float32 for training: as its transformers class; for the graph target, as the graph's module.

    Training changes all of its parameters except those that its class freezes. Marian's class, for example, computes
    its positions and does not save them. ``weights``: its state dict; may be empty if a class holds it. ``shared``:
    whether a class may use these tensors without a copy.
    """
    if compiled.written is not None:
        return compiled.written.stock.build(weights, shared=shared)
    # A caller's module may be frozen because it was only to be run.
    return ProgramModule(compiled.program.with_state(weights)).requires_grad_(True)


# ---- weights that training or a pruned folder replaces ----


def find_changes(analysis: Analysis, cut: Cut, folder: Path, report: Report, trust: Trust) -> Mapping[str, Tensor]:
    """The weights in which the folder differs from a cut of the dense model: trained weights, or FLAP's biases.

    Raises:
        MptkError: the folder's file of biases holds other weights; or its weights cannot be loaded, or have other names
            or shapes than the cut.
    """
    state = analysis.program.state
    # FLAP's biases lie in a file of their own, under their dense names and in their dense shapes.
    if (folder / COMPENSATION).is_file():
        biases = load_tensors(folder / COMPENSATION, make_damage_error(folder / COMPENSATION))
        for name, bias in biases.items():
            if name not in state or bias.ndim != 1 or bias.shape != state.find_like(name).shape:
                raise FileError(
                    f"{COMPENSATION} holds {name}, which is not a bias of the model; "
                    "do not use it, and prune the model again",
                    name=COMPENSATION,
                )
        return biases
    if not report.trained:  # every weight is a cut of a dense one
        return {}
    # Trained weights are the checkpoint itself. A cut renumbers layers and experts, so its names are translated.
    new, small = build_renumbering(analysis, cut).find_new, open_pruned_weights(folder, trust)
    names = {name: there for name in report.trained if (there := new(name)) is not None}
    for name, there in names.items():
        shape = tuple(cut.size(term) for term in analysis.weights[name])
        if there not in small or small.find_like(there).shape != shape:
            raise FileError(
                f"{folder} does not hold {there} of shape {shape}; do not use it, and prune the model again",
                name=folder,
            )
    return widen_weights(analysis, cut, small.select_names(names))


def open_pruned_weights(folder: Path, trust: Trust) -> Weights:
    """The weights in a pruned folder, by name, of a checkpoint or of a graph."""
    if GraphTarget().has_written(folder):
        return Weights(load_tensors(folder / WEIGHTS, make_damage_error(folder / WEIGHTS)))
    small = models.open_weights(str(folder), Resident(0), trust=trust).weights
    assert small is not None
    return small


def without(analysis: Analysis, cut: Cut) -> Weights:
    """The weights that a cut touches, with zeros at the removed positions, made on demand.

    They compute what the masked program computes (``masked_reference``) unless zeros disturb a reduction.
    """
    state, weights = analysis.program.state, analysis.program.weights
    # A weight by which something is divided keeps its numbers: a zero would give infinity.
    divide = {weights.get(node.name) for node in analysis.facts.divisors}
    held = [name for name in analysis.weights if name in state and state.find_like(name).is_floating_point()]
    edits = {}
    for name in held:
        dims = analysis.weights[name]
        touched = [d for d, term in enumerate(dims) if cut.has_choice(term)]
        if touched and name not in divide:
            edits[name] = partial(_zero_removed, cut, dims, touched)
    return state.select_names({name: name for name in edits}).with_edits(edits)


def _zero_removed(cut: Cut, dims: Dims, touched: Sequence[int], weight: Tensor) -> Tensor:
    return weight * keep_along(cut, dims, touched).to(weight.device)


def widen_weights(analysis: Analysis, cut: Cut, small: Weights) -> Weights:
    """The dense weights with a cut model's weights at the positions that stay. ``small``: under the dense names."""
    state = analysis.program.state

    def widen(name: str) -> Tensor:
        return cut.scatter(state[name], small[name], analysis.weights[name])

    return Weights({name: Lazy(state.find_like(name).to("meta"), partial(widen, name)) for name in small})


# ---- the dense model's outputs ----


def with_dense_outputs(prepared: Prepared, samples: Samples) -> Samples:
    """``samples`` with the dense model's outputs as targets, for losses that compare outputs."""
    batches, program = samples.make_batches(DENSE_POSITIONS), prepared.reference
    found = prepared.executor.run_programs([program], [batch.tensors for batch in batches])
    targets = torch.cat([(output if isinstance(output, Tensor) else join_outputs(output)).cpu() for output in found])
    return replace(samples, targets=targets)
