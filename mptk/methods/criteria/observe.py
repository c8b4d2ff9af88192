"""observe: the input of criteria, and shared measurements: moments of activations, losses and their gradients.

Activations are read in the FX graph, at each sum of products of an activation and a weight. So fused projections,
transposed layers and packed experts need no special case, and a weight that is used twice is observed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor, fx

from mptk.compat.torch import vmap_opens
from mptk.distributed.processes import Sharing, share_batches
from mptk.errors import DataError, InputError
from mptk.ir import (
    Analysis,
    Dims,
    Group,
    Program,
    Samples,
    Variable,
    get_argument,
    is_open,
    list_axes,
    resolve,
    resolve_size,
)
from mptk.progress import Count
from mptk.protocols import Task
from mptk.staged.staged import EXECUTOR, Executor, Tap
from mptk.tasks import CAUSAL_LM

OBSERVED_TOKENS = 2048
"""Tokens in a forward batch. It bounds memory; results change only by rounding."""


@dataclass(frozen=True)
class Calibration:
    """The input of a criterion's measurement: an analysed model, what to score, and text.

    ``objective`` has the loss. ``removals``: depth → number of blocks to remove; without an entry a depth loses all
    removable blocks. ``executor`` runs the program. ``progress`` is called with (samples done, all samples).
    """

    analysis: Analysis
    variables: Sequence[Variable]
    text: Samples | None = None
    seed: int = 0
    objective: Task = CAUSAL_LM
    removals: Mapping[str, int] = field(default_factory=dict)
    executor: Executor = EXECUTOR
    progress: Count | None = None

    @property
    def samples(self) -> Samples:
        """The text. Raises MptkError if there is none."""
        if self.text is None:
            raise InputError(
                "this criterion needs calibration text; pass windows of token ids, or use magnitude or random",
                name="data",
            )
        return self.text

    @property
    def groups(self) -> list[Group]:
        """The groups to score."""
        return [group for variable in self.variables for group in variable.groups]

    @property
    def sites(self) -> list[Site]:
        """The contractions that score their units."""
        every = find_sites(self.analysis)
        return list(dict.fromkeys(site for group in self.groups for site, _ in find_uses(every, group)))


Stream = tuple[fx.Node, int, tuple[int, ...], fx.Node | None]
"""An activation: its value, the summed dimension, the shared dimensions, and the ends of routed rows."""


@dataclass(frozen=True, eq=False)
class Site:
    """A contraction of an activation ``x`` and a weight.

    ``x_dim`` and ``weight_dim`` are the summed dimensions. ``shared`` pairs dimensions (of x, of the weight) that are
    the same axis and are not summed: heads or experts of a batched product. If the rows of x are routed, ``ends`` is
    the graph's tensor with the end row of each expert, and ``shared`` has one pair, (rows, experts).
    """

    node: fx.Node
    x: fx.Node
    x_dim: int
    weight: fx.Node
    weight_dim: int
    weight_dims: Dims
    shared: tuple[tuple[int, int], ...]
    ends: fx.Node | None

    @property
    def stream(self) -> Stream:
        """The activation that is read. Query, key and value layers share one."""
        return self.x, self.x_dim, tuple(x for x, _ in self.shared), self.ends

    def align_to_weight(self, values: Tensor) -> Tensor:
        """[*shared, K] → the weight's dimensions in order, with size 1 for dimensions that are not in ``values``."""
        dims = [*(w for _, w in self.shared), self.weight_dim]
        values = values.float().permute([dims.index(d) for d in sorted(dims)])
        sizes = iter(values.shape)
        return values.reshape([next(sizes) if d in dims else 1 for d in range(len(self.weight_dims))])


@dataclass
class Moments:
    """Running mean and sum of squared deviations, float64 [*shared, K]. ``count``: rows, [*shared, 1]."""

    count: Tensor
    mean: Tensor
    deviation: Tensor

    def merge(self, other: Moments) -> Moments:
        """The moments of both samples together, without cancellation (Chan, Golub & LeVeque 1983)."""
        count = self.count + other.count
        share = other.count / count.clamp(min=1)  # an expert may have no rows in either
        delta = other.mean - self.mean
        deviation = self.deviation + other.deviation + delta.square() * self.count * share
        return Moments(count, self.mean + delta * share, deviation)


