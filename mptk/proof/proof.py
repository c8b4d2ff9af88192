"""proof: prove a pruned folder, stage by stage, and make the samples on which outputs are compared.

What everything must equal is the dense model with masks in place of the removed units. The stages are in the order in
which a user of the folder would notice a fault: config, weights, then the outputs of each conversion, of the rewritten
graph, of the reloaded checkpoint and of ONNX Runtime. A stage that takes long runs only if all before it hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mptk.compat.torch import tree_leaves
from mptk.compile.trace import trace_as_example
from mptk.config import Settings
from mptk.cost.estimate import Pass
from mptk.cost.fixed import PROVE_S
from mptk.errors import MptkError, ProofError
from mptk.io import measure_free_memory
from mptk.ir import Analysis, CallSizes, Cut, Log, Program, Samples, build_renumbering, is_tokens, transfer_cut
from mptk.protocols import (
    LONG,
    PROOF_SHAPE,
    Compiled,
    Extra,
    Further,
    Proven,
    Target,
    Witness,
    describe_left_out,
    shorten_samples,
)
from mptk.staged.staged import Executor
from passes.analysis import group
from passes.analysis.borders import MARGIN, Reach, find_config_borders, reach
from passes.check_cut import replace_faint_weights
from passes.frontend.eager import resize_tensor
from passes.pipelines import cut_program
from passes.transforms.masked_reference import mask
from passes.verify import TOLERANCE, Difference, StageOutputs, compare_outputs, prove

MOST_CONDITIONS = 8
"""Conditions whose sides are tried: a loop over a size makes one in each round."""
GRADIENT_TOLERANCE = 1e-3
"""Largest difference of a gradient, relative to the largest of all: a backward pass sums more than a forward pass."""
GRADIENT_STAGE = "gradients"


def estimate_proof(settings: Settings, long: bool) -> dict[str, Pass]:
    """The cost of a proof. ``long``: whether a border makes its long sequence as long as allowed."""
    # Each token runs through three programs (masked, rewritten, reloaded), and each reads all weights.
    tokens = PROOF_SHAPE[0] * PROOF_SHAPE[1] + (settings.proof_length if long else min(LONG, settings.proof_length))
    return {"prove": Pass(3 * tokens, settings.length, reads=3, exact=True, fixed=PROVE_S)}


def prove_folder(
    compiled: Compiled,
    targets: Sequence[Target],
    folder: Path,
    samples: Samples,
    *,
    whole: bool = True,
    again: bool = False,
) -> Proven:
    """The difference at every stage: of the cut program, and of each target's files in ``folder``.

    ``samples``: the proof's batches are made from them (``make_proof_batches``). ``whole``: whether a wrong optional
    file is an error; if not, it is removed. ``again``: whether another process wrote the folder; then it is also
    compared with what is written anew.

    Raises:
        MptkError: the config is wrong; the folder cannot be loaded; or ``whole``, and an optional file is wrong.
    """
    # The samples: a short batch, one that crosses the model's windows, and those that only some targets need.
    task, program = compiled.prepared.task, compiled.prepared.analysis.program
    sequences = task.sequences and any(map(is_tokens, samples.tensors))
    longer = sequences and task.find_fixed_length(program) is None
    reached = find_reach(compiled) if longer else Reach(find_windows(compiled, samples), (), 0)
    batches = [b for b in make_proof_batches(samples, reached.length, sequences) if sequences or _takes(program, b)]
    checks = [target.make_checks(compiled, folder, reached.borders) for target in targets]
    others = make_further_batches(compiled, batches[0], bool(longer))
    # What is compared without a run comes first: configs, files beside them, stored weights.
    run_all = partial(prove, executor=compiled.prepared.executor)
    rewritten: dict[str, tuple[Program | StageOutputs, float]] = {"rewritten graph": (compiled.exact, TOLERANCE)}
    written: dict[str, tuple[Program | StageOutputs, float]] = {}
    for check in checks:
        written |= check.stages
    found = [d for check in checks for d in check.exact]
    for each in compiled.prepared.conversions:
        one, other = each.make_equal_pair(compiled.prepared.executor)
        found += run_all(one, {each.stage: (other, TOLERANCE)}, *batches)
    # Then the outputs, all stages in one call: the masked model, which may run from disk, runs once for them all.
    if compiled.program is compiled.exact:
        found += run_all(compiled.masked, rewritten | written, *batches, *others)
    else:
        # The cut folded norms into weights, which were then rounded to the stored type. That rounding may exceed the
        # tolerance, so two steps prove it: the exact program equals the mask, what is written equals the rounded one.
        found += run_all(compiled.masked, rewritten, *batches) + run_all(compiled.program, written, *batches, *others)
    # Cases in which the comparisons above could hold although something is wrong.
    if all(d.ok for d in found):
        found += _prove_behind_zeros(compiled, batches[0])
    if all(d.ok for d in found):
        cases = task.make_further(compiled.prepared.loaded.model, batches[0])
        found += prove_further(compiled, {name: each for c in checks for name, each in c.further.items()}, cases)
    # A written graph stands in for the module: it must refuse the sizes that the module refuses, and train like it.
    if all(d.ok for d in found) and not compiled.prepared.target.classed and not sequences:
        found += prove_sides(compiled, written, batches[0])
        for run, _ in written.values():
            found += prove_gradients(compiled, run, batches[0]) if isinstance(run, Program) else []
    # Last, if all else holds: parts that may differ by rounding, what only ``verify`` compares, optional files.
    ran = {stage: provider for check in checks for stage, provider in check.ran.items()}
    found = [replace(d, ran=ran.get(d.stage, d.ran)) for d in found]
    if all(d.ok for d in found):
        found += [d for target in targets for d in target.compare_rounded(compiled, folder, batches)]
    notes: list[str] = []
    said = [reached.note]
    if again and all(d.ok for d in found):
        said += [target.compare_remade(compiled, folder, batches) for target in targets]
    if all(d.ok for d in found):
        extras = [extra for target in targets for extra in target.list_extras(compiled, folder, batches)]
        more, notes = prove_extras(extras, whole)
        found += more
    if notes:  # a removed file is no longer named in the config, so the config is checked again
        for target in targets:
            target.make_checks(compiled, folder, reached.borders)
    return Proven(tuple(found), max(map(_measure_length, batches)), "; ".join(filter(None, said)), tuple(notes))


def prove_extras(extras: Sequence[Extra], whole: bool) -> tuple[list[Difference], list[str]]:
    """The differences of optional files, and notes on files that failed and were removed.

    Raises:
        ProofError: ``whole``, and a file failed.
    """
    found, notes = list[Difference](), list[str]()
    for extra in extras:
        try:
            differences = extra.check()
            check_proof(differences, "prune again without it")
        except ProofError as error:
            if whole:
                raise
            extra.remove()  # without it the folder is whole and proven
            notes.append(describe_left_out(extra.name, error))
        else:
            found += differences
    return found, notes


def _prove_behind_zeros(compiled: Compiled, batch: Samples) -> list[Difference]:
    """If the cut moves no output of the dense model, the difference with random numbers in place of the zeros in it.

    A head of zeros (an untrained vision transformer's) gives zeros whatever the cut did before it, so the other stages
    see nothing.
    """
    cut, dense, executor = compiled.chosen.cut, compiled.prepared.analysis, compiled.prepared.executor
    woken = replace_faint_weights(compiled.analysis) if cut.removes else None
    if woken is None:
        return []
    (moved,) = prove(dense.program, {"mask": (compiled.masked, TOLERANCE)}, batch, executor=executor)
    if moved.relative > TOLERANCE:  # the cut is visible in the outputs, so the other stages saw it
        return []
    stage = {"random in place of zeros": (cut_program(woken, cut, Log()).exact, TOLERANCE)}
    return prove(mask(woken, cut), stage, batch, executor=executor)


def find_reach(compiled: Compiled) -> Reach:
    """The tokens that the proof needs to cross the borders of the graph, of the dense config and of the written one."""
    written = [] if compiled.written is None else [compiled.written.stock.config]
    prepared = compiled.prepared
    # The written config counts, too: another class may have windows of its own.
    configs = [prepared.loaded.model.config, *written]  # a module with sequences is a transformers model
    return reach(compiled.analysis.program, *configs, bound=prepared.settings.proof_length, least=LONG)


def find_windows(compiled: Compiled, samples: Samples) -> tuple[int, ...]:
    """The borders in a text model's config that these samples, which cannot be made longer, cross with some padding."""
    model, length = compiled.prepared.loaded.model, _measure_length(samples)
    if not isinstance(model, PreTrainedModel):
        return ()
    found = find_config_borders(model.config.get_text_config().to_dict())
    return tuple(sorted({border for border in found if 1 < border < length + MARGIN}))


def make_proof_batches(samples: Samples, length: int = 0, sequences: bool = True) -> list[Samples]:
    """The short batch of ``samples``, and one sample; if ``length`` is not 0, the sample has that many tokens.

    One sample alone is a batch of its own: graphs that are wrong only at one row exist. If a program takes samples only
    together, they are one batch.
    """
    first = shorten_samples(samples, sequences)
    if samples.together is not None:
        return [first]
    if length <= _measure_length(first):
        return [first, first[:1]]

    # The samples' own tokens, one after another and again from the first: real text, longer than any of the samples.
    def repeat_tokens(tensor: Tensor) -> Tensor:
        flat = tensor.flatten()
        return flat.repeat(-(-length // len(flat)))[None, :length] if is_tokens(tensor) else tensor[:1]

    return [first, Samples({name: repeat_tokens(tensor) for name, tensor in samples.inputs.items()})]


def make_further_batches(compiled: Compiled, short_batch: Samples, longer: bool) -> list[Samples]:
    """Batches of other sizes and values, for the target's stages, if the model is written as ONNX.

    ``longer``: whether the model takes any length.
    """
    prepared = compiled.prepared
    if prepared.task.onnx is None or not prepared.settings.onnx:
        return []
    found = prepared.task.onnx.draw(short_batch, compiled.chosen.plan.digest, longer)
    return [batch for batch in found if _takes(prepared.analysis.program, batch)]


def _takes(program: Program, samples: Samples) -> bool:
    """Whether a program takes samples of these sizes; some take no single sample."""
    try:
        program.sizes.check([tensor.shape for tensor in samples.tensors])
    except MptkError:
        return False
    return True


def _measure_length(samples: Samples) -> int:
    """Tokens of the longest input; 0 if there are no token ids."""
    return max((tensor.shape[1] for tensor in samples.tensors if is_tokens(tensor)), default=0)


def check_witness(analysis: Analysis, cut: Cut, witness: Witness, batch: Samples, executor: Executor) -> Difference:
    """Compare the adopted weights with the trained model, by the outputs that the trained model gave.

    ``analysis``: of the dense model with the adopted weights. ``cut``: the units that the plan keeps.

    Raises:
        ProofError: they differ by more than the witness allows.
    """
    stages = {witness.stage: (lambda _: witness.outputs, witness.tolerance)}
    (found,) = prove(mask(analysis, cut), stages, batch, executor=executor)
    check_proof([found], "nothing was published. Please report this model")
    return found


def check_proof(proof: Sequence[Difference], remedy: str) -> None:
    """Raise ProofError for the first stage above its tolerance, with the remedy."""
    for d in proof:
        if d.failure:
            raise ProofError(f"the proof fails at '{d.stage}': it does not run ({d.failure}); {remedy}", name=d.stage)
        if not d.ok:
            what = "weights differ" if d.stage == "stored weights" else "outputs differ"
            raise ProofError(
                f"the proof fails at '{d.stage}': {what} by {d.max_abs:.2g} ({d.relative:.1e} of the largest, "
                f"tolerance {d.tolerance:.0e}); {remedy}",
                name=d.stage,
            )


def prove_further(compiled: Compiled, written: Mapping[str, Further], cases: Mapping[str, Samples]) -> list[Difference]:
    """The difference of what was written from the masked dense model on each of ``cases`` that it takes.

    Other inputs (an image beside the text) need a trace of their own. The cut is the same: its axes are found again
    through the weights, which both programs have.

    ``written``, ``cases``: start and end of a stage's name → what is run, and samples of other inputs than the run's.
    """
    prepared = compiled.prepared
    found: list[Difference] = []
    for case, samples in cases.items():
        runs = {f"{name} {case}": each for name, each in written.items() if each.takes(samples)}
        if not runs:
            continue
        # The dense model anew, for these inputs; its weights with the choice's changes; the same cut as masks.
        program = trace_as_example(prepared.loaded, prepared.task, samples)
        analysis = group.analyze_program(program.with_state(compiled.analysis.program.collect_module_state()))
        masked = mask(analysis, transfer_cut(compiled.chosen.cut, compiled.analysis, analysis))
        stages = {stage: (each.run, each.tolerance) for stage, each in runs.items()}
        differences = prove(masked, stages, samples, executor=prepared.executor)
        found += [replace(d, ran=runs[d.stage].ran) for d in differences]
    return found


# ---- sizes on both sides of each condition ----


def prove_sides(
    compiled: Compiled, written: Mapping[str, tuple[Program | StageOutputs, float]], samples: Samples
) -> list[Difference]:
    """The differences of what was written, at sizes on both sides of each condition of the program.

    A trace holds only for sizes that meet its conditions: there the written graph must compute the same, and elsewhere
    it must refuse. ``written``: stage → what is run, and its tolerance. ``samples``: inputs that meet all conditions.
    """
    sizes: CallSizes = compiled.prepared.analysis.program.sizes
    found = list[Difference]()
    for sides in sizes.find_sides(sizes.find_values([tensor.shape for tensor in samples.tensors]))[:MOST_CONDITIONS]:
        said = sizes.describe_condition(sides.condition)
        if sides.met is not None and _can_compute(
            compiled.masked, there := _resize_samples(samples, sizes.compute_shapes(sides.met))
        ):
            stages = {f"{stage} at other sizes": each for stage, each in written.items()}
            found += prove(compiled.masked, stages, there, executor=compiled.prepared.executor)
        # No output is right at refused sizes, so whatever runs there fails.
        if sides.unmet is not None:
            there = _resize_samples(samples, sizes.compute_shapes(sides.unmet))
            found += [
                Difference(f"{stage} at refused sizes", math.inf, math.inf, tolerance, failure=f"it ran, but {said}")
                for stage, (run, tolerance) in written.items()
                if _can_run(run, there)
            ]
    # One row for each stage: the report lists stages, not conditions.
    worst = dict[str, Difference]()
    for each in found:
        if each.stage not in worst or each.relative > worst[each.stage].relative:
            worst[each.stage] = each
    return list(worst.values())


def _resize_samples(samples: Samples, shapes: Sequence[Sequence[int]]) -> Samples:
    sized: dict[str, Tensor] = {
        name: resize_tensor(tensor, shape) for (name, tensor), shape in zip(samples.inputs.items(), shapes, strict=True)
    }
    return Samples(sized)


@torch.no_grad()
def _can_compute(masked: Program, samples: Samples) -> bool:
    """Whether the reference itself runs on these samples; it may fail at sizes that meet all conditions."""
    try:
        masked(*samples.tensors)
    except Exception:  # noqa: BLE001 (an op may raise anything)
        return False
    return True


def _can_run(run: Program | StageOutputs, samples: Samples) -> bool:
    try:
        if isinstance(run, Program):
            run.sizes.check([tensor.shape for tensor in samples.tensors])
        else:
            run(samples)
    except Exception:  # noqa: BLE001 (each runtime has errors of its own)
        return False
    return True


# ---- gradients ----


def prove_gradients(compiled: Compiled, written: Program, samples: Samples) -> list[Difference]:
    """The difference of the gradients of ``written``, the cut program as it was read back, from the masked program's.

    Equal outputs do not show that a graph trains alike: a call may stop gradients. Empty if nothing can be compared: no
    weight is trained; the cut scales norms, so their weights have other gradients; or two sets of gradients do not fit
    in memory.
    """
    masked, analysis, cut = compiled.masked, compiled.analysis, compiled.chosen.cut
    # A weight's name in the masked program, in which removed blocks still count → its name in the cut one.
    new = build_renumbering(analysis, cut).find_new
    used = {name: new(name) for name in masked.parameters if name in analysis.weights}
    trained = {
        name: small
        for name, small in used.items()
        if small is not None
        and small in written.state
        and name not in masked.frozen
        and masked.state.find_like(name).is_floating_point()
    }
    # Weights and gradients of two programs.
    bytes_needed = 4 * sum(masked.state.find_like(name).nbytes for name in trained)
    if (
        not trained
        or compiled.program is not compiled.exact
        or compiled.epsilons
        or bytes_needed > measure_free_memory() / 2
    ):
        return []
    sample = samples if samples.together is not None else samples[:2]
    if compiled.program.types is not None:  # these programs compute in one type
        wide = compiled.program.types.wide
        sample = sample.map(lambda tensor: tensor.to(wide) if tensor.is_floating_point() else tensor)
    expected, found = run_backward(masked, [*trained], sample), cut_gradients(written, [*trained.values()], sample)
    pairs = [(found[small], cut.slice(expected[name], analysis.weights[name])) for name, small in trained.items()]
    # One comparison of all gradients, so that a weight with tiny gradients does not fail by noise.
    one, other = (torch.cat([pair[i].flatten() for pair in pairs])[None, None] for i in (0, 1))
    return [compare_outputs(GRADIENT_STAGE, one, other, GRADIENT_TOLERANCE)]


def cut_gradients(program: Program, trained: list[str], samples: Samples) -> Mapping[str, Tensor]:
    """The gradients of the cut program: a function of its own, so that a test can spoil only these."""
    return run_backward(program, trained, samples)


def run_backward(program: Program, trained: list[str], samples: Samples) -> Mapping[str, Tensor]:
    """The gradients of a random projection of all outputs by the weights ``trained``; 0 if a weight gets none.

    A random projection is a loss that no output drops out of. Its numbers have a fixed seed, so both programs have the
    same loss.
    """
    leaves = {name: program.state[name].detach().clone().requires_grad_() for name in trained}
    with torch.enable_grad():
        outputs = [t for t in tree_leaves(program.with_state(leaves)(*samples.tensors)) if isinstance(t, Tensor)]
        generator = torch.Generator().manual_seed(0)
        losses = [  # ``.real``: a complex output has no loss of its own
            (output * torch.randn(output.shape, generator=generator)).real.sum()
            for output in outputs
            if output.requires_grad
        ]
        if losses:
            torch.stack(losses).sum().backward()
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
