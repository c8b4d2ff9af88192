"""flap: keep the inputs that fluctuate, and replace the mean of the removed ones by a bias.

Source: An et al. 2023, FLAP (arXiv 2312.11983). Its metric WIFV is S_j = Var(x_j) · ‖W_:j‖₂²: the sample variance of
the consumer's input over all calibration tokens, times the squared norm of its column. Its baseline bias compensation
is b ← b + Σ_{j removed} W_:j · mean(x_j).

What differs:
- The score of a unit of several positions (a head) is their sum.
- All layers keep one width, so scores are not standardised across layers, and layers have no ratios of their own.
- Biases are corrected only if the architecture has them: a stock checkpoint has no place for new ones.
- If no weight sums over a unit, the weights that make or hold it score it, as in ``wanda``: Σ Var(x_j) · W_ij² over
  the unit's rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from mptk.ir import Analysis, Cut, Variable, get_argument, resolve
from mptk.methods.criteria.base import Compensation, Criterion, Scores, sum_uses
from mptk.methods.criteria.observe import Observation, Site, measure_activations


def score_by_flap(seen: Mapping[Site, Observation], variables: Sequence[Variable]) -> Scores:
    """s_u = Σ_{j in unit u} Var(x_j) · Σ_i W_ij²."""
    return sum_uses(seen, variables, lambda each: each.weight.float().square() * each.variance)


def compensate(analysis: Analysis, cut: Cut, observations: Mapping[Site, Observation]) -> Compensation:
    """Add the mean of the removed inputs' contribution to each consumer's bias.

    Put the new values into the dense program (``program.with_state``) before it is masked or rewritten. If several
    contractions use one bias (layers that share weights), it gets the mean of their corrections.
    """
    # Dicts as ordered sets: the report names each kind of layer once, in the graph's order.
    corrections: dict[str, list[Tensor]] = {}
    applied: dict[str, None] = {}
    lacking: dict[str, None] = {}
    for site, seen in observations.items():
        # Only layers that lose inputs have something to make up for.
        if not cut.has_choice(site.weight_dims[site.weight_dim]):
            continue
        bias, dim = _find_bias(analysis, site)
        if bias is None:
            lacking[_label(analysis, site)] = None
        else:
            corrections.setdefault(bias, []).append(_compute_lost_output(cut, seen, dim))
            applied[_label(analysis, site)] = None
    state = analysis.program.state
    new = {
        name: (state[name] + torch.stack(found).mean(0)).to(state[name].dtype) for name, found in corrections.items()
    }
    return Compensation(new, _describe_biases(list(applied), list(lacking)))


def _compute_lost_output(cut: Cut, seen: Observation, dim: int) -> Tensor:
    """Σ_{j removed} W_ij · mean(x_j), by output position i: [outputs]."""
    mean = seen.mean
    lost = seen.weight.float() * mean * ~cut.mask_tensor(seen.site.weight_dims).to(mean.device)
    return lost.sum([d for d in range(lost.ndim) if d != dim])


def _find_bias(analysis: Analysis, site: Site) -> tuple[str | None, int]:
    """The bias that the contraction adds to its result, and the dimension of the weight that it runs along."""
    # ``linear`` and ``conv`` call it bias; in ``addmm(self, mat1, mat2)`` it is the first argument.
    node = get_argument(site.node, "bias")
    if get_argument(site.node, "mat1") is not None:
        node = get_argument(site.node, "self")
    weights = analysis.program.weights
    if isinstance(node, fx.Node) and node.name in weights:
        dims = analysis.facts.dims(node)
        for d, term in enumerate(site.weight_dims):
            if d != site.weight_dim and len(dims) == 1 and resolve(dims[0]) == term:
                return weights[node.name], d
    return None, -1


def _label(analysis: Analysis, site: Site) -> str:
    """The short name of the consumer: ``down_proj``."""
    node = site.weight
    while node.op != "placeholder":
        node = next(n for n in node.all_input_nodes if analysis.facts.is_weight(n))
    return analysis.program.weights[node.name].removesuffix(".weight").rsplit(".", 1)[-1]


def _describe_biases(applied: list[str], lacking: list[str]) -> str:
    parts = []
    if applied:
        parts.append(f"applied to {_join(applied)}")
    if lacking:
        parts.append(f"not applied, {_join(lacking)} {'has' if len(lacking) == 1 else 'have'} no bias")
    return f"FLAP bias compensation: {'; '.join(parts) or 'nothing to do, no weight sums over what was removed'}"


def _join(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


FLAP = Criterion(
    "flap",
    "input variance × squared column norm; means go to biases",
    measure_activations,
    score_by_flap,
    compensate=compensate,
)