Key = TypeVar("Key", bound=Hashable)
Watched = tuple[tuple[fx.Node, ...], Callable[..., Moments]]
"""Values of a program to watch, and a function that makes moments of them."""


@dataclass(frozen=True)
class Observation:
    """The moments at a site. Properties broadcast against ``weight``, the weight operand as the op receives it."""

    site: Site
    program: Program = field(repr=False)
    moments: Moments = field(repr=False)

    @property
    def weight(self) -> Tensor:
        """The weight operand, on the device of the moments; made at each request."""
        return compute_weight(self.program, self.site.weight).to(self.moments.mean.device)

    @property
    def norm(self) -> Tensor:
        """‖x_j‖₂ over all rows, for each summed position j."""
        seen = self.moments
        return self.site.align_to_weight((seen.deviation + seen.count * seen.mean.square()).sqrt())

    @property
    def variance(self) -> Tensor:
        """Sample variance of x_j (divided by rows − 1)."""
        return self.site.align_to_weight(self.moments.deviation / (self.moments.count - 1).clamp(min=1))

    @property
    def mean(self) -> Tensor:
        return self.site.align_to_weight(self.moments.mean)


def compute_weight(program: Program, node: fx.Node) -> Tensor:
    """The value of a node that depends only on weights."""
    if node.op == "placeholder":
        return program.state[program.weights[node.name]]
    assert callable(node.target)
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: compute_weight(program, source))
    value: Tensor = node.target(*args, **kwargs)
    return value


def find_sites(analysis: Analysis) -> list[Site]:
    """Every contraction of an activation and a weight, in graph order.

    A weight that only a call knows is left out: its size depends on inputs, or ``torch.vmap`` takes it apart.
    """
    facts, found, made = analysis.facts, [], _find_call_nodes(analysis.program)
    for product in facts.contractions:
        # Products of two activations, like attention's own, have no weight to score.
        operands = [product.left, product.right]
        weights = [o for o in operands if facts.is_weight(o[0]) and o[0] not in made]
        others = [o for o in operands if o[0] in facts.activations]
        if len(weights) == len(others) == 1:
            (x, x_dim), (weight, weight_dim) = others[0], weights[0]
            x_dims = tuple(map(resolve, facts.dims(x)))
            weight_dims = tuple(map(resolve, facts.dims(weight)))
            if x_dims and x_dims[x_dim].size == weight_dims[weight_dim].size:  # else it is an input itself
                shared, ends = _match_dims(analysis, product.node, (x_dims, x_dim), (weight_dims, weight_dim))
                found.append(Site(product.node, x, x_dim, weight, weight_dim, weight_dims, shared, ends))
    return found


def _find_call_nodes(program: Program) -> set[fx.Node]:
    """All nodes that only a call has: the inputs, what ``torch.vmap`` takes apart, and what depends on either."""
    user, found = set(program.user_inputs), set[fx.Node]()
    for node in program.graph.graph.nodes:
        if node.name in user or node.target is vmap_opens or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _match_dims(
    analysis: Analysis, node: fx.Node, x: tuple[Dims, int], weight: tuple[Dims, int]
) -> tuple[tuple[tuple[int, int], ...], fx.Node | None]:
    """Pairs of dimensions that x and the weight share, except the summed one, and the ends of routed rows."""
    x_free = [(d, t) for d, t in enumerate(x[0]) if d != x[1]]
    weight_free = [(d, t) for d, t in enumerate(weight[0]) if d != weight[1]]
    # A grouped product (``offs``): rows of x are sorted by expert, and the analysis knows which axis they follow.
    ends = get_argument(node, "offs")
    if isinstance(ends, fx.Node):
        routed = [(resolve(route.rows), resolve(route.expert)) for route in analysis.facts.routes]
        pairs = [(i, j) for i, s in x_free for j, t in weight_free if (s, t) in routed]
        return tuple(pairs[:1]), ends if pairs else None
    return tuple((i, j) for i, s in x_free for j, t in weight_free if s == t and list_axes(s)), None


