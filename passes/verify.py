"""verify: the proof. Compares each stage's outputs with the masked dense model's on real samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from mptk.errors import MptkError, find_exhaustion
from mptk.ir import Program, Samples
from mptk.progress import step_through
from mptk.staged.staged import EXECUTOR, Executor
from passes.transforms.weight_types import RoundWeights

StageOutputs = Callable[[Samples], "Tensor | Sequence[Tensor] | Placed"]
"""Samples → outputs of all samples and positions; or of some. As many outputs as the program has."""

TOLERANCE = 5e-5
"""Largest difference of the logits of two torch programs in float32, relative to the largest logit."""
RUNTIME_TOLERANCE = 1e-4
"""The same for another runtime: its kernels sum in another order."""
HALF_TOLERANCE = 0.05
"""The same if half precision computes. In a float16 graph, rounded activations move SmolLM2-135M's logits by 0.009 of
the largest. The weights and the divergence of the logits are checked, too."""
ROUNDINGS = 10
"""If the masked model is ill-conditioned, for example after a cut that ruins it, allow ROUNDINGS × its own rounding
drift: how far its logits move if each weight gets a rounding error."""
POSITIONS_AT_ONCE = 64
"""Positions of a sequence that are compared at once: logits are large."""
WIDEST = 1e-3
"""Upper bound of every tolerance, however ill-conditioned the model is."""


@dataclass(frozen=True)
class Placed:
    """Outputs at some positions: [rows, n, …].

    ``places``: the position of each in its sample, int64 [rows, n]; -1: it is at padding, and may be anything.
    ``of``: the sample of each row, int64 [rows]; None: the first samples.
    """

    outputs: Tensor
    places: Tensor
    of: Tensor | None = None


@dataclass(frozen=True)
class Difference:
    """The difference between a stage and the masked dense model.

    Attributes:
        max_abs: the largest difference of a logit.
        relative: ``max_abs`` relative to the largest logit.
        widened: the reason, if the tolerance is wider than the stage's own.
        failure: the reason, if the stage gave no logits.
        ran: the execution provider of ONNX Runtime that ran the stage, if one did.
    """

    stage: str
    max_abs: float
    relative: float
    tolerance: float
    widened: str = ""
    failure: str = ""
    ran: str = ""

    @property
    def ok(self) -> bool:
        return self.relative <= self.tolerance

    def to_dict(self) -> dict[str, object]:
        said = {k: v for k, v in asdict(self).items() if k not in ("widened", "failure", "ran") or v}
        return said | {"ok": self.ok}


def prove(
    masked: Program,
    stages: Mapping[str, tuple[Program | StageOutputs, float]],
    *batches: Samples,
    executor: Executor = EXECUTOR,
) -> list[Difference]:
    """Compare every stage with the masked dense model.

    Args:
        masked: the dense model with masks.
        stages: name → (program or outputs function, tolerance). Programs run beside the masked one.
        batches: real samples.
        executor: runs the programs.

    Returns:
        Each stage's largest difference over the batches. If a stage is above its tolerance, tolerances are widened by
        the model's own rounding drift. The difference of a stage that fails is infinite.
    """
    with torch.no_grad():
        # The rounding drift costs another run of the masked program, so it is measured only if a stage needs it.
        found = _compare_stages(masked, stages, batches, executor)
        if all(d.ok for d in found):
            return found
        jittered = RoundWeights()(masked).program
        (own,) = _compare_stages(masked, {"rounding": (jittered, WIDEST)}, batches, executor)
    return [widen(d, own.relative) for d in found]


def _compare_stages(
    masked: Program,
    stages: Mapping[str, tuple[Program | StageOutputs, float]],
    batches: Sequence[Samples],
    executor: Executor,
) -> list[Difference]:
    """Each stage's largest difference over the batches."""
    # The executor runs all programs side by side and gives their outputs in turn: masked, stage, stage, and so on, for
    # each batch. ``next(results)`` must keep to that order.
    programs = [run for run, _ in stages.values() if isinstance(run, Program)]
    results = executor.run_programs([masked, *programs], [batch.tensors for batch in batches])
    worst: dict[str, Difference] = {}
    for batch in batches:
        try:
            reference = next(results)
        except RuntimeError as error:  # stages run side by side, so the fault may be any program's
            if (lacking := find_exhaustion(error)) is not None:
                raise lacking from error
            return [make_failure(name, error, tolerance) for name, (run, tolerance) in stages.items()]
        for name, (run, tolerance) in step_through(stages.items(), lambda stage: stage[0]):
            outputs_of = (lambda _: next(results)) if isinstance(run, Program) else run
            found = _run(name, outputs_of, batch, reference, tolerance)
            worst[name] = max(worst.get(name, found), found, key=lambda d: d.relative)
        if any(d.failure for d in worst.values()):  # a program that fails ends ``results``
            break
    return list(worst.values())


