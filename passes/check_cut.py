"""check_cut: compare a cut program with the masked one on seeded inputs. ``mptk.rewrite`` proves its result with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from mptk.compat.torch import tree_leaves
from mptk.errors import ModelError, ProofError
from mptk.ir import Analysis, Cut, Program, resolve_shape
from passes.analysis.vocabulary import find_tables
from passes.frontend.eager import check_steady
from passes.transforms.masked_reference import mask
from passes.transforms.weight_types import Retype, RoundWeights
from passes.verify import ROUNDINGS, TOLERANCE, WIDEST

FAINT_WEIGHT = 1e-4
"""A parameter without a larger number may hide all that is before it: a head of zeros, a layer's scale of 1e-6."""
COARSE = (torch.float16, torch.bfloat16)
"""Types whose rounding alone is above ``TOLERANCE``: programs are compared in a finer one."""


class Unmoved(ModelError):
    """Nothing is proven: the mask does not move the outputs."""


@torch.no_grad()
def check_cut(analysis: Analysis, cut: Cut, stages: Mapping[str, Program]) -> None:
    """Compare the program after each of ``stages`` with the masked one, on seeded inputs of the traced shapes.

    Raises:
        ProofError: outputs differ at a stage. The message names the stage and the difference.
        Unmoved: nothing is proven, because the mask moves the outputs no further than rounding does.
        MptkError: nothing is proven, because mere rounding moves them as far as the difference found.
    """
    # Run the masked program and every stage, all in a fine type. Caches are masked and cut like weights.
    inputs = draw_seeded_inputs(analysis.program)
    masked, dense = _refine_program(mask(analysis, cut)), _refine_program(analysis.program)
    caches = {node: analysis.facts.dims(node) for node in analysis.facts.caches}
    whole = [t * cut.mask_tensor(caches[node]) if node in caches else t for node, t in inputs.items()]
    small = [cut.slice(t, caches[node]) if node in caches else t for node, t in inputs.items()]
    expected = _run_flat(masked, whole)
    reference = _cut_outputs(analysis, cut, expected)
    found = {stage: _measure_difference(_run_flat(_refine_program(p), small), reference) for stage, p in stages.items()}
    # If one differs: the module may not give the same each time, or rounding alone may move it as far.
    tolerance, own = TOLERANCE, 0.0
    if not all(apart <= tolerance for apart in found.values()):
        check_steady(analysis.program, lambda given: analysis.program(*given), [*inputs.values()], "the module")
        own = _measure_difference(_run_flat(RoundWeights()(masked).program, whole), expected)
        tolerance = max(tolerance, min(ROUNDINGS * own, WIDEST))
    # Between the widest tolerance and the drift of rounding, nothing can be said. Above both, the cut is wrong.
    for stage, apart in found.items():
        if tolerance < apart <= ROUNDINGS * own:
            raise ModelError(
                f"nothing is proven: rounding alone moves the masked program's outputs by {own:.1e} of the largest, "
                f"and the cut one differs by {apart:.1e}; pass check=False and compare on inputs of your own"
            )
        if not apart <= tolerance:
            raise ProofError(
                f"the proof fails at '{stage}': outputs of the cut and the masked program differ by {apart:.1e} of the "
                f"largest (tolerance {tolerance:.0e}); please report this model",
                name=stage,
            )
    # Equal outputs prove something only if the mask moves them: units before a head of zeros could be cut in any way.
    moved = _measure_difference(_run_flat(dense, inputs.values()), expected)
    if moved <= tolerance and cut.removes:
        raise Unmoved(
            f"nothing is proven: masking the units moves the outputs by {moved:.1e} of the largest on random inputs; "
            "if they are dead, pass check=False"
        )


def replace_faint_weights(analysis: Analysis) -> Analysis | None:
    """The analysis with random numbers in place of parameters that hide a mask; None if it has none of them."""
    state, generator = analysis.program.state, torch.Generator().manual_seed(0)
    floats = (
        n for n in analysis.program.parameters if state.find_like(n).is_floating_point() and state.find_like(n).numel()
    )
    faint = [n for n in floats if state[n].abs().max().item() <= FAINT_WEIGHT]
    woken = {n: _draw_like(state[n], generator) for n in faint}
    return analysis.with_weights(woken) if woken else None