def find_uses(sites: Iterable[Site], group: Group) -> list[tuple[Site, int]]:
    """The contractions that score a group's units, each with the dimension of its weight that holds them.

    If weights sum over the units, these are the consumers. If no weight does (query and key channels are multiplied
    with each other; whole experts are only selected), these are the contractions with weights that make or hold the
    units.
    """
    holding = [
        (site, d) for site in sites for d, term in enumerate(site.weight_dims) if group.axis in set(list_axes(term))
    ]
    consumers = [(site, d) for site, d in holding if d == site.weight_dim]
    return consumers or holding


# ---- activations ----


def watch(given: Calibration, watches: Sequence[tuple[tuple[fx.Node, ...], Callable[..., None]]]) -> Sharing:
    """Run the program on the text, and call each function with the values of its nodes in every batch.

    The processes of a run share the batches; with the result a caller sums, or lists, what all of them found. Nothing
    after the last of the nodes is computed.

    Raises:
        MptkError: there is no text, or the program was traced for other sizes of inputs.
    """
    found = split_batches(given.analysis.program, given.samples, OBSERVED_TOKENS)
    share = share_batches(len(found))
    own = share.own(found)
    given.executor.watch(
        given.analysis.program, [batch.tensors for batch in own], watches, count_in_samples(given.progress, own)
    )
    return share


def measure_activations(given: Calibration) -> dict[Site, Observation]:
    """The moments of x at each contraction that scores units of ``given.variables``.

    Only running sums [*shared, K] are kept. Raises the errors of ``watch``.
    """

    def make_moments(stream: Stream, x: Tensor, ends: Tensor | None = None) -> Moments:
        return compute_moments(x, stream[1], stream[2], ends)

    # Sites that read one activation (query, key and value layers) share its moments.
    sites = given.sites
    streams = dict.fromkeys(site.stream for site in sites)
    watches = {s: ((s[0],) if s[3] is None else (s[0], s[3]), partial(make_moments, s)) for s in streams}
    found = gather_moments(given, watches)
    return {site: Observation(site, given.analysis.program, found[site.stream]) for site in sites}


def gather_moments(given: Calibration, watches: Mapping[Key, Watched]) -> dict[Key, Moments]:
    """The merged moments of the watched values over all batches. Raises the errors of ``watch``."""
    found: dict[Key, Moments] = {}

    def see(key: Key, *values: Tensor) -> None:
        seen = watches[key][1](*values)
        found[key] = seen if key not in found else found[key].merge(seen)

    share = watch(given, [(nodes, partial(see, key)) for key, (nodes, _) in watches.items()])
    return {key: _merge_moments(found[key], share) for key in watches}


def _merge_moments(seen: Moments, share: Sharing) -> Moments:
    """The moments of all processes' batches."""
    parts = zip(share.gather(seen.count), share.gather(seen.mean), share.gather(seen.deviation), strict=True)
    first, *rest = (Moments(*part) for part in parts)
    for more in rest:
        first = first.merge(more)
    return first


def split_batches(program: Program, samples: Samples, positions: int) -> list[Samples]:
    """Samples in batches of about ``positions`` positions, at least one sample each.

    Raises:
        MptkError: the program was traced for another size of input.
    """
    user = set(program.user_inputs)
    traced = [n.meta["val"].shape for n in program.list_placeholders() if n.name in user]
    found = samples.make_batches(positions)
    for batch in found:
        shapes = [tensor.shape for tensor in batch.tensors]
        if len(traced) != len(shapes) or not all(map(_is_traced_shape, traced, shapes)):
            said = ", ".join(str(list(shape)) for shape in traced)
            raise DataError(
                f"the program was traced for inputs {said} and calibration has "
                f"{', '.join(str(list(shape)) for shape in shapes)}; trace the model with dynamic=True",
                name="windows",
            )
    return found


def _is_traced_shape(traced: Sequence[int | torch.SymInt], shape: Sequence[int]) -> bool:
    sizes = zip(traced, shape, strict=False)
    return len(traced) == len(shape) and all(is_open(size) or resolve_size(size) == n for size, n in sizes)


