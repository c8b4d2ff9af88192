"""What must hold of a program: the eager module with zeroed weights, the masked graph and the cut graph agree.

The eager one is a copy of the module whose weights are zero at the removed units, found from the groups' positions
alone. It says the same as the masked graph where no largest, smallest or statistic is taken over a cut axis.
"""

from __future__ import annotations

import copy
import random
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import mptk
from mptk import FamilyPlan, MptkError, Plan, ProofError
from mptk.ir import Analysis, Family, Group, Member, find_unit_positions, list_axes, resolve_plan
from passes.transforms.masked_reference import mask

from .program import Program, build, inputs_of

FAILURES = ("wrong", "crashed", "invalid")
TOLERANCE, DOUBLE_TOLERANCE = 1e-5, 1e-9


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    ``verdict``: proven, without family, refused, wrong or crashed; invalid if it does not run in the first place, which
    is the generator's fault. ``cause`` says why, if there is a why.
    """

    verdict: str
    cause: str = ""
    families: int = 0


class Wrong(Exception):
    """Two of the oracles differ."""


def check(program: Program) -> Outcome:
    """Analyse ``program``, cut all its families at once and one alone at random, and compare."""
    outcome = _check(program)
    if outcome.verdict == "wrong" and "differ" in outcome.cause:
        again = _check(program, torch.float64, DOUBLE_TOLERANCE)
        return again if again.verdict == "proven" else outcome
    return outcome


def _check(program: Program, dtype: torch.dtype = torch.float32, tolerance: float = TOLERANCE) -> Outcome:
    try:
        module, inputs = (
            build(program).to(dtype),
            [t.to(dtype) if t.is_floating_point() else t for t in inputs_of(program)],
        )
        dense = _run(copy.deepcopy(module), inputs)
    except Exception as error:
        return Outcome("invalid", f"{type(error).__name__}: {error}")
    if not all(t.isfinite().all() for t in dense):
        return Outcome("invalid", "the program itself is not finite")
    try:
        analysis = mptk.analyze(module, inputs)
        _compare("the traced and the eager program", _run(analysis.program, inputs), dense, tolerance)
        for plan in plans(analysis, program.seed):
            _compare_cut(module, analysis, plan, inputs, dense, tolerance)
    except (Wrong, ProofError) as error:
        return Outcome("wrong", str(error))
    except MptkError as error:
        return Outcome("refused", str(error))
    except Exception as error:
        return Outcome("crashed", _describe(error))
    count = len(analysis.families)
    return Outcome("proven" if count else "without family", families=count)


def _compare_cut(
    module: nn.Module,
    analysis: Analysis,
    plan: Plan,
    inputs: Sequence[Tensor],
    dense: Sequence[Tensor],
    tolerance: float,
) -> None:
    masked = _run(mask(analysis, resolve_plan(analysis, plan)), inputs)
    cut = _run(mptk.rewrite(analysis, plan), inputs)
    names = "+".join(plan.families)
    _compare(f"the cut and the masked program ({names})", cut, masked, tolerance)
    for a, b in zip(cut, dense, strict=True):
        if a.shape != b.shape:
            raise Wrong(f"shapes of the cut and the dense program ({names}): {list(a.shape)} and {list(b.shape)}")
    if not disturbed(analysis, plan):
        eager = _run(zeroed(module, analysis, plan), inputs)
        _compare(f"the masked program and the zeroed module ({names})", masked, eager, tolerance)


def _run(program: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """All tensors of the result, flat. What the program is given it may write to."""
    with torch.no_grad():
        output = program(*(t.clone() for t in inputs))
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


def _compare(what: str, found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Raise Wrong unless all tensors are equal up to rounding."""
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            raise Wrong(f"shapes of {what}: {list(a.shape)} and {list(b.shape)}")
        error = (a.double() - b.double()).abs().max().item()
        if not error <= tolerance * max(1.0, b.abs().max().item()):
            raise Wrong(f"{what} differ by {error:.1e} of {b.abs().max().item():.1e}")


# ---- plans ----


def plans(analysis: Analysis, seed: int) -> Iterator[Plan]:
    """All families at once, and, if there are several, one of them alone; widths and units at random."""
    generator = random.Random(seed)
    families = [f for f in analysis.families if _widths(f)]
    if families:
        yield _plan(families, generator)
    if len(families) > 1:
        yield _plan([generator.choice(families)], generator)


def _widths(family: Family) -> range:
    return range(-(-family.minimum // family.multiple) * family.multiple, family.size, family.multiple)


def _plan(families: Sequence[Family], generator: random.Random) -> Plan:
    chosen = {}
    for family in families:
        width = generator.choice(_widths(family))
        keep = {
            g.layer: tuple(tuple(sorted(generator.sample(range(family.size), width))) for _ in range(g.scopes))
            for g in family.groups
        }
        chosen[family.name] = FamilyPlan(width, family.size, keep)
    return Plan(chosen)


# ---- the eager oracle ----


def disturbed(analysis: Analysis, plan: Plan) -> bool:
    """Whether zeros would disturb a reduction over a cut axis: then zeroed weights do not mean what a mask means."""
    axes = {g.axis for name in plan.families for g in analysis.family(name).groups}
    kinds = ("max", "min", "statistic")
    return any(r.kind in kinds and axes & set(list_axes(r.axis)) for r in analysis.facts.reductions)


def zeroed(module: nn.Module, analysis: Analysis, plan: Plan) -> nn.Module:
    """A copy of ``module`` whose weights are zero at the units that ``plan`` removes, but what is divided by."""
    result = copy.deepcopy(module)
    tensors = dict([*result.named_parameters(remove_duplicate=False), *result.named_buffers(remove_duplicate=False)])
    kept = {analysis.program.weights[node.name]: axes for node, axes in analysis.facts.divisors.items()}
    with torch.no_grad():
        for name, chosen in plan.families.items():
            for group in analysis.family(name).groups:
                for member in (m for m in group.members if group.axis not in kept.get(m.weight, ())):
                    _zero(tensors[member.weight], analysis.weights[member.weight], group, member, chosen)
    return result


def _zero(tensor: Tensor, dims: Sequence[Any], group: Group, member: Member, chosen: FamilyPlan) -> None:
    """Zero the removed units of one member, in each scope those that its row removes."""
    positions, rows = group.positions(member), chosen.keep[group.layer]
    for s in range(group.scopes):
        removed = np.setdiff1d(np.arange(group.size), rows[s])
        places = [np.arange(size) for size in tensor.shape]
        places[member.dim] = positions[s, removed].ravel()
        for d, allowed in _within(dims, group, member, s).items():
            places[d] = np.intersect1d(places[d], allowed)
        tensor[np.ix_(*places)] = 0


def _within(dims: Sequence[Any], group: Group, member: Member, scope: int) -> Mapping[int, Any]:
    """The positions that belong to a scope, by dimension: the member's own one, or the one that holds the scope axis."""
    found: dict[int, Any] = {}
    coordinates = np.unravel_index(scope, [a.size for a in group.scope]) if group.scope else ()
    for a, coordinate in zip(group.scope, coordinates, strict=True):
        holders = [d for d, term in enumerate(dims) if a in list_axes(term)]
        d = member.dim if member.dim in holders else next(iter(holders), None)
        if d is not None:
            own = find_unit_positions(dims[d], a)[0, coordinate]
            found[d] = np.intersect1d(found[d], own) if d in found else own
    return found


def _describe(error: BaseException) -> str:
    """One line: the error and its place in our source."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if {"passes", "mptk"} & set(Path(f.filename).parts)]
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}: {' '.join(str(error).split())[:200]}"
