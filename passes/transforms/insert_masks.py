"""insert_masks: multiply one mask value for each unit and layer into the module's own forward pass.

The analysis gives the places. A mask multiplies the input of the layers that sum over its units (output projection,
down projection). If another call combines the units before (a norm over them, a product of two activations), the mask
multiplies the output of the layers that make them. Units of an attention, such as heads behind a norm over all of them,
need both: queries of 0 attend to all tokens alike.

Hooks are on the module that is called, usually an adapter's wrapper, so the adapter's path is masked, too. The
parameter itself is masked if it has no layer of its own (packed experts), if the model reads a layer's weight without
calling the layer, and if it is tied: then in every module that holds it. The mask m of a residual block multiplies what
it adds to its input: y = x + m · (block(x) − x).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from mptk.errors import AnalysisError
from mptk.ir import (
    Analysis,
    AxisFacts,
    Depth,
    Group,
    Member,
    Program,
    Term,
    Variable,
    collect_axes,
    find_unit_indices,
    list_axes,
    list_module_paths,
)


@dataclass(frozen=True)
class MaskSite:
    """One place of a group's mask.

    Attributes:
        where: ``input`` or ``output`` (last dimension) of ``module``, ``block`` for what it adds to its input, or the
            name of a parameter of it.
        index: the unit at each position (scope · size + unit), −1 for no unit. Broadcasts against the masked
            tensor.
        weights: the parameters (name, dimension) that are multiplied when the mask is folded; the dimension is None
            if ``index`` has the parameter's own dimensions. Empty for a block, whose mask no weight takes.
        past: whether the model reads the weights without calling ``module``. Then the weights are masked, and not its
            input or output.
    """

    family: str
    layer: int
    module: str
    where: str
    index: Tensor
    weights: tuple[tuple[str, int | None], ...]
    past: bool = False

    @property
    def masks_weights(self) -> bool:
        """Whether weights are masked, and not what enters or leaves a module."""
        return self.past or self.where not in ("input", "output", "block")


def find_mask_sites(analysis: Analysis, module: nn.Module, families: Sequence[str]) -> list[MaskSite]:
    """The places of the masks of ``families`` in ``module``, which may be wrapped by peft.

    Raises:
        MptkError: masked zeros of a family would disturb a softmax, a top-k or a norm's statistics. It can be cut
            one-shot, but not faded out.
    """
    sites = []
    for name in families:
        variable = analysis.variable(name)
        if isinstance(variable.family, Depth):
            sites += [
                MaskSite(name, 0, block.module, "block", torch.tensor([unit]), ())
                for unit, block in enumerate(variable.family.stack.blocks)
            ]
            continue
        refusal = find_disturbance(analysis, name)
        if refusal is not None:
            raise AnalysisError(refusal, name=name)
        for layer, group in enumerate(variable.groups):
            # One site for each weight: the rows of its output and its bias are masked together.
            consumers = _find_sole_consumers(analysis.facts, group)
            covered: set[str] = set()
            for member in consumers or _find_makers(group, analysis.program, analysis.facts):
                if member.weight not in covered:
                    tied = _list_tied_sites(analysis, module, variable, layer, member)
                    found = tied or [_mask_site(analysis, module, variable, layer, member)]
                    covered |= {weight for site in found for weight, _ in site.weights}
                    sites += found
    return sites


def find_disturbance(analysis: Analysis, name: str) -> str | None:
    """The reason why a family cannot fade out: zeros would enter a softmax, a top-k or a norm's statistics. Or None."""
    for group in analysis.variable(name).groups:
        for reduction in analysis.facts.reductions:
            if reduction.kind in ("max", "min", "statistic") and group.axis in set(list_axes(reduction.axis)):
                return (
                    f"{name} cannot be learned: zeros would disturb {reduction.node.target} in "
                    f"{group.layer or 'the model'}; leave it out with --families, or cut it with a one-shot --method"
                )
    return None