def compute_moments(x: Tensor, dim: int, shared: Sequence[int], ends: Tensor | None = None) -> Moments:
    """Moments of ``x`` for each position of ``dim`` and of the ``shared`` dimensions, over all other dimensions.

    With ``ends``, x is [rows, K] or [K, rows], sorted by expert. ``ends`` [experts] is the end row of each expert; rows
    after the last belong to no expert. The result is [experts, K].
    """
    if ends is not None:
        return _compute_routed_moments(x.float().movedim(dim, -1), ends)
    # Within a batch float32 will do; batches are merged in float64.
    others = [d for d in range(x.ndim) if d != dim and d not in shared]
    sizes = [x.shape[d] for d in shared]
    rows = x.float().permute(*shared, *others, dim).reshape(*sizes, -1, x.shape[dim])
    mean = rows.mean(-2)
    deviation = (rows - mean.unsqueeze(-2)).square().sum(-2)
    count = torch.full((*sizes, 1), rows.shape[-2], dtype=torch.float64, device=x.device)
    return Moments(count, mean.double(), deviation.double())


def _compute_routed_moments(x: Tensor, ends: Tensor) -> Moments:
    # Rows after the last end get the number of a further expert, which is dropped at the end.
    experts = ends.numel()
    owner = torch.searchsorted(ends, torch.arange(len(x), device=x.device, dtype=ends.dtype), right=True)
    count = torch.bincount(owner, minlength=experts + 1)[:, None].double()
    zeros = torch.zeros(experts + 1, x.shape[1], dtype=torch.float64, device=x.device)
    mean = zeros.index_add(0, owner, x.double()) / count.clamp(min=1)
    deviation = zeros.index_add(0, owner, (x - mean[owner]).square())
    return Moments(count[:-1], mean[:-1], deviation[:-1])


def count_in_samples(progress: Count | None, given: Sequence[Samples]) -> Count | None:
    """Progress over batches as progress over their samples."""
    done = list(accumulate(map(len, given)))
    return None if progress is None else lambda count, _: progress(done[count - 1], done[-1])


# ---- losses and gradients ----

GRADIENT_TOKENS = 512
"""Tokens in a batch whose activations autograd keeps: fewer than in a forward batch, which keeps none."""


def sum_losses(task: Task, executor: Executor, programs: Sequence[Program], given: Sequence[Samples]) -> Tensor:
    """The sum of each program's losses on batches, float64 [programs]. They run side by side, to read weights once.

    The processes of a run share the batches.
    """
    share = share_batches(len(given))
    own = share.own(given)
    sums = torch.zeros(len(programs), dtype=torch.float64)
    results = executor.run_programs(programs, [batch.tensors for batch in own])
    for batch in own:
        for i in range(len(programs)):
            sums[i] += float(task.compute_loss(next(results), batch.to(executor.device)))
    return sums if share.count == 1 else share.sum_all(sums.to(executor.device)).cpu()


def sum_gradients(
    given: Calibration, scaled: Callable[[Tensor], Tensor], names: Collection[str] = (), taps: Sequence[Tap] = ()
) -> tuple[Mapping[str, Tensor], Sharing]:
    """The gradient of the sum over all batches of ``scaled(objective.sensitivity)``, for each weight of ``names``.

    ``taps`` see gradients in activations. The processes of a run share the batches; the second result sums what their
    taps saw. Raises MptkError if the objective has no loss for the program's outputs; or as ``watch``.
    """
    program, executor = given.analysis.program, given.executor
    found = split_batches(program, given.samples, GRADIENT_TOKENS)
    share = share_batches(len(found))
    own = share.own(found)

    def compute_loss(output: Tensor, i: int) -> Tensor:
        return scaled(given.objective.compute_sensitivity(output, own[i].to(executor.device)))

    inputs, progress = [batch.tensors for batch in own], count_in_samples(given.progress, own)
    return executor.compute_gradients(program, names, inputs, compute_loss, progress, share.sum_all, taps), share