def _draw_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers of the size that a weight has at the start of training."""
    fan_in = like[0].numel() if like.ndim > 1 else 1
    found: Tensor = torch.randn(like.shape, generator=generator) / fan_in**0.5
    return found.to(like)


def refine_weight_types(analysis: Analysis) -> Analysis:
    """The analysis with float16 and bfloat16 weights in float32, so that folding adds no rounding error to the cut.

    If the program has float64 values, they become float64.
    """
    state, wide = analysis.program.state, _choose_wide_type(analysis.program)
    coarse = [name for name, like in state.likes.items() if like.dtype in COARSE]
    fine = state.with_edits(dict.fromkeys(coarse, partial(Tensor.to, dtype=wide)))
    return analysis.with_weights(fine)


def _refine_program(program: Program) -> Program:
    """The program in float32 or float64, if any of its values has a coarser type."""
    return Retype(_choose_wide_type(program))(program).program if _find_value_types(program) & {*COARSE} else program


def _find_value_types(program: Program) -> set[torch.dtype]:
    values = (node.meta.get("val") for node in program.graph.graph.nodes)
    return {value.dtype for value in values if isinstance(value, Tensor)}


def _choose_wide_type(program: Program) -> torch.dtype:
    """float64 if a value of the traced program has that type, else float32."""
    return torch.float64 if torch.float64 in _find_value_types(program) else torch.float32


def draw_seeded_inputs(program: Program) -> dict[fx.Node, Tensor]:
    """Inputs of the traced shapes: normal floats, ids below the size of the table they index, all others as traced."""
    generator = torch.Generator().manual_seed(0)
    traced = iter(t for t in tree_leaves(program.exported.example_inputs) if isinstance(t, Tensor))
    user, types = set(program.user_inputs), _find_value_types(program)
    wide = _choose_wide_type(program) if types & {*COARSE} else torch.float32
    inputs = {}
    for node in program.list_placeholders():
        if node.name in user:
            inputs[node] = _draw_input(node, next(traced), generator, wide)
    return inputs


def _draw_input(node: fx.Node, traced: Tensor, generator: torch.Generator, wide: torch.dtype) -> Tensor:
    value = node.meta["val"]
    shape = resolve_shape(value)
    # Ids must be in their table. Other integers (masks, positions) stay as traced: random ones may mean nothing.
    if value.is_floating_point():
        return torch.randn(shape, generator=generator).to(value.device, torch.promote_types(value.dtype, wide))
    bound = find_table_size(node)
    return traced if bound is None else torch.randint(bound, shape, generator=generator, dtype=value.dtype)


def find_table_size(node: fx.Node) -> int | None:
    """The size of the smallest table that the value indexes, also through views; None if it indexes no table."""
    return min((resolve_shape(table.meta["val"])[0] for table in find_tables(node)), default=None)


def _cut_outputs(analysis: Analysis, cut: Cut, outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs expected of the cut program: the masked one's, and caches without their removed channels."""
    caches = set(analysis.facts.caches.values())
    nodes = tree_leaves(analysis.program.graph.graph.output_node().args[0])
    return [cut.slice(t, analysis.facts.dims(n)) if n in caches else t for n, t in zip(nodes, outputs, strict=True)]


def _run_flat(program: Program, inputs: Iterable[Tensor]) -> list[Tensor]:
    """The program's outputs, flat. Inputs are copied, since the program may write to them."""
    return [t for t in tree_leaves(program(*(t.clone() for t in inputs))) if isinstance(t, Tensor)]


def _measure_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of any output, relative to its largest finite value; infinite for NaN or another shape."""
    return max(_compute_relative(*pair) for pair in zip(found, expected, strict=True))


def _compute_relative(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    if not found.numel():
        return 0.0
    found, expected = found.double(), expected.double()
    # Equal infinities would give NaN as a difference.
    apart = torch.where(found == expected, 0.0, found - expected).abs().max().item()
    finite = expected[torch.isfinite(expected)]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    if apart != apart:  # NaN
        return float("inf")
    return apart / largest if largest else apart