def _find_sole_consumers(facts: AxisFacts, group: Group) -> list[Member]:
    """The consumers, if nothing else depends on the units."""
    met = collect_axes(reduction.axis for reduction in facts.reductions)
    met |= collect_axes(product.axis for product in facts.contractions if not facts.has_weight(product))
    return [] if group.axis in met else _list_consumers(group)


def _list_consumers(group: Group) -> list[Member]:
    return [m for m in group.members if m.role == "consumer"]


def _find_makers(group: Group, program: Program, facts: AxisFacts) -> list[Member]:
    """The members that make the units, producers first; for units of an attention also the members that sum over them.

    A weight that something is divided by is left out. A tied weight that sums over units may make them elsewhere.
    """
    # The dividing weights keep their numbers in the masked reference, too (``zero_propagation.find_divisors``).
    tied = set(program.aliases.values())
    kept = {program.weights[node.name] for node, axes in facts.divisors.items() if group.axis in axes}
    attends = group.axis in collect_axes(
        t for product in facts.contractions if not facts.has_weight(product) for t in product.out
    )
    members = [m for m in group.members if m.weight not in kept]
    found = [m for m in members if m.role != "consumer" or m.weight in tied]
    return sorted(found, key=lambda m: m.role != "producer") + (_list_consumers(group) if attends else [])


def _list_tied_sites(
    analysis: Analysis, module: nn.Module, variable: Variable, layer: int, member: Member
) -> list[MaskSite]:
    """A site at each module that holds a tied weight, since all of them will read it folded; none if it is not tied.

    It is folded once, with the first site.
    """
    names = [member.weight, *(a for a, owner in analysis.program.aliases.items() if owner == member.weight)]
    if len(names) == 1:
        return []
    index = _index(analysis.weights[member.weight], member.dim, variable.groups[layer])
    places = {id(module.get_submodule(at)): (at, own) for at, _, own in (name.rpartition(".") for name in names)}
    sites = [MaskSite(variable.name, layer, at, own, index, ()) for at, own in places.values()]
    return [replace(sites[0], weights=((member.weight, None),)), *sites[1:]]


def _mask_site(analysis: Analysis, module: nn.Module, variable: Variable, layer: int, member: Member) -> MaskSite:
    # The module that holds the weight, and the layer inside an adapter's wrapper, whose type tells the dimensions.
    owner, _, parameter = member.weight.rpartition(".")
    called = module.get_submodule(owner)
    own = getattr(called, "base_layer", called)
    inputs, outputs = _find_linear_dims(own)
    group = variable.groups[layer]
    dims = analysis.weights[member.weight]
    past = is_used_outside(analysis.program, member.weight)
    beside = [a for a in group.scope if a not in set(list_axes(member.term))]
    # A choice that varies along another dimension of the weight (``beside``) has no mask of one dimension.
    if parameter == "weight" and not beside and member.dim == inputs and member.role == "consumer":
        index = _index(dims, member.dim, group).flatten()
        return MaskSite(variable.name, layer, owner, "input", index, ((member.weight, inputs),), past)
    if parameter == "weight" and not beside and member.dim == outputs:
        held = {m.weight for m in group.members}
        bias = f"{owner}.bias"
        rows = [(member.weight, outputs), *([(bias, 0)] if bias in held else [])]
        index = _index(dims, member.dim, group).flatten()
        return MaskSite(variable.name, layer, owner, "output", index, tuple(rows), past)
    return MaskSite(variable.name, layer, owner, parameter, _index(dims, member.dim, group), ((member.weight, None),))


def is_used_outside(program: Program, weight: str) -> bool:
    """Whether all calls that use a weight were made outside of its own module, so that the module's hooks miss them."""
    owner = weight.rpartition(".")[0]
    users = [u for node in program.list_placeholders() if program.weights.get(node.name) == weight for u in node.users]
    return bool(users) and not any(owner in list_module_paths(user) for user in users)


def _find_linear_dims(layer: nn.Module) -> tuple[int | None, int | None]:
    """The weight's input and output dimension, for layers with units in the last dimension of input and output."""
    if isinstance(layer, nn.Linear):
        return 1, 0
    if isinstance(layer, Conv1D):
        return 0, 1
    return None, None