def widen(found: Difference, own: float, times: float = ROUNDINGS, widest: float = WIDEST) -> Difference:
    """``found`` with a wider tolerance, at most ``widest``, if rounding moves the logits by ``own`` of the largest."""
    tolerance = min(times * own, widest)  # ``own`` may be NaN: ``not >`` then keeps the tolerance
    if found.ok or not tolerance > found.tolerance:
        return found
    said = f"widened from {found.tolerance:.0e}: rounding alone moves the logits by {own:.1e} of the largest"
    return replace(found, tolerance=tolerance, widened=said)


def _run(
    name: str, run: StageOutputs, batch: Samples, reference: Tensor | Sequence[Tensor], tolerance: float
) -> Difference:
    """A stage's difference on one batch; of several outputs, the worst.

    Any error counts as a difference, since runtimes have no error class in common.
    """
    try:
        found = run(batch)
        if isinstance(reference, Tensor):
            assert isinstance(found, Tensor | Placed)
            return compare_outputs(name, found, reference.float(), tolerance)
        assert not isinstance(found, Placed)
        pairs = zip(found, reference, strict=True)
        each = [compare_outputs(name, one, other.float(), tolerance) for one, other in pairs if isinstance(one, Tensor)]
        return max(each, key=lambda d: d.relative)
    except MptkError:  # names its own remedy
        raise
    except Exception as error:  # lacking memory is not a fault of the stage
        if (lacking := find_exhaustion(error)) is not None:
            raise lacking from error
        return make_failure(name, error, tolerance)


def make_failure(name: str, error: Exception, tolerance: float) -> Difference:
    """The infinite difference of a stage that gave no logits."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return Difference(name, math.inf, math.inf, tolerance, failure=reason[:200])


def compare_outputs(stage: str, found: Tensor | Placed, reference: Tensor, tolerance: float) -> Difference:
    """The difference of outputs [batch, sequence, vocab] from ``reference``.

    NaN is an infinite difference, and so is one from an infinite output. If all reference outputs are zero, any
    difference is relatively infinite.

    Raises:
        ValueError: there are too few outputs, or too many.
    """
    largest, scale = 0.0, 0.0
    for one, other in split_outputs(found, reference):
        if one.shape != other.shape:
            raise ValueError(f"the outputs are {list(one.shape)}, not {list(other.shape)}")
        if not one.numel():
            continue
        apart = (one.float() - other).abs_().max().item()
        # Relative to an infinite output it would be NaN, and no later stage is worse than that.
        if not math.isfinite(apart):
            return Difference(stage, math.inf, math.inf, tolerance)
        largest = max(largest, apart)
        scale = max(scale, *(abs(limit.item()) for limit in other.aminmax()))
    if not scale:
        return Difference(stage, largest, math.inf if largest else 0.0, tolerance)
    return Difference(stage, largest, largest / scale, tolerance)


def split_outputs(found: Tensor | Placed, reference: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs and what they must be, ``POSITIONS_AT_ONCE`` at a time."""
    if isinstance(found, Placed):
        rows = (torch.arange(len(found.places)) if found.of is None else found.of)[:, None]
        for outputs, places in zip(
            found.outputs.split(POSITIONS_AT_ONCE, 1), found.places.split(POSITIONS_AT_ONCE, 1), strict=True
        ):
            kept = places >= 0  # padding may be anything
            if outputs.shape[:2] != places.shape:
                raise ValueError(f"there are outputs at {list(outputs.shape[:2])} positions, not {list(places.shape)}")
            expected = reference[rows.expand_as(places)[kept], places[kept]]
            yield outputs[kept.to(outputs.device)], expected.to(outputs.device)
    elif found.shape != reference.shape or found.ndim < 2:  # whole, so that the shapes are compared
        yield found, reference.to(found.device)
    else:
        yield from zip(
            found.split(POSITIONS_AT_ONCE, 1), reference.to(found.device).split(POSITIONS_AT_ONCE, 1), strict=True
        )