def _index(dims: Sequence[Term], dim: int, group: Group) -> Tensor:
    """The unit at each position of a weight, int64 (``unit_indices``). A position belongs to at most one unit."""
    # One index for each occurrence of the axis, with −1 for no unit. The largest is the unit, if there is one.
    return torch.from_numpy(np.max(find_unit_indices(dims, dim, group), axis=0))


MaskValues = Callable[[str, int], Tensor]
"""(family, layer) → the current mask, [scopes, size]."""


GradientWatch = Callable[[str, int, Tensor], None]
"""Called with family, layer, and the mask's gradient from each position, [positions, scopes · size]."""


class _AutogradContext(Protocol):
    """What autograd keeps from ``Multiply.forward`` to ``Multiply.backward``."""

    saved_tensors: tuple[Tensor, ...]
    see: Callable[[Tensor], None]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class Multiply(torch.autograd.Function):
    """x · factor along the last dimension, or one factor for all. ``see`` gets its gradient from each position."""

    @staticmethod
    def forward(ctx: _AutogradContext, x: Tensor, factor: Tensor, see: Callable[[Tensor], None]) -> Tensor:
        ctx.save_for_backward(x, factor)
        ctx.see = see
        return x * factor

    @staticmethod
    def backward(ctx: _AutogradContext, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, factor), (gradient,) = ctx.saved_tensors, gradients
        # ∂/∂factor = gradient · x, summed over positions. ``see`` gets it before the sum; autograd offers only the sum.
        each = (gradient * x).flatten(0, -2)
        each = each.sum(-1, keepdim=True) if factor.numel() == 1 else each
        ctx.see(each)
        return gradient * factor, each.sum(0), None


@dataclass(frozen=True)
class _Placed:
    """The units at a site, on the device of the masks.

    Attributes:
        index: the unit at each position; the number of ``units`` for no unit.
        whole: whether position i has unit i, and there are no other positions.
    """

    index: Tensor
    units: int
    whole: bool

    @staticmethod
    def of(site: MaskSite, values: Tensor) -> _Placed:
        # No unit has the number after the last, at which ``expand_values`` finds a 1 and ``collect`` a sum to drop.
        units, index = values.numel(), site.index
        whole = index.ndim == 1 and torch.equal(index, torch.arange(units))
        return _Placed(torch.where(index < 0, units, index).to(values.device), units, whole)

    def expand_values(self, values: Tensor) -> Tensor:
        """The factor at each position: its unit's value, or 1."""
        flat = values.flatten()
        return flat if self.whole else torch.cat([flat, flat.new_ones(1)])[self.index]

    def collect(self, each: Tensor) -> Tensor:
        """[n, positions] → [n, units]: the sums over the positions of a unit."""
        if self.whole:
            return each
        return each.new_zeros(len(each), self.units + 1).index_add_(1, self.index, each)[:, : self.units]


class InsertedMasks:
    """Active masks of a module. ``values`` gives them at each forward pass.

    Masks and activations must be on one device. ``watch`` is called in the backward pass for blocks, and for families
    that mask activations at one site a layer.

    Attributes:
        weights: name of a parameter that the masks multiply when they are folded → its sites, each with the dimension.
    """

    def __init__(
        self, module: nn.Module, sites: Sequence[MaskSite], values: MaskValues, watch: GradientWatch | None = None
    ) -> None:
        self.module, self.sites, self.values, self.watch = module, sites, values, watch
        self.enabled = True
        # A family is watched if one site of activations sees all of its gradient: several would each see a part.
        held = Counter((site.family, site.layer) for site in sites if site.where != "block")
        several = {family for (family, _), count in held.items() if count > 1}
        seen = {p.family for p in sites if not p.masks_weights}
        self.watched = seen - several
        self.weights: dict[str, list[tuple[int, int | None]]] = {}
        for i, site in enumerate(sites):
            for name, dim in site.weights:
                self.weights.setdefault(name, []).append((i, dim))
        self._placed = [_Placed.of(site, values(site.family, site.layer).detach()) for site in sites]
        for i, site in enumerate(sites):
            self._insert(i, site)

    def _insert(self, i: int, site: MaskSite) -> None:
        # The values are asked for at each call, since they change while masks are learned.
        called = self.module.get_submodule(site.module)
        # A norm over batches takes no gradient of its statistics; its weight and bias have the mask, too.
        is_buffer = site.where in dict(called.named_buffers(recurse=False))

        def apply_mask(x: Tensor, shape: Sequence[int] = ()) -> Tensor:
            if not self.enabled:
                return x
            factor = self._compute_factors(i).to(x.dtype)
            if shape:
                factor = factor.reshape(shape)
            if is_buffer:
                factor = factor.detach()
            if self.watch is None or site.family not in self.watched or not factor.requires_grad:
                return x * factor
            multiply: Callable[..., Tensor] = Multiply.apply
            return multiply(x, factor, lambda each: self._see(i, each))

        if site.past:
            for name, dim in site.weights:
                parameter = name.rpartition(".")[2]
                ndim = called.get_parameter(parameter).ndim
                shape = [-1 if d == dim else 1 for d in range(ndim)]
                _register_mask(called, parameter, partial(apply_mask, shape=shape))
        elif site.where == "input":
            called.register_forward_pre_hook(lambda _, args: (apply_mask(args[0]), *args[1:]))
        elif site.where == "output":
            called.register_forward_hook(lambda _, args, out: apply_mask(out))
        elif site.where == "block":
            # Before transformers' own hooks, which collect hidden states.
            hook = self._make_block_hook(site.module, apply_mask)
            called.register_forward_hook(hook, with_kwargs=True, prepend=True)
        else:
            _register_mask(called, site.where, apply_mask)

    def _make_block_hook(self, module: str, masked: Callable[[Tensor], Tensor]) -> Callable[..., object]:
        """A hook that masks what a block adds to its input: the first argument that is like its first result."""

        def apply_hook(_: nn.Module, args: tuple[object, ...], options: dict[str, object], out: Any) -> object:
            if not self.enabled:
                return out
            y, *others = (out,) if isinstance(out, Tensor) else out
            given = [v for v in (*args, *options.values()) if isinstance(v, Tensor)]
            # Blocks of transformers take the hidden states first, or by a name that differs between models.
            x = next((v for v in given if v.shape == y.shape and v.dtype == y.dtype), None)
            if x is None:
                raise AnalysisError(
                    f"{module} is called without the value that it adds to; leave its depth out of --families",
                    name=module,
                )
            y = x + masked(y - x)
            return y if isinstance(out, Tensor) else (y, *others)

        return apply_hook

    def _compute_factors(self, i: int) -> Tensor:
        return self._placed[i].expand_values(self.values(self.sites[i].family, self.sites[i].layer))

    def _see(self, i: int, each: Tensor) -> None:
        """Sum the gradients of a unit's channels at each position, and pass the sums to ``watch``."""
        assert self.watch is not None
        self.watch(self.sites[i].family, self.sites[i].layer, self._placed[i].collect(each))

    @contextlib.contextmanager
    def switch_off(self) -> Iterator[None]:
        """In this context the module computes without masks."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @torch.no_grad()
    def fold(self, name: str, weight: Tensor) -> Tensor:
        """``weight``, the parameter ``name``, multiplied by the current masks; itself if no mask multiplies it."""
        for i, dim in self.weights.get(name, ()):
            factor = self._compute_factors(i).to(weight)
            shape = factor.shape if dim is None else [-1 if d == dim else 1 for d in range(weight.ndim)]
            weight = weight * factor.reshape(shape)
        return weight


class _Masked(nn.Module):
    """A parametrisation that multiplies by a mask."""

    def __init__(self, masked: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._masked = masked

    def forward(self, weight: Tensor) -> Tensor:
        return self._masked(weight)


def _register_mask(module: nn.Module, parameter: str, masked: Callable[[Tensor], Tensor]) -> None:
    # ``unsafe`` leaves out torch's trial run at registration: a mask keeps shape and type.
    parametrize.register_parametrization(module, parameter, _Masked(masked), unsafe=True)
